"""Cases of commands and importers: what a descriptor names can be loaded and is what it must be."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kernelforge.lazy import resolve
from kernelforge.registry import command_key
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure

if TYPE_CHECKING:
    from kernelforge.registry import Registry

NOWHERE = "no-such-model.of-any-kind"


def descriptor_cases(registry: Registry, plugin: str) -> list[Case]:
    cases: list[Case] = []
    for key, command in registry.commands.items():
        if command.provenance.plugin == plugin:
            check = partial(check_command, key=key)
            cases.append(Case(f"command/{command_key(command).replace(' ', '-')}/1/help", 1, "command", key, check))
    for name, importer in registry.importers.items():
        if importer.provenance.plugin == plugin:
            check = partial(check_importer, name=name)
            cases.append(Case(f"importer/{name}/1/claims", 1, "importer", name, check))
    return cases


def check_command(bench: Bench, key: str) -> None:
    """Typer makes a command of it, and it has help. Raises Failure."""
    import typer
    from typer.main import get_command

    verb = resolve(bench.registry.commands[key].load)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name="verb")(verb)
    with get_command(app).make_context("verb", ["--help"], resilient_parsing=True) as context:
        text = context.get_help()
    if not (verb.__doc__ or "").strip() or verb.__doc__.split()[0] not in text:
        raise Failure("error", f"command '{key}' has no docstring, which is its help")


def check_importer(bench: Bench, name: str) -> None:
    """It claims nothing that is not there. Raises Failure."""
    importer = resolve(bench.registry.importers[name].load)()
    claims = importer.claims(NOWHERE)
    if claims is not False:
        raise Failure("not-refused", f"importer '{name}' says {claims!r} to '{NOWHERE}', must say False")
    if not callable(getattr(importer, "load", None)):
        raise Failure("error", f"importer '{name}' has no load")
