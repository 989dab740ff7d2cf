"""kv_cache_update: new rows into their slots of a cache, in place. One that is for a place outside goes nowhere."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP, QUANTISED
from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import (
    ONE,
    emit_inside,
    emit_offsets,
    emit_rows,
    emit_size,
    loop_nest,
    shared,
    size_of,
)
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import takes_rows, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem, TensorType
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

GRAIN = 32768
"""Elements below which another thread costs more than it saves."""


def as_plain(problem: Problem) -> Problem:
    """The problem with f32 in place of q8: what a kernel that takes both must check besides."""

    def plain(t: TensorType | None) -> TensorType | None:
        return replace(t, dtype="f32") if t is not None and t.dtype == "q8" else t

    operands = tuple(map(plain, problem.operands))
    results = tuple(replace(t, dtype="f32") if t.dtype == "q8" else t for t in problem.results)
    return replace(problem, operands=operands, results=results)


def takes_cache(cache: TensorType) -> Verdict:
    if cache.quantised and not all(isinstance(d, int) for d in cache.shape[2:]):
        return Reject("takes a quantised cache with a static number of heads and head size")
    return Accept()


def takes_kv_cache_update(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_cache(problem.operand(0))
    return verdict if isinstance(verdict, Reject) else takes_rows(as_plain(problem), device)


def build_kv_cache_update(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    if problem.operand(0).quantised:
        return _build_quantised(problem, config, device)
    k = new_kernel(problem, config, device)
    shape = problem.operand(1).shape
    cache, new, positions, slots = (tensor(k, problem, i) for i in range(4))
    # Heads and their elements: one axis if both sides are packed.
    nest = loop_nest(shape[1:], new.strides[1:], cache.strides[2:])
    inner = nest.pop().extent if nest and nest[-1].strides == (ONE, ONE) else ONE
    length = emit_size(k, problem, inner)
    with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
        at, slot = (
            k.convert(t.pointer.load(token.i * emit_size(k, problem, t.strides[0])), "i64") for t in (positions, slots)
        )
        slot_count, capacity = (emit_size(k, problem, size_of(d)) for d in problem.operand(0).shape[:2])
        with k.if_(emit_inside(at, capacity) & emit_inside(slot, slot_count)):
            source = new.pointer.at(token.i * emit_size(k, problem, new.strides[0]))
            slot_step, row_step = (emit_size(k, problem, s) for s in cache.strides[:2])
            result = cache.pointer.at(slot * slot_step + at * row_step)
            with k.for_(0, emit_rows(k, problem, nest)) as row:
                src, dst = emit_offsets(k, problem, nest, row.i, 2)

                def step(i: Value, valid: Value | None) -> None:
                    result.at(dst).store(source.at(src).load(i, k.lanes, valid=valid), i, valid=valid)

                k.vectorize(0, length, step)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text())


def _build_quantised(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """Into a q8 cache: groups as `kernelforge.quant.quantize` makes them, bit by bit."""
    k = new_kernel(problem, config, device)
    cache_type, shape = problem.operand(0), problem.operand(1).shape
    heads, size = (int(n) for n in shape[1:])
    new, positions, slots = (tensor(k, problem, i) for i in (1, 2, 3))
    steps = [emit_size(k, problem, s) for s in new.strides]
    row_bytes = cache_type.bytes_of(heads * size)
    slot_count, capacity = (emit_size(k, problem, size_of(d)) for d in cache_type.shape[:2])
    with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
        at, slot = (
            k.convert(t.pointer.load(token.i * emit_size(k, problem, t.strides[0])), "i64") for t in (positions, slots)
        )
        with k.if_(emit_inside(at, capacity) & emit_inside(slot, slot_count)):
            row = k.buffer(0, "i8").at((slot * capacity + at) * row_bytes)
            emit_quantised(k, new.pointer.at(token.i * steps[0]), row, heads, steps[1], size)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text())


def emit_quantised(k: KernelBuilder, source: Pointer, row: Pointer, heads: int, step: Value, size: int) -> None:
    """Heads of `size` elements, `step` elements apart, as a row of a q8 cache, counted in bytes."""
    with k.for_(0, heads) as head, k.for_(0, size // GROUP) as group:
        start = source.at(head.i * step).at(group.i * GROUP)
        _emit_group(k, start, row.at((head.i * (size // GROUP) + group.i) * QUANTISED["q8"]))


def _emit_group(k: KernelBuilder, source: Pointer, to: Pointer) -> None:
    """The largest magnitude becomes 127; halves are rounded away from zero. NaN or infinity spoil the scale, and so the
    group."""
    lanes = min(k.lanes, 16)
    x = [source.load_f32(i, lanes) for i in range(0, GROUP, lanes)]
    largest, odd = k.abs(x[0]), x[0] * 0.0
    for part in x[1:]:
        largest, odd = k.max(k.abs(part), largest), odd + part * 0.0
    scale = k.reduce_max(largest) / 127.0
    inverse = 1.0 / scale
    inverse = k.broadcast(k.select(inverse.lt(float("inf")), inverse, 0.0), lanes)
    spoilt = k.reduce_add(odd)
    to.of("f16").store(k.convert(k.select(spoilt.eq(0.0), scale, spoilt), "f16"), align=1)
    for i, part in zip(range(0, GROUP, lanes), x, strict=True):
        scaled = part * inverse
        whole = k.unary("trunc", scaled)
        away = k.select(k.abs(scaled - whole).ge(0.5), k.select(scaled.lt(0.0), k.f32(-1.0, lanes), 1.0), 0.0)
        to.store(k.convert(k.convert(whole + away, "i32"), "i8"), 2 + i)
