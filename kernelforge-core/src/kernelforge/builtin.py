"""Core's own plugin: what comes with kernelforge-core, registered as any other plugin does."""

from __future__ import annotations

from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, ImporterSpec, PassSpec, TunerSpec
from kernelforge.hookspecs import hookimpl
from kernelforge.variant import KernelVariant

DIALECTS = (
    DialectSpec("transformer", "kernelforge.dialects.transformer:OPS", "The ops of decoder-only transformers."),
)

PASSES = (
    PassSpec(
        "canonicalize", "kernelforge.passes.canonicalize:Canonicalize", "Simplify to normal forms and remove dead code."
    ),
    PassSpec("cse", "kernelforge.passes.cse:Cse", "Compute equal subexpressions once."),
    PassSpec(
        "fuse-add-norm", "kernelforge.passes.fuse_add_norm:FuseAddNorm", "Compute a sum and its RMS norm in one op."
    ),
    PassSpec(
        "fuse-epilogue",
        "kernelforge.passes.fuse_epilogue:FuseEpilogue",
        "Compute bias, activation and residual in the matmul before them.",
    ),
    PassSpec("fuse-glu", "kernelforge.passes.fuse_glu:FuseGlu", "Compute a gated pair of matmuls in one op."),
    PassSpec("fuse-qkv", "kernelforge.passes.fuse_qkv:FuseQkv", "Multiply by several weights at once."),
)

KERNELS: tuple[KernelVariant, ...] = ()

TUNERS: tuple[TunerSpec, ...] = ()

BACKENDS: tuple[BackendSpec, ...] = ()

IMPORTERS: tuple[ImporterSpec, ...] = ()

COMMANDS = (
    CommandSpec("list", "kernelforge.cli.plugins_verbs:list_plugins", "List the plugins and their states.", "plugins"),
    CommandSpec("info", "kernelforge.cli.plugins_verbs:info", "Show what a plugin registers.", "plugins"),
    CommandSpec("check", "kernelforge.cli.plugins_verbs:check", "Import plugins in processes of their own.", "plugins"),
    CommandSpec("list", "kernelforge.cli.passes_verbs:list_passes", "List the passes and their options.", "passes"),
    CommandSpec("info", "kernelforge.cli.cache_verbs:info", "Show the size of the cache.", "cache"),
    CommandSpec("clear", "kernelforge.cli.cache_verbs:clear", "Delete the cache; records stay.", "cache"),
    CommandSpec("doctor", "kernelforge.cli.doctor:doctor", "Show what works here and what does not."),
)


@hookimpl
def kernelforge_dialects() -> tuple[DialectSpec, ...]:
    return DIALECTS


@hookimpl
def kernelforge_passes() -> tuple[PassSpec, ...]:
    return PASSES


@hookimpl
def kernelforge_kernels() -> tuple[KernelVariant, ...]:
    return KERNELS


@hookimpl
def kernelforge_tuners() -> tuple[TunerSpec, ...]:
    return TUNERS


@hookimpl
def kernelforge_backends() -> tuple[BackendSpec, ...]:
    return BACKENDS


@hookimpl
def kernelforge_importers() -> tuple[ImporterSpec, ...]:
    return IMPORTERS


@hookimpl
def kernelforge_commands() -> tuple[CommandSpec, ...]:
    return COMMANDS
