"""Values of options, against what typer alone makes of them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.core import TyperCommand
from typer.main import get_command

from kernelforge.cli.plain_values import PlainCommand


class Colour(enum.Enum):
    RED = "red"


def verb(
    needed: Annotated[str, typer.Argument()],
    rest: Annotated[list[int] | None, typer.Argument()] = None,
    text: str = "",
    maybe: str | None = None,
    count: int = 3,
    many: Annotated[int, typer.Option(min=1, max=9)] = 2,
    speed: float = 1.5,
    whole: float = 0,
    flag: Annotated[bool, typer.Option("--flag")] = False,
    pair: bool = True,
    choice: Literal["a", "b"] = "a",
    any_case: Annotated[Literal["x", "y"], typer.Option(case_sensitive=False)] = "x",
    words: Annotated[list[str] | None, typer.Option("--word")] = None,
    numbers: Annotated[list[float] | None, typer.Option("--number")] = None,
    file: Path | None = None,
    colour: Colour = Colour.RED,
    parsed: Annotated[str, typer.Option(parser=lambda value: value.upper())] = "p",
    called: Annotated[int, typer.Option(callback=lambda value: value + 1)] = 1,
    where: Annotated[str, typer.Option(envvar="ACME_WHERE")] = "here",
) -> dict[str, Any]:
    return dict(locals())


def parsed(cls: type[TyperCommand], line: str) -> dict[str, Any] | str:
    """The arguments that reach the verb, with their types, or the message of the error."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=cls)(verb)
    command = get_command(app)
    try:
        with command.make_context("verb", line.split()) as context:
            values: dict[str, Any] = command.invoke(context)
    except typer.TyperException as error:
        return error.format_message()
    return {name: (type(value), value) for name, value in values.items()}


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "",
        "x 1 2 3",
        "x 1 two",
        "--help-me",
        "x --text a --maybe b --word c --word d",
        "x --count 7",
        "x --count -7",
        "x --count=007",
        "x --count 7.0",
        "x --count 1_000",
        "x --count 99999999999999999999999",
        "x --count seven",
        "x --count ٣",  # a digit elsewhere
        "x --many 9",
        "x --many 0",
        "x --many 10",
        "x --speed 2",
        "x --speed 2.25",
        "x --speed -0.1",
        "x --speed 1e3",
        "x --speed inf",
        "x --speed .5",
        "x --speed fast",
        "x --number 1 --number 2.5",
        "x --number 1 --number no",
        "x --flag --no-pair",
        "x --choice b",
        "x --choice B",
        "x --choice c",
        "x --any-case Y",
        "x --file a/b",
        "x --colour red",
        "x --colour blue",
        "x --parsed q",
        "x --called 5",
        "x --called no",
        "x --text",
    ],
)
def test_as_typer_alone(line: str) -> None:
    assert parsed(PlainCommand, line) == parsed(TyperCommand, line)


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_WHERE", "there")
    values = parsed(PlainCommand, "x")
    assert values == parsed(TyperCommand, "x")
    assert isinstance(values, dict)
    assert values["where"] == (str, "there")
