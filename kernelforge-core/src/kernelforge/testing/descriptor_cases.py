"""Cases of commands, importers and what other plugins' hooks are given: what a descriptor names can be loaded."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from kernelforge.lazy import resolve
from kernelforge.plugins import DESCRIPTORS
from kernelforge.registry import command_key, lookup
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.variant import KernelVariant

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
    for variant in registry.hooks.get("kernelforge_kernels", ()):
        if variant.provenance.plugin == plugin and variant.op not in registry.ops:
            check = partial(check_op, variant=variant)
            cases.append(Case(f"{variant.key}/1/op", 1, variant.op, variant.name, check))
    for hook in registry.hooks.keys() - DESCRIPTORS.keys():
        kind = hook.partition("_")[2]
        for descriptor in registry.extra(hook):
            if descriptor.provenance.plugin == plugin:
                check = partial(check_loads, descriptor=descriptor)
                cases.append(Case(f"{kind}/{descriptor.name}/1/loads", 1, kind, descriptor.name, check))
    return cases


def check_op(bench: Bench, variant: KernelVariant) -> None:
    """A kernel of an op that no dialect has never runs. Raises UsageError."""
    lookup("op", bench.registry.ops, variant.op)


def check_loads(bench: Bench, descriptor: Any) -> None:
    """What it names can be imported. Raises whatever that raises."""
    for field in fields(descriptor):
        value = getattr(descriptor, field.name)
        if str(field.type).startswith("Ref") and value is not None:
            resolve(value)


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
