"""rms_norm, layer_norm, add_rms_norm and softmax over the last axis, a row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge.variant import Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_size, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.quantize import GROUP_BYTES, emit_group
from kernelforge_cpu.kernels.strided import Tensor, emit_each_row, takes_rows, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

GRAIN = 16384
"""Elements below which another thread costs more than it saves."""

CHAINS = 4
"""Vectors of partial sums: enough to hide the latency of an addition, and they halve the rounding error twice over."""


def row_kernel(
    problem: Problem, config: Config, device: DeviceInfo, rowwise: tuple[int, ...], body: Callable[..., None]
) -> NativeKernel:
    """The kernel that calls `body(builder, row length, *row addresses of the tensors in `rowwise`)` for every row."""
    k = new_kernel(problem, config, device)
    shape = problem.operand(0).shape

    def text() -> str:
        n = emit_size(k, problem, size_of(shape[-1]))
        rows = [Tensor(t.pointer, t.strides[:-1]) for t in (tensor(k, problem, i) for i in rowwise)]
        emit_each_row(k, problem, shape[:-1], rows, lambda _, *pointers: body(k, n, *pointers))
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), text)


def emit_fold(
    k: KernelBuilder, n: Value, start: float, step: Callable[..., Value], combine: Callable[[Value, Value], Value]
) -> Value:
    """A vector of partial results: `acc = step(acc, i, valid)` over 0..n in `CHAINS` independent chains, joined by `combine`."""
    block = CHAINS * k.lanes
    init = [k.f32(start, k.lanes)] * CHAINS
    end = (n // block) * block
    with k.for_(0, end, block, init) as loop:
        loop.yield_(*(step(acc, loop.i + j * k.lanes, None) for j, acc in enumerate(loop.values)))
    total, *others = loop.results
    (total,) = k.vectorize(end, n, lambda i, valid, acc: [step(acc, i, valid)], init=[total])
    for other in others:
        total = combine(total, other)
    return total


def emit_sum(k: KernelBuilder, n: Value, step: Callable[..., Value]) -> Value:
    return k.reduce_add(emit_fold(k, n, 0.0, step, lambda a, b: a + b))


def emit_rms(k: KernelBuilder, n: Value, eps: float, row: Pointer) -> Value:
    """1 / sqrt(mean(row^2) + eps)."""

    def step(acc: Value, i: Value, valid: Value | None) -> Value:
        x = row.load_f32(i, k.lanes, valid=valid)
        return k.fma(x, x, acc)

    return emit_inverse_root(k, emit_sum(k, n, step), n, eps)


def emit_inverse_root(k: KernelBuilder, total: Value, n: Value, eps: float) -> Value:
    return 1.0 / k.sqrt(total / k.convert(n, "f32") + eps)


def epsilon(problem: Problem) -> float:
    eps = problem.attr("eps")
    assert isinstance(eps, float)
    return eps


def build_rms_norm(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    def row(k: KernelBuilder, n: Value, x: Pointer, out: Pointer) -> None:
        weight = k.buffer(1, problem.operand(1).dtype)
        scale = emit_rms(k, n, epsilon(problem), x)

        def write(i: Value, valid: Value | None) -> None:
            x_i = x.load_f32(i, k.lanes, valid=valid)
            out.store(x_i * scale * weight.load_f32(i, k.lanes, valid=valid), i, valid=valid)

        k.vectorize(0, n, write)

    return row_kernel(problem, config, device, (0, 2), row)


def takes_rms_norm_quantize(problem: Problem, device: DeviceInfo) -> Verdict:
    return takes_rows(replace(problem, results=()), device)


def build_rms_norm_quantize(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)

    def text() -> str:
        x, shape = tensor(k, problem, 0), problem.operand(0).shape
        weight, out, columns = k.buffer(1, problem.operand(1).dtype), k.buffer(2, "i8"), int(shape[-1])

        def row(index: Value, source: Pointer) -> None:
            scale = emit_rms(k, k.i64(columns), epsilon(problem), source)
            own = out.at(index * (columns // GROUP * GROUP_BYTES))
            with k.for_(0, columns // GROUP) as group:
                start, factors = source.at(group.i * GROUP), weight.at(group.i * GROUP)

                def load(i: int) -> Value:
                    return start.load_f32(i, k.lanes) * scale * factors.load_f32(i, k.lanes)

                emit_group(k, own.at(group.i * GROUP_BYTES), load)

        emit_each_row(k, problem, shape[:-1], [Tensor(x.pointer, x.strides[:-1])], row)
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*problem.operand(0).shape), GRAIN)),), text)


def build_add_rms_norm(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    def row(k: KernelBuilder, n: Value, x: Pointer, residual: Pointer, total: Pointer, norm: Pointer) -> None:
        weight = k.buffer(2, problem.operand(2).dtype)

        def add(acc: Value, i: Value, valid: Value | None) -> Value:
            s = x.load_f32(i, k.lanes, valid=valid) + residual.load_f32(i, k.lanes, valid=valid)
            total.store(s, i, valid=valid)
            return k.fma(s, s, acc)

        scale = emit_inverse_root(k, emit_sum(k, n, add), n, epsilon(problem))

        def write(i: Value, valid: Value | None) -> None:
            # From the operands again: the stored sum may have been rounded to 16 bits, the norm is that of the exact one.
            s = x.load_f32(i, k.lanes, valid=valid) + residual.load_f32(i, k.lanes, valid=valid)
            norm.store(s * scale * weight.load_f32(i, k.lanes, valid=valid), i, valid=valid)

        k.vectorize(0, n, write)

    return row_kernel(problem, config, device, (0, 1, 3, 4), row)


def build_layer_norm(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    biased = problem.operands[2] is not None

    def row(k: KernelBuilder, n: Value, x: Pointer, out: Pointer) -> None:
        weight = k.buffer(1, problem.operand(1).dtype)
        bias = k.buffer(2, problem.operand(2).dtype) if biased else None
        mean = emit_sum(k, n, lambda acc, i, valid: acc + x.load_f32(i, k.lanes, valid=valid)) / k.convert(n, "f32")

        def square(acc: Value, i: Value, valid: Value | None) -> Value:
            centred = x.load_f32(i, k.lanes, valid=valid) - mean
            if valid is not None:
                centred = k.select(k.mask(valid, k.lanes), centred, 0.0)
            return k.fma(centred, centred, acc)

        scale = emit_inverse_root(k, emit_sum(k, n, square), n, epsilon(problem))

        def write(i: Value, valid: Value | None) -> None:
            y = (x.load_f32(i, k.lanes, valid=valid) - mean) * scale * weight.load_f32(i, k.lanes, valid=valid)
            if bias is not None:
                y = y + bias.load_f32(i, k.lanes, valid=valid)
            out.store(y, i, valid=valid)

        k.vectorize(0, n, write)

    return row_kernel(problem, config, device, (0, 3), row)


def takes_softmax(problem: Problem, device: DeviceInfo) -> Verdict:
    axis, rank = problem.attr("axis"), problem.operand(0).rank
    if axis not in (-1, rank - 1):
        return Reject(f"works along the last axis, not along axis {axis} of {rank}")
    return takes_rows(problem, device)


def build_softmax(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.vmath import exp

    def row(k: KernelBuilder, n: Value, x: Pointer, out: Pointer) -> None:
        low = float("-inf")

        def larger(acc: Value, i: Value, valid: Value | None) -> Value:
            x_i = x.load_f32(i, k.lanes, valid=valid)
            if valid is not None:
                x_i = k.select(k.mask(valid, k.lanes), x_i, low)
            return k.max(x_i, acc)

        top = k.reduce_max(emit_fold(k, n, low, larger, k.max))

        def add(acc: Value, i: Value, valid: Value | None) -> Value:
            e = exp(k, x.load_f32(i, k.lanes, valid=valid) - top)
            return acc + (e if valid is None else k.select(k.mask(valid, k.lanes), e, 0.0))

        scale = 1.0 / emit_sum(k, n, add)

        def write(i: Value, valid: Value | None) -> None:
            # exp a second time: keeping the first one in the result would round it twice when that is a 16-bit type.
            out.store(exp(k, x.load_f32(i, k.lanes, valid=valid) - top) * scale, i, valid=valid)

        k.vectorize(0, n, write)

    return row_kernel(problem, config, device, (0, 1), row)
