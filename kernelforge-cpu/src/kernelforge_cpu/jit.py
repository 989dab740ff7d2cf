"""MLIR text to native code: lowering to LLVM, optimisation and object code through llvmlite, and loading objects into
the process.

    library = load([compile_object(text, target)])
    kernel = KERNEL(library.address("scale_f32"))     # keep `library` alive as long as the address is used

Objects are position-independent ELF (Mach-O, COFF) and may be kept and loaded later: see `kernelforge_cpu.objects`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from kernelforge.errors import UsageError
from kernelforge_cpu.isa import CpuTarget, host_target
from kernelforge_cpu.llvm_text import respell

if TYPE_CHECKING:
    from torch_mlir import ir

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
"""`void kernel(void** buffers, int64_t* dims, int64_t part, int64_t parts)`; a call releases the GIL."""

PIPELINE = (
    "builtin.module(canonicalize,cse,convert-vector-to-llvm{reassociate-fp-reductions=false},convert-scf-to-cf,"
    "arith-expand,convert-to-llvm,reconcile-unrealized-casts)"
)
"""From func, scf, arith, math, index, vector and memref to llvm."""

_LOOP_ALIGNMENT = "--x86-experimental-pref-innermost-loop-alignment=6"
"""Innermost loops begin at a cache line (2^6 bytes): one that begins 48 bytes into it was 3 to 7 % slower on Zen 3, and where
a loop begins would otherwise hang on what is in front of it."""

_NUMBERS = itertools.count()
_LOCK = threading.RLock()
"""Held by whoever works with MLIR, of which there is one context, or with LLVM. A fork waits for it: in a child nobody would
free what is locked inside of them."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
_UNUSED: list[dict[str, Any]] = []
"""What libraries had that are gone; whoever has the lock next lets go of it."""

P = ParamSpec("P")
T = TypeVar("T")


def _in_turn(work: Callable[P, T]) -> Callable[P, T]:
    """Threads take turns with the function; what it leaves behind has gone when the next one begins."""

    @wraps(work)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOCK:
            _UNUSED.clear()
            return work(*args, **kwargs)

    return call


@_in_turn
def lower(mlir_text: str) -> str:
    """The module after `PIPELINE`, as MLIR text of the llvm dialect. Raises UsageError with MLIR's diagnostics."""
    return str(_lowered(mlir_text))


@_in_turn
def llvm_ir(mlir_text: str, target: CpuTarget | None = None, *, optimize: bool = False) -> str:
    """LLVM IR text for `target` (default: the host), as it is handed to LLVM or after LLVM's own passes."""
    from kernelforge.mlir import translate_to_llvm_ir

    target = target or host_target()
    text = translate_to_llvm_ir(_lowered(mlir_text))
    text = _with_attributes(respell(text), target)
    return str(_optimized(text, target)[0]) if optimize else text


def compile_object(mlir_text: str, *, cpu: CpuTarget | None = None) -> bytes:
    """Object code of a module for `cpu` (default: the host). Raises UsageError with MLIR's or LLVM's diagnostics."""
    target = cpu or host_target()
    return compile_llvm(llvm_ir(mlir_text, target), target)


@_in_turn
def compile_llvm(ir_text: str, target: CpuTarget) -> bytes:
    """Object code of LLVM IR text."""
    module, machine = _optimized(ir_text, target)
    code: bytes = machine.emit_object(module)
    return code


@_in_turn
def assembly(mlir_text: str, *, cpu: CpuTarget | None = None) -> str:
    """The assembly that `compile_object` would encode, for reading and for tests of instruction choice."""
    target = cpu or host_target()
    module, machine = _optimized(llvm_ir(mlir_text, target), target)
    text: str = machine.emit_assembly(module)
    return text


class Library:
    """Objects loaded into the process. Addresses are valid as long as it lives."""

    @_in_turn
    def __init__(self, objects: Sequence[bytes]) -> None:
        """Raises UsageError when an object is not one of this machine, or two define one symbol."""
        builder = _llvm().JITLibraryBuilder().add_current_process()
        for code in objects:
            builder.add_object_img(code)
        self._name = f"library{next(_NUMBERS)}"
        self._session = _session()
        self._found: dict[str, Any] = {}
        try:
            self._tracker = builder.link(self._session, self._name)
        except RuntimeError as error:
            raise UsageError(f"object code does not load: {error}") from None

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        # Garbage is collected on any thread, also on one that the lock's holder waits for: it must not wait itself.
        _UNUSED.append(self.__dict__)
        self.__dict__ = {}
        if _LOCK.acquire(blocking=False):
            try:
                _UNUSED.clear()
            finally:
                _LOCK.release()

    @_in_turn
    def address(self, symbol: str) -> int:
        """Address of a function. Raises UsageError for an unknown name, and for code that needs a function that is
        nowhere.
        """
        if symbol not in self._found:
            try:
                self._found[symbol] = self._session.lookup(self._name, symbol)
            except RuntimeError as error:
                raise UsageError(f"function {symbol!r} cannot be loaded: {error}") from None
        found: int = self._found[symbol][symbol]
        return found


@cache
def _session() -> Any:
    """The process's linker. LLVM's newer one (JITLink) keeps an object's code and data together, as PIC code needs."""
    llvm = _llvm()
    return llvm.create_lljit_compiler(
        _new_machine(host_target()), use_jit_link=sys.platform != "win32", suppress_errors=True
    )


def load(objects: Sequence[bytes]) -> Library:
    """Loads objects that were compiled for this machine."""
    return Library(objects)


def _lowered(mlir_text: str) -> ir.Module:
    from kernelforge.mlir import parse_module, run_pipeline

    module = parse_module(mlir_text, _context())
    run_pipeline(module, PIPELINE)
    return module


@cache
def _context() -> ir.Context:
    from kernelforge.mlir import new_context

    return new_context()


def _with_attributes(ir_text: str, target: CpuTarget) -> str:
    """Full-width vectors (LLVM prefers half on some AVX-512 CPUs) and the triple, which intrinsics depend on."""
    attributes = f'nounwind "prefer-vector-width"="{32 * target.lanes}"'
    if "windows" in target.triple:
        attributes += ' "no-stack-arg-probe"'  # it would call into the C runtime
    defined = re.sub(r"^(define [^\n]*\)(?: #\d+)?) \{$", rf"\1 {attributes} {{", ir_text, flags=re.MULTILINE)
    return f'target triple = "{target.triple}"\n{defined}'


def _optimized(ir_text: str, target: CpuTarget) -> tuple[Any, Any]:
    """The module after LLVM's O3 and the machine it was optimised for."""
    llvm = _llvm(target.arch)
    machine = _target_machine(target)
    try:
        module = llvm.parse_assembly(ir_text)
        module.verify()
    except RuntimeError as error:
        raise UsageError(f"LLVM does not accept the module: {error}") from None
    module.triple = target.triple
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module, machine


@cache
def _target_machine(target: CpuTarget) -> Any:
    return _new_machine(target)


def _new_machine(target: CpuTarget) -> Any:
    llvm = _llvm(target.arch)
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small", jit=True
    )


@cache
def _llvm(arch: str | None = None) -> Any:
    """llvmlite's binding with the host's code generator, or all of them when `arch` is another one's."""
    llvm = _binding()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # of kernels with inline assembly
    if arch is not None and arch != host_target().arch:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return llvm


@cache
def _binding() -> Any:
    """llvmlite's binding with the process's options set, which LLVM takes once."""
    import llvmlite.binding as llvm

    if host_target().arch == "x86_64":  # a build of LLVM for others may not know the option, and would end the process
        llvm.set_option("kernelforge", _LOOP_ALIGNMENT)
    return llvm
