"""`kernelforge plugins new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.errors import UsageError
from kernelforge.scaffold import KINDS, Scaffold


def new(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by hyphens: fast-silu.")],
    kind: Annotated[str, typer.Option(help=f"What it adds: {', '.join(KINDS)}.")],
    folder: Annotated[Path, typer.Option(help="Where its folder, kernelforge-NAME, is made.")] = Path(),
) -> dict[str, Any]:
    """Write a package with a plugin that works: code, tests, README and CI, ready to be installed and changed.

    A kernel is written for `--target cpu` (in Python) or `--target gpu` (in WGSL).
    """
    out = output.current()
    scaffold = Scaffold(name, kind, out.requested_target)
    _check_free(scaffold)
    files = scaffold.write(folder)
    root = folder / scaffold.distribution
    out.print(f"{root}")
    for file in files:
        out.print(f"  {file.relative_to(root).as_posix()}")
    out.print(f"\nnext: pip install -e {root}\n      pytest {root}\n      kernelforge plugins info {name}")
    return {"plugin": name, "kind": kind, "folder": str(root), "files": [str(file) for file in files]}


def _check_free(scaffold: Scaffold) -> None:
    """Raises UsageError when a plugin of that name, or what it would register, is there already."""
    hook = scaffold.made.hook
    for status in output.current().registry.plugins.values():
        if status.name == scaffold.name:
            raise UsageError(f"{status} is installed already", hint="choose another name")
        if scaffold.registers in status.contributions.get(hook, ()):
            raise UsageError(
                f"{status} registers {scaffold.kind} '{scaffold.registers}' already", hint="choose another name"
            )
