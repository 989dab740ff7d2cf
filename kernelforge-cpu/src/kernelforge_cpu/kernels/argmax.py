"""argmax over the last axis with numpy's rules: the lowest index among equals, and the first NaN wins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_size, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import Tensor, emit_each_row, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

GRAIN = 65536
"""Elements below which another thread costs more than it saves."""

LOWEST, NAN = -(2**31), 2**31 - 1


def order_key(k: KernelBuilder, x: Value) -> Value:
    """i32 lanes that compare as f32 lanes do, with NaN above everything and -0 equal to 0."""
    bits = k.bitcast(x + 0.0, x.type.of("i32"))
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return k.select(x.ne(x), NAN, ordered)


def build_argmax(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    lanes, shape = k.lanes, problem.operand(0).shape
    n = emit_size(k, problem, size_of(shape[-1]))
    x, out = tensor(k, problem, 0), tensor(k, problem, 1)

    def row(_: Value, x: Pointer, out: Pointer) -> None:
        def step(i: Value, valid: Value | None, best: Value, at: Value) -> list[Value]:
            key = order_key(k, x.load_f32(i, lanes, valid=valid))
            if valid is not None:
                key = k.select(k.mask(valid, lanes), key, LOWEST)
            index = k.consts(range(lanes), "i32") + k.convert(i, "i32")
            better = key.gt(best)
            return [k.select(better, key, best), k.select(better, index, at)]

        start = [k.const(LOWEST, Lanes), k.const(0, Lanes)]
        best, at = k.vectorize(0, n, step, init=start)
        top = k.reduce_max(best)
        out.store(k.reduce_min(k.select(best.eq(top), at, NAN)))

    Lanes = k.consts(range(lanes), "i32").type
    rows = [Tensor(x.pointer, x.strides[:-1]), out]
    emit_each_row(k, problem, shape[:-1], rows, row)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text())
