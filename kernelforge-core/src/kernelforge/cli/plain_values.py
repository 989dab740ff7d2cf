"""Values of options that need no conversion, or a plain one, without pydantic.

Newer versions of typer convert every value with it, defaults too; importing it took a sixth of a start of `llm-inference`.
What is not plain, or not valid, is left to typer, so that conversions and messages stay its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand

Process = Callable[[Any, Any], Any]

_INTEGER = re.compile(r"-?[0-9]{1,15}")
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
_RESTRICTIONS = ("parser", "min", "max")


class PlainCommand(TyperCommand):
    """A command that converts plain values itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for parameter in self.get_params(ctx):
            described = getattr(parameter, "type_descriptor", None)  # only versions that need pydantic have it
            info = getattr(described, "parameter_info", None)
            if info and all(getattr(info, name, None) is None for name in _RESTRICTIONS):
                process = partial(_process, parameter.process_value, getattr(described, "annotation", None), parameter)
                parameter.process_value = process  # type: ignore[method-assign]  # typer makes it: there is no other door
        return super().parse_args(ctx, args)


class _NotPlain(Exception):
    """It takes typer to say what a value means."""


def _process(usual: Process, kind: Any, parameter: Any, context: Any, value: Any) -> Any:
    """As a parameter's `process_value`: the value, converted, or what its callback makes of it."""
    try:
        plain = _plain_or_empty(kind, parameter, value)
    except _NotPlain:
        return usual(context, value)
    return plain if parameter.callback is None else parameter.callback(context, parameter, plain)


def _plain_or_empty(kind: Any, parameter: Any, value: Any) -> Any:
    many = parameter.multiple or parameter.nargs == -1
    if value is None or (many and value in ((), [])):
        if parameter.required:
            raise _NotPlain
        return () if many else None
    if many and get_origin(kind) is list and isinstance(value, (list, tuple)):
        return [_plain(get_args(kind)[0], item) for item in value]
    return _plain(kind, value)


def _plain(kind: Any, value: Any) -> Any:
    """`value` as a `kind`. Raises _NotPlain when that is not clear at once."""
    if kind in (str, int, float, bool) and type(value) is kind:
        return value
    if isinstance(value, str):
        if kind is int and _INTEGER.fullmatch(value):
            return int(value)
        if kind is float and _DECIMAL.fullmatch(value):
            return float(value)
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
    raise _NotPlain
