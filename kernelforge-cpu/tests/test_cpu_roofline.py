"""The kernels that measure the processor's limits do all of the work that they are credited with."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace

import numpy as np
import pytest

from kernelforge.machine import probe
from kernelforge_cpu import roofline
from kernelforge_cpu.backend import CpuBackend
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import LEVELS, host_target
from kernelforge_cpu.jit import KERNEL, assembly
from kernelforge_cpu.objects import load_objects
from kernelforge_cpu.roofline import accumulators, dot_instruction, dot_kernel, multiplying_kernel, reading_kernel

VNNI = frozenset({"avx512_vnni", "asimddp"})


def run(kernel: KernelBuilder, source: np.ndarray[tuple[int], np.dtype[np.float32]], parts: int) -> list[float]:
    """Sums of the vectors that the parts write."""
    library = load_objects([kernel.text()])
    sums = np.full((parts, 16), np.nan, np.float32)
    buffers, dims = np.array([source.ctypes.data, sums.ctypes.data], np.uint64), np.array([source.size], np.int64)
    function = KERNEL(library.address(kernel.name))
    for part in range(parts):
        function(ctypes.c_void_p(buffers.ctypes.data), ctypes.c_void_p(dims.ctypes.data), part, parts)
    return [float(row[: host_target().lanes].sum()) for row in sums]


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_every_number_is_read_once(parts: int) -> None:
    source = np.arange(5 * 2048, dtype=np.float32) % 251  # sums stay exact in f32
    sums = run(reading_kernel(host_target()), source, parts)
    assert sum(sums) == source.sum(dtype=np.float64)
    assert len(set(map(int, sums))) == len(sums)  # each read a share of its own


def test_every_pass_multiplies_and_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PASSES", 10)
    lanes, count = host_target().lanes, accumulators(host_target())
    source = np.ones((2 + count, lanes), np.float32)
    source[0], source[1] = 2.0, 1.0
    (total,) = run(multiplying_kernel(host_target()), source.ravel(), 1)
    assert total == count * lanes * (2**10 * 2 - 1)  # x -> 2 x + 1, ten times from 1


@pytest.mark.parametrize(
    ("level", "features", "instruction"),
    [
        ("x86-64-v2", VNNI, "pmaddubsw"),
        ("x86-64-v3", VNNI, "vpmaddubsw"),
        ("x86-64-v4", frozenset(), "vpmaddubsw"),
        ("x86-64-v4", VNNI, "vpdpbusd"),
        ("neoverse-n1", VNNI, "sdot"),
        ("apple-m1", VNNI, "sdot"),
    ],
)
def test_the_loops_are_of_the_instructions_that_are_counted(
    level: str, features: frozenset[str], instruction: str
) -> None:
    target = LEVELS[level]
    dot = dot_instruction(target, features)
    assert dot is not None
    assert dot.lanes == target.lanes
    cpu = replace(target, features="+avx512vnni") if instruction == "vpdpbusd" else target
    found = re.findall(rf"^\t{instruction}\b", assembly(dot_kernel(target, dot).text(), cpu=cpu), re.MULTILINE)
    assert found
    assert len(found) % accumulators(target) == 0
    multiply = "fmla" if target.arch == "aarch64" else "vfmadd" if level != "x86-64-v2" else "mulps"
    text = assembly(multiplying_kernel(target).text(), cpu=target)
    assert len(re.findall(rf"^\t{multiply}", text, re.MULTILINE)) % accumulators(target) == 0
    assert multiply in text


def test_without_a_dot_instruction_there_is_none() -> None:
    assert dot_instruction(LEVELS["neoverse-n1"], frozenset()) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_host_is_measured(threads: int) -> None:
    device = CpuBackend().open(threads=threads)
    found = roofline.measure(device)
    assert found.thread is not None
    assert found.device.bytes_s >= found.thread.bytes_s
    assert found.device.flops >= found.thread.flops
    # No processor reads a terabyte or computes a hundred teraflops per second and core; none that runs this is below.
    assert 1e8 < found.thread.bytes_s < 1e12
    assert 1e8 < found.thread.flops < 1e12
    assert (found.device.int8_ops is None) == (dot_instruction(host_target(), probe().features) is None)
