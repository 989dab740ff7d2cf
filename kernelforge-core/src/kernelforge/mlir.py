"""The only importer of the MLIR Python bindings: contexts, parsing, passes, translation, and the bindings' traps.

Import this module lazily: it loads MLIR's shared library (tens of milliseconds).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from kernelforge.errors import KernelForgeError, UsageError
from kernelforge.interruption import held_back
from kernelforge.locks import ForkLock
from kernelforge.machine import stack_bytes

STACK_BYTES = 768 * 1024
"""MLIR crashes on a thread with less than about 448 KiB of stack, already while it is loaded."""


def _check_stack() -> None:
    have = stack_bytes()
    if have is not None and have < STACK_BYTES:
        raise KernelForgeError(
            f"this thread has {have // 1024} KiB of stack, and MLIR needs {STACK_BYTES // 1024}",
            hint="ulimit -s 8192 gives the process more, threading.stack_size(8 << 20) the threads that it starts",
        )


_check_stack()
with held_back():  # Ctrl-C while the bindings' library initialises itself crashes the process
    from torch_mlir import ir, rewrite
    from torch_mlir.dialects.ext import Dialect, Operand, Pure, Result
    from torch_mlir.passmanager import PassManager

__all__ = [
    "Dialect",
    "Operand",
    "PassManager",
    "Pure",
    "Result",
    "ir",
    "load_dialects",
    "new_context",
    "parse_module",
    "rewrite",
    "run_pipeline",
    "translate_to_llvm_ir",
]

_LOAD = ForkLock()


def new_context(*dialects: type[Dialect]) -> ir.Context:
    """A context with these Python-defined dialects; upstream ones are always there. Keep one per session, not per op.

    It is single-threaded (a multithreaded one deadlocks as soon as a Python verifier runs), and may be used by one
    thread at a time.
    """
    context = ir.Context()
    context.enable_multithreading(False)
    load_dialects(context, dialects)
    return context


def load_dialects(context: ir.Context, dialects: Sequence[type[Dialect]]) -> None:
    """Loads Python-defined dialects into a context, one thread at a time: it passes state through the dialect class."""
    with context, _LOAD:
        for dialect in dialects:
            dialect.load()
            # The bindings import "<package>.dialects.<name>" each time they wrap an op, until one such import
            # succeeds. A failing search of the path takes 40 us an op: parsing and walking are 10 times faster without.
            name = f"{Dialect.__module__.rpartition('.')[0]}.{dialect.DIALECT_NAMESPACE}"
            sys.modules.setdefault(name, ModuleType(name))


def parse_module(text: str, context: ir.Context) -> ir.Module:
    """Parses and verifies a module. Raises UsageError with MLIR's diagnostics, and KernelForgeError on a thread whose stack is
    too small for MLIR."""
    _check_stack()
    with context:
        try:
            return ir.Module.parse(text)
        except ir.MLIRError as error:
            raise UsageError(f"MLIR does not accept the module:\n{_diagnostics(error)}") from None


def run_pipeline(module: ir.Module, pipeline: str) -> None:
    """Runs a textual pass pipeline, such as `builtin.module(canonicalize,cse)`, in place.

    Raises UsageError with MLIR's diagnostics, for a pipeline that does not parse and for a pass that fails.
    """
    with module.context, ir.Location.unknown():
        try:
            PassManager.parse(pipeline).run(module.operation)
        except ValueError as error:
            raise UsageError(f"MLIR does not accept the pass pipeline {pipeline!r}: {error}") from None
        except ir.MLIRError as error:
            raise UsageError(f"MLIR pass pipeline failed:\n{_diagnostics(error)}") from None


def translate_to_llvm_ir(module: ir.Module) -> str:
    """The LLVM IR text of a module of `llvm` dialect ops. Raises UsageError when another op is left in it."""
    # The package's `dialects.llvm` has this same function beside thousands of lines that take 0.1 s to import.
    from torch_mlir._mlir_libs._mlirDialectsLLVM import translate_module_to_llvmir

    with module.context, ir.Location.unknown():
        legal = rewrite.ConversionTarget()
        legal.add_legal_dialect("llvm", "builtin")
        try:  # the translation itself crashes on ops that it does not know
            rewrite.apply_full_conversion(module.operation, legal, rewrite.RewritePatternSet().freeze())
        except ir.MLIRError as error:
            raise UsageError(f"the module is not fully lowered to LLVM:\n{_diagnostics(error)}") from None
        text: str = translate_module_to_llvmir(module.operation)
    return text


def _diagnostics(error: ir.MLIRError) -> str:
    return str(error).strip()
