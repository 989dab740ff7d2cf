"""The text form of a pipeline: `canonicalize,fuse-epilogue{residual=false},cse`.

    pipeline = [ pass { "," pass } ]
    pass     = name [ "{" { option "=" value } "}" ]

Options are separated by spaces. A value that is empty or holds a space, a comma, a quote or a brace is written as a
JSON string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kernelforge.errors import PluginError, UsageError

_NAME = re.compile(r"[A-Za-z][\w-]*")
_OPTION = re.compile(r'(?P<name>[A-Za-z]\w*)=(?P<value>"(?:[^"\\]|\\.)*"|[^\s{},"]+)')
_BARE = re.compile(r'[^\s{},"]+')
_WANTED = {int: "a whole number", float: "a number", str: "text"}
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class PassCall:
    """One pass of a pipeline's text: nothing is known yet of the pass."""

    name: str
    options: Mapping[str, str]
    """Values as they are written, without quotes."""


def parse_calls(text: str) -> tuple[PassCall, ...]:
    """Split a pipeline's text; an empty one has no passes. Raises UsageError, which points at the fault."""
    return tuple(_calls(text)) if text.strip() else ()


def _calls(text: str) -> Iterator[PassCall]:
    at = 0
    while True:
        at = _skip(text, at)
        name = _NAME.match(text, at)
        if name is None:
            raise _fault(text, at, "a pass name")
        at = _skip(text, name.end())
        options: dict[str, str] = {}
        if text.startswith("{", at):
            at = _skip(text, at + 1)
            while not text.startswith("}", at):
                option = _OPTION.match(text, at)
                if option is None:
                    raise _fault(text, at, f"option=value or }} of pass '{name[0]}'")
                if option["name"] in options:
                    raise UsageError(f"pass '{name[0]}' is given option '{option['name']}' twice")
                options[option["name"]] = _unquoted(text, option.start("value"), option["value"])
                at = _skip(text, option.end())
            at = _skip(text, at + 1)
        yield PassCall(name[0], options)
        if at == len(text):
            return
        if text[at] != ",":
            raise _fault(text, at, "a comma")
        at += 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _unquoted(text: str, at: int, value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        raise _fault(text, at, "a JSON string") from None


def _fault(text: str, at: int, wanted: str) -> UsageError:
    found = f"'{text[at:]}'" if at < len(text) else "its end"
    return UsageError(
        f"pass pipeline '{text}': wanted {wanted} at column {at + 1}, found {found}",
        hint="written as pass,pass{option=value option=value}; kernelforge passes list names the passes",
    )


def read_options(cls: type, name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The constructor arguments of pass class `cls` for options as they are written.

    Raises UsageError for an option that the pass does not have, a value that does not fit or a missing option;
    PluginError for a field whose type no option can have.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for option in options:
        if option not in known:
            near = get_close_matches(option, known)
            has = ", ".join(known) or "none"
            hint = f"did you mean {' or '.join(near)}?" if near else f"its options: {has}"
            raise UsageError(f"pass '{name}' has no option '{option}'", hint=hint)
    missing = [f.name for f in known.values() if _required(f) and f.name not in options]
    if missing:
        raise UsageError(f"pass '{name}' needs option '{missing[0]}'", hint=f"write {name}{{{missing[0]}=...}}")
    return {option: _read(name, option, hints[option], value) for option, value in options.items()}


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _read(name: str, option: str, kind: Any, text: str) -> Any:
    wanted = _WANTED.get(kind)
    if kind is bool or get_origin(kind) is Literal:
        values: dict[str, Any] = {_plain(value): value for value in (get_args(kind) or (True, False))}
        if text in values:
            return values[text]
        wanted = f"one of {', '.join(values)}"
    elif wanted is not None:
        try:
            return kind(text)
        except ValueError:
            pass  # refused below
    else:
        raise PluginError(
            f"pass '{name}': option '{option}' is of type {kind}", hint="use bool, int, float, str or Literal"
        )
    raise UsageError(f"option '{option}' of pass '{name}' must be {wanted}, got '{text}'")


def write_call(name: str, call: Any) -> str:
    """The text of pass `call`, a dataclass instance: options with their default values are left out."""
    options = [
        f"{f.name}={_quoted(_plain(value))}"
        for f in fields(call)
        if (value := getattr(call, f.name)) != (f.default if f.default_factory is MISSING else f.default_factory())
    ]
    return f"{name}{{{' '.join(options)}}}" if options else name


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return text if _BARE.fullmatch(text) else json.dumps(text)
