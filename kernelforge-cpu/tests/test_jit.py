"""Compilation: instruction choice for machines that are here and that are not, LLVM text respelling, error messages."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from kernelforge.errors import UsageError
from kernelforge.machine import Machine
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import LEVELS, CpuTarget, host_target, level_of, target
from kernelforge_cpu.jit import _LOCK, assembly, compile_llvm, compile_object, llvm_ir, load, lower
from kernelforge_cpu.llvm_text import respell


def dot(cpu: CpuTarget) -> str:
    """sum of x * y, in full vectors."""
    k = KernelBuilder("dot", cpu)
    x, y, out = k.buffer(0, "f32"), k.buffer(1, "f32"), k.buffer(2, "f32")
    with k.for_(0, k.dim(0), k.lanes, init=[k.f32(0.0, k.lanes)]) as loop:
        loop.yield_(k.fma(x.load(loop.i, k.lanes), y.load(loop.i, k.lanes), loop.values[0]))
    out.store(k.reduce_add(loop.results[0]))
    return k.text()


@pytest.mark.parametrize(
    ("level", "instructions"),
    [
        ("x86-64-v2", r"mulps.*%xmm[\s\S]*addps.*%xmm"),
        ("x86-64-v3", r"vfmadd\w+ps.*%ymm"),
        ("x86-64-v4", r"vfmadd\w+ps.*%zmm"),
        ("neoverse-n1", r"fmla\s+v\d+\.4s"),
        ("apple-m1", r"fmla\.4s"),
    ],
)
def test_each_level_multiplies_and_adds_in_its_widest_vectors(level: str, instructions: str) -> None:
    cpu = target(level)
    assert re.search(instructions, assembly(dot(cpu), cpu=cpu))
    magic = b"\xcf\xfa\xed\xfe" if level == "apple-m1" else b"\x7fELF"
    assert compile_object(dot(cpu), cpu=cpu).startswith(magic)


def test_the_host_uses_its_full_width_also_for_loops_that_llvm_vectorises() -> None:
    host = host_target()
    k = KernelBuilder("doubled", host)
    x, y = k.buffer(0, "f32"), k.buffer(1, "f32")
    with k.for_(0, k.dim(0)) as loop:
        y.store(x.load(loop.i) * 2.0, loop.i)
    register = {4: r"%xmm|\.4s|v\d+", 8: "%ymm", 16: "%zmm"}[host.lanes]
    assert re.search(register, assembly(k.text()))


@pytest.mark.skipif(host_target().arch != "x86_64", reason="innermost loops are aligned where the host is an x86-64")
def test_innermost_loops_begin_at_a_cache_line() -> None:
    code = assembly(dot(target("x86-64-v3")), cpu=target("x86-64-v3"))
    aligned = re.findall(r"\.p2align\s+(\d+)[^\n]*\n(\.LBB\w+):", code)
    assert aligned
    for power, label in aligned:
        body = code.split(f"{label}:")[1].split(label)[0]
        assert int(power) == 6 or ".LBB" in body, label


def test_nothing_is_contracted_unasked() -> None:
    cpu = target("x86-64-v3")
    k = KernelBuilder("rounded_twice", cpu)
    x = k.buffer(0, "f32")
    x.store(x.load(0, 8) * x.load(8, 8) + x.load(16, 8))
    code = assembly(k.text(), cpu=cpu)
    assert "vfmadd" not in code
    assert "vmulps" in code


def test_stages_can_be_read() -> None:
    text = dot(target("x86-64-v3"))
    assert "scf.for" in text
    assert "llvm.func @dot" in lower(text)
    assert "define void @dot" in llvm_ir(text, target("x86-64-v3"))
    assert '"prefer-vector-width"="256"' in llvm_ir(text, target("x86-64-v3"))
    assert "define void @dot" in llvm_ir(text, optimize=True)


def test_errors_carry_the_diagnostic() -> None:
    with pytest.raises(UsageError, match=r"MLIR does not accept the module:[\s\S]*use of undeclared SSA value name"):
        compile_object("func.func @f() { return %0 : i32 }")
    with pytest.raises(UsageError, match=r"not fully lowered to LLVM:[\s\S]*'func.func'"):
        compile_object(
            "func.func @f(%t: tensor<f32>, %p: !llvm.ptr) {\n%x = tensor.extract %t[] : tensor<f32>\n"
            "llvm.store %x, %p : f32, !llvm.ptr\nreturn }"
        )
    with pytest.raises(UsageError, match="LLVM does not accept the module: LLVM IR parsing error"):
        compile_llvm("define void @f() { ret i32 0 }", host_target())
    with pytest.raises(UsageError, match="unknown CPU level 'pentium'") as caught:
        target("pentium")
    assert caught.value.hint == "known levels: x86-64-v2, x86-64-v3, x86-64-v4, neoverse-n1, apple-m1"


def test_objects_that_do_not_load_are_errors_not_crashes() -> None:
    code = compile_object(dot(host_target()))
    with pytest.raises(UsageError, match="object code does not load"):
        load([code[: len(code) // 2]])
    with pytest.raises(UsageError, match="duplicate definition of symbol 'dot'"):
        load([code, code])
    with pytest.raises(UsageError, match="function 'nothing' cannot be loaded: Symbols not found"):
        load([code]).address("nothing")
    needy = compile_llvm(
        "declare void @no_such_function()\ndefine void @f() {\ncall void @no_such_function()\nret void }", host_target()
    )
    with pytest.raises(UsageError, match="function 'f' cannot be loaded"):
        load([needy]).address("f")


def test_code_may_call_functions_of_the_process() -> None:
    code = compile_llvm(
        "declare double @cos(double)\ndefine double @f(double %x) {\n%y = call double @cos(double %x)\nret double %y }",
        host_target(),
    )
    library = load([code])
    f = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)(library.address("f"))
    assert f(1.0) == np.cos(1.0)


def test_loaded_libraries_do_not_disturb_interpreter_exit() -> None:
    script = "from kernelforge_cpu.jit import *\nfrom kernelforge_cpu.isa import host_target\n"
    script += "keep = [load([compile_llvm('define void @f() { ret void }', host_target())]) for _ in range(3)]\n"
    script += "[k.address('f') for k in keep]; print('done')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_library_goes_without_waiting_for_who_compiles() -> None:
    """It may be garbage that a thread collects while the one that compiles waits for that thread."""
    library = load([compile_llvm("define void @f() { ret void }", host_target())])
    known = weakref.ref(library._tracker)
    compiling, done = threading.Event(), threading.Event()

    def compile_long() -> None:
        with _LOCK:
            compiling.set()
            done.wait(60)

    other = threading.Thread(target=compile_long)
    other.start()
    compiling.wait(60)
    collector = threading.Thread(target=lambda kept: kept.clear(), args=([library],))
    del library
    collector.start()
    collector.join(10)
    waits = collector.is_alive()
    assert known() is not None, "LLVM was called beside another thread"
    done.set()
    other.join(60)
    assert not waits
    load([compile_llvm("define void @g() { ret void }", host_target())])
    assert known() is None


def test_respelling_of_constants() -> None:
    newer = "store <2 x float> <float 1.100000e+00, float -qnan>, ptr %1\n  %2 = fadd float %0, f0x3FB8AA3B\n"
    newer += "fadd half %1, +inf\nstore <2 x bfloat> splat (bfloat 1.101560e+00)\nfmul double %3, 1.100000e+00\n"
    newer += (
        "%float.1 = phi float [ 2.5e-01, %4 ], [ +snan(0x1), %5 ], [ +nan(0x1), %6 ]\ncall half @half.1(half f0x3C00)"
    )
    older = "store <2 x float> <float 0x3FF19999A0000000, float 0xFFF8000000000000>, ptr %1\n"
    older += "  %2 = fadd float %0, 0x3FF7154760000000\n"
    older += "fadd half %1, 0xH7C00\nstore <2 x bfloat> splat (bfloat 0xR3F8D)\nfmul double %3, 0x3FF199999999999A\n"
    older += "%float.1 = phi float [ 0x3FD0000000000000, %4 ], [ 0x7FF0000020000000, %5 ], [ 0x7FF8000020000000, %6 ]\n"
    older += "call half @half.1(half 0xH3C00)"
    assert respell(newer) == older
    assert respell(older) == older


def machine(arch: str, features: set[str], os: str = "linux") -> Machine:
    return Machine(os, arch, "a cpu", 4, 8, 0, 0, 0, 0, frozenset(features))


def test_levels_follow_the_machines_features() -> None:
    v2 = {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"}
    v3 = v2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    assert [level_of(machine("x86_64", f)) for f in (v2, v3 - {"fma"}, v3, v4 - {"avx512vl"}, v4)] == [
        *("x86-64-v2", "x86-64-v2", "x86-64-v3", "x86-64-v3", "x86-64-v4")
    ]
    assert level_of(machine("aarch64", set())) == "neoverse-n1"
    assert level_of(machine("aarch64", set(), "darwin")) == "apple-m1"
    with pytest.raises(UsageError, match=r"this CPU \(a cpu, x86-64\) is below every supported level") as caught:
        level_of(machine("x86_64", v2 - {"popcnt"}))
    assert "--target reference" in str(caught.value.hint)
    with pytest.raises(UsageError, match="below every supported level"):
        level_of(machine("riscv64", set()))
    assert {t.lanes for t in LEVELS.values()} == {4, 8, 16}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_compiles_whatever_another_thread_was_at_when_it_was_forked() -> None:
    """Locks inside of MLIR and LLVM that the other thread held would be held in the child for ever."""
    text, host, stop = dot(host_target()), host_target(), threading.Event()

    def compile_on() -> None:
        while not stop.is_set():
            load([compile_object(text)]).address("dot")

    other = threading.Thread(target=compile_on)
    other.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(20)
                    status = 0 if load([compile_object(text, cpu=host)]).address("dot") else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        other.join()
