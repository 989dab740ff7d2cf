"""The hooks. A plugin is a module or object with some of these functions, each decorated with `hookimpl`:

    from kernelforge.hookspecs import hookimpl

    @hookimpl
    def kernelforge_kernels():
        return [KernelVariant(name="mine", op="transformer.matmul", target="cpu", build="my_package.kernels:build")]

Each hook is called once per plugin when the registry is first needed, takes no arguments, and returns an iterable of frozen
descriptors (never None). Descriptors are cheap: what is heavy is a lazy "package.module:attr". The entry-point group is
`kernelforge`; an entry point names the module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, ImporterSpec, PassSpec, TunerSpec
    from kernelforge.variant import KernelVariant

GROUP = "kernelforge"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
"""Decorates a hook's specification, in a module that a plugin names as `kernelforge_hookspecs`: a new hook for others."""

hookimpl = pluggy.HookimplMarker(GROUP)
"""Decorates a plugin's implementation of a hook; `optionalhook=True` for one whose specification may be absent."""


@hookspec
def kernelforge_dialects() -> Iterable[DialectSpec]:
    """MLIR dialects with their ops. Names are unique over all plugins."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_passes() -> Iterable[PassSpec]:
    """Passes over modules, named in pipeline texts."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_kernels() -> Iterable[KernelVariant]:
    """Kernel variants. (target, op, name) is unique over all plugins; selection weighs them all."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_tuners() -> Iterable[TunerSpec]:
    """Search strategies for `kernelforge tune --tuner NAME`."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_backends() -> Iterable[BackendSpec]:
    """Targets. The name is what `--target` takes."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_importers() -> Iterable[ImporterSpec]:
    """Readers that turn what `--model` names (a folder, a file, a named shape) into modules and constants."""
    raise AssertionError("a hook specification is never called")


@hookspec
def kernelforge_commands() -> Iterable[CommandSpec]:
    """Verbs of the command line. Loaded when they are run, listed from their summaries."""
    raise AssertionError("a hook specification is never called")
