"""Chat templates: the Jinja text that turns a conversation into a prompt, as published beside a tokenizer.

A template comes from strangers, so it runs in a sandbox (`template_sandbox`).
"""

from __future__ import annotations

import datetime
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError, UsageError

if TYPE_CHECKING:
    from jinja2 import Environment

_FILE = "chat_template.jinja"
WIDEST_INDENT = 64
LONGEST_DATE = 1000
_SOURCE_NAME = "<template>"  # what Jinja calls a template made from a string


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The text of chat_template.jinja or of tokenizer_config.json's `chat_template` (of several, `default`)."""
    path = folder / _FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AssetError(f"{path} cannot be read: {error}") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise AssetError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return template


def render_chat_template(
    template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The prompt. Raises `AssetError` with the line of a broken template, `UsageError` if it refuses the messages."""
    from jinja2 import TemplateError, TemplateSyntaxError

    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"a chat message needs a role and a content, not {message!r}")
    try:
        return (
            _environment()
            .from_string(template)
            .render(**special_tokens, messages=messages, add_generation_prompt=add_generation_prompt)
        )
    except _RefusedError as error:
        raise UsageError(f"the model's chat template refuses the messages: {error}") from None
    except TemplateSyntaxError as error:
        raise AssetError(f"the model's chat template is broken at line {error.lineno}: {error.message}") from None
    except (
        TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RecursionError,
        MemoryError,
    ) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _SOURCE_NAME]
        where = f" at line {lines[-1]}" if lines else ""
        raise AssetError(f"the model's chat template fails{where}: {str(error) or type(error).__name__}") from None


class _RefusedError(Exception):
    """Raised by a template itself, through `raise_exception`."""


def _environment() -> Environment:
    """What published templates expect to find: the names and filters that transformers gives them."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    from kernelforge_llm.template_sandbox import BoundedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here its content stands as it is."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: object, indent: int | None = None) -> str:
        if indent is not None and indent > WIDEST_INDENT:
            raise ValueError(f"an indent of more than {WIDEST_INDENT}")
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def raise_exception(message: str) -> None:
        raise _RefusedError(message)

    def strftime_now(pattern: str) -> str:
        if len(pattern) > LONGEST_DATE:
            raise ValueError(f"a date's pattern of more than {LONGEST_DATE} characters")
        return datetime.datetime.now().strftime(pattern)

    environment = BoundedEnvironment(
        filters={"tojson": tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
