"""The processor's limits: kernels that only read memory or only multiply and add, run by the team that runs all others."""

from __future__ import annotations

import time
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kernelforge.machine import probe
from kernelforge.roofline import Peaks, Roofline
from kernelforge_cpu.driver import StepTable
from kernelforge_cpu.emit import KernelBuilder, vec
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.objects import load_objects
from kernelforge_cpu.store import address, aligned_empty
from kernelforge_cpu.team import get_team

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.backend import Device
    from kernelforge_cpu.isa import CpuTarget
    from kernelforge_cpu.ssa import Value
    from kernelforge_cpu.store import Array
    from kernelforge_cpu.team import Team

BYTES = 1 << 27
"""Of the memory that is read, at least: four times the last-level cache where that is more."""
ROUNDS = 15
"""Neighbours can only slow a run down: the best of so many counts."""
PARTS = 16
"""Per thread, so that a slow core does less."""
PASSES = 100_000
"""Of an arithmetic loop, in one part: about half a millisecond."""
READING, MULTIPLYING, BYTEWISE = "roofline_read", "roofline_fma", "roofline_dot"

_STREAMS, _LOADS = 4, 8
"""Places that a part reads from in turn, and vectors read from each: one stream alone does not fill the memory's queues."""
_LINE = 64


def measure(device: Device) -> Roofline:
    """The host's limits with as many threads as `device` has, and with one: about a second."""
    target = host_target()
    kernels = [reading_kernel(target), multiplying_kernel(target)]
    dot = dot_instruction(target, probe().features)
    if dot is not None:
        kernels.append(dot_kernel(target, dot))
    library = load_objects([k.text() for k in kernels])
    source = aligned_empty(max(BYTES, 4 * probe().l3_bytes))
    source.view(np.float32)[:] = 0.5  # products stay normal numbers
    addresses = {k.name: library.address(k.name) for k in kernels}

    def peaks(team: Team) -> Peaks:
        parts = PARTS * team.threads
        vectors = parts * PASSES
        seconds = {name: _best(team, function, source, parts) for name, function in addresses.items()}
        fma = 2 * accumulators(target) * target.lanes * vectors / seconds[MULTIPLYING]
        int8 = None if dot is None else 2 * accumulators(target) * 4 * dot.lanes * vectors / seconds[BYTEWISE]
        return Peaks(source.nbytes / seconds[READING], fma, int8)

    alone = peaks(get_team(1))
    return Roofline(alone if device.info.threads == 1 else _best_of(alone, peaks(get_team(device.info.threads))), alone)


def _best_of(one: Peaks, other: Peaks) -> Peaks:
    """A team can do at least what one of it can, also where others kept it from showing that."""
    int8 = None if one.int8_ops is None or other.int8_ops is None else max(one.int8_ops, other.int8_ops)
    return Peaks(max(one.bytes_s, other.bytes_s), max(one.flops, other.flops), int8)


def _best(team: Team, function: int, source: Array, parts: int) -> float:
    """Seconds of the fastest of some runs."""
    sums = aligned_empty(_LINE * parts)
    pointers = np.array([address(source), address(sums)], np.uint64)
    table = StepTable([function], [0], pointers, [0], np.array([source.nbytes // 4], np.int64), [True], (source, sums))
    table.set_parts(0, parts)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        team.run(table)
        times.append(time.perf_counter() - start)
    return min(times)


def accumulators(target: CpuTarget) -> int:
    """Independent sums: enough to hide the latency of an addition, few enough for the registers."""
    return 24 if target.arch == "aarch64" or target.level == "x86-64-v4" else 12


def reading_kernel(target: CpuTarget) -> KernelBuilder:
    """Adds up the f32 numbers of buffer 0, as many as dim 0 says (a multiple of 2048), to a vector a part in buffer 1."""
    k = KernelBuilder(READING, target)
    source, step = k.buffer(0, "f32"), _LOADS * k.lanes
    lo, hi = k.share(k.dim(0), _STREAMS * step)
    stretch = (hi - lo) // _STREAMS
    starts = [source.at(lo + stretch * i) for i in range(_STREAMS)]
    with k.for_(0, stretch, step, [k.f32(0.0, k.lanes)] * _LOADS) as loop:
        sums = list(loop.values)
        for start in starts:
            here = start.at(loop.i)
            sums = [s + here.load(i * k.lanes, k.lanes) for i, s in enumerate(sums)]
        loop.yield_(*sums)
    _finish(k, loop.results)
    return k


def multiplying_kernel(target: CpuTarget) -> KernelBuilder:
    """PASSES times a fused multiply-add of each accumulator, from the numbers in buffer 0."""
    k = KernelBuilder(MULTIPLYING, target)
    factor, addend = (k.buffer(0, "f32").load(i * k.lanes, k.lanes) for i in (0, 1))
    init = [k.buffer(0, "f32").load((2 + i) * k.lanes, k.lanes) for i in range(accumulators(target))]
    with k.for_(0, PASSES, 1, init) as loop:
        loop.yield_(*(k.fma(v, factor, addend) for v in loop.values))
    _finish(k, loop.results)
    return k


class Dot(NamedTuple):
    """An instruction that multiplies bytes and adds neighbours."""

    intrinsic: str
    lanes: int
    """32-bit lanes of its operands."""
    accumulates: bool
    """It also adds to 32-bit sums; otherwise it gives 16-bit sums of two products."""


def dot_instruction(target: CpuTarget, features: frozenset[str]) -> Dot | None:
    """The widest there is for kernels of `target` on a CPU with `features`."""
    if target.arch == "aarch64":
        return Dot("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, True) if "asimddp" in features else None
    if target.level == "x86-64-v4":
        if "avx512_vnni" in features:
            return Dot("llvm.x86.avx512.vpdpbusd.512", 16, True)
        return Dot("llvm.x86.avx512.pmaddubs.w.512", 16, False)
    if target.level == "x86-64-v3":
        return Dot("llvm.x86.avx2.pmadd.ub.sw", 8, False)
    return Dot("llvm.x86.ssse3.pmadd.ub.sw.128", 4, False)


def dot_kernel(target: CpuTarget, dot: Dot) -> KernelBuilder:
    """PASSES times `dot` for each accumulator."""
    k = KernelBuilder(BYTEWISE, target)
    words, octets, halves = (vec(n * dot.lanes, t) for n, t in ((1, "i32"), (4, "i8"), (2, "i16")))
    source = k.buffer(0, "i32")
    left, right = (source.load(i * dot.lanes, dot.lanes) for i in (0, 1))
    init = [source.load((2 + i) * dot.lanes, dot.lanes) for i in range(accumulators(target))]

    def once(value: Value) -> Value:
        if dot.accumulates:
            return k.intrinsic(dot.intrinsic, words, value, k.bitcast(left, octets), k.bitcast(right, octets))
        made = k.intrinsic(dot.intrinsic, halves, k.bitcast(value, octets), k.bitcast(right, octets))
        return k.bitcast(made, words)

    with k.for_(0, PASSES, 1, init) as loop:
        loop.yield_(*(once(v) for v in loop.values))
    _finish(k, [k.bitcast(v, vec(dot.lanes)) for v in loop.results])
    return k


def _finish(k: KernelBuilder, values: Sequence[Value]) -> None:
    """Writes what was computed, so that it is computed."""
    total = reduce(lambda a, b: a + b, values)
    k.buffer(1, "f32").store(total, k.part * (_LINE // 4))
