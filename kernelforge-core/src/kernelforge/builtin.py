"""Core's own plugin: what comes with kernelforge-core, registered as any other plugin does."""

from __future__ import annotations

from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, PassSpec, TunerSpec
from kernelforge.hookspecs import hookimpl

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
    PassSpec(
        "fuse-norm-matmul",
        "kernelforge.passes.fuse_norm_matmul:FuseNormMatmul",
        "Compute an RMS norm in the product that reads it.",
    ),
    PassSpec(
        "fuse-norm-quantize",
        "kernelforge.passes.fuse_norm_quantize:FuseNormQuantize",
        "Write an RMS norm in 8 bits where it is read so.",
    ),
    PassSpec("fuse-qkv", "kernelforge.passes.fuse_qkv:FuseQkv", "Multiply by several weights at once."),
    PassSpec(
        "fuse-rope-attention",
        "kernelforge.passes.fuse_rope_attention:FuseRopeAttention",
        "Rotate, update the caches and attend to them in one op.",
    ),
    PassSpec(
        "fuse-rope-cache",
        "kernelforge.passes.fuse_rope_cache:FuseRopeCache",
        "Rotate queries and keys and update the caches in one op.",
    ),
    PassSpec("quantize", "kernelforge.passes.quantize:Quantize", "Put constant weights into 8 or 4 bits."),
)

TUNERS = (TunerSpec("grid", "kernelforge.tune.grid:GridTuner", "Every config, or a sample of them."),)

BACKENDS = (
    BackendSpec(
        "reference",
        "kernelforge.reference:ReferenceBackend",
        "Numpy in float64: slow and obvious, the oracle of all others.",
        fallback="kernelforge.reference:variant",
    ),
)

COMMANDS = (
    CommandSpec("list", "kernelforge.cli.plugins_verbs:list_plugins", "List the plugins and their states.", "plugins"),
    CommandSpec("info", "kernelforge.cli.plugins_verbs:info", "Show what a plugin registers.", "plugins"),
    CommandSpec("check", "kernelforge.cli.plugins_verbs:check", "Import plugins in processes of their own.", "plugins"),
    CommandSpec("disable", "kernelforge.cli.plugins_verbs:disable", "Leave a plugin out from now on.", "plugins"),
    CommandSpec("enable", "kernelforge.cli.plugins_verbs:enable", "Undo `plugins disable`.", "plugins"),
    CommandSpec("retry", "kernelforge.cli.plugins_verbs:retry", "Lift the quarantine of a plugin.", "plugins"),
    CommandSpec("new", "kernelforge.cli.new_verb:new", "Write the package of a new plugin.", "plugins"),
    CommandSpec("list", "kernelforge.cli.passes_verbs:list_passes", "List the passes and their options.", "passes"),
    CommandSpec("info", "kernelforge.cli.cache_verbs:info", "Show the size of the cache.", "cache"),
    CommandSpec("clear", "kernelforge.cli.cache_verbs:clear", "Delete the cache; records stay.", "cache"),
    CommandSpec("tune", "kernelforge.cli.tune_verb:tune", "Find the fastest verified kernels and record them."),
    CommandSpec("why", "kernelforge.cli.why_verb:why", "Show which kernel runs a problem, and why no other does."),
    CommandSpec("list", "kernelforge.cli.records_verbs:list_records", "List the tuning records.", "records"),
    CommandSpec("show", "kernelforge.cli.records_verbs:show", "Show everything that a record holds.", "records"),
    CommandSpec("export", "kernelforge.cli.records_verbs:export", "Write records to a file.", "records"),
    CommandSpec("import", "kernelforge.cli.records_verbs:import_records", "Merge the records of a file.", "records"),
    CommandSpec("prune", "kernelforge.cli.records_verbs:prune", "Drop records.", "records"),
    CommandSpec("benchmark-matmul", "kernelforge.cli.bench_verbs:matmul", "Time a matrix product beside peers."),
    CommandSpec(
        "benchmark-dispatch", "kernelforge.cli.bench_verbs:dispatch", "Time what a call costs beside its kernel."
    ),
    CommandSpec("benchmark-suite", "kernelforge.cli.bench_verbs:suite", "Time problems of transformers."),
    CommandSpec("emit-mlir", "kernelforge.cli.emit_verb:emit_mlir", "Print a module at a stage of the compiler."),
    CommandSpec(
        "run",
        "kernelforge.cli.conformance_verbs:run",
        "Check what a plugin registers against the references.",
        "conformance",
    ),
    CommandSpec("list", "kernelforge.cli.conformance_verbs:list_cases", "List the conformance cases.", "conformance"),
    CommandSpec("doctor", "kernelforge.cli.doctor:doctor", "Show what works here and what does not."),
)


@hookimpl
def kernelforge_dialects() -> tuple[DialectSpec, ...]:
    return DIALECTS


@hookimpl
def kernelforge_passes() -> tuple[PassSpec, ...]:
    return PASSES


@hookimpl
def kernelforge_tuners() -> tuple[TunerSpec, ...]:
    return TUNERS


@hookimpl
def kernelforge_backends() -> tuple[BackendSpec, ...]:
    return BACKENDS


@hookimpl
def kernelforge_commands() -> tuple[CommandSpec, ...]:
    return COMMANDS
