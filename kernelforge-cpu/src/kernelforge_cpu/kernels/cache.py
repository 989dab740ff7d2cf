"""kv_cache_update: new rows into their slots of a cache, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import ONE, emit_offsets, emit_rows, emit_size, loop_nest, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.emit import Value

GRAIN = 32768
"""Elements below which another thread costs more than it saves."""


def build_kv_cache_update(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
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
        with k.if_(at.ge(0)):
            source = new.pointer.at(token.i * emit_size(k, problem, new.strides[0]))
            slot_step, row_step = (emit_size(k, problem, s) for s in cache.strides[:2])
            result = cache.pointer.at(slot * slot_step + at * row_step)
            with k.for_(0, emit_rows(k, problem, nest)) as row:
                src, dst = emit_offsets(k, problem, nest, row.i, 2)

                def step(i: Value, valid: Value | None) -> None:
                    result.at(dst).store(source.at(src).load(i, k.lanes, valid=valid), i, valid=valid)

                k.vectorize(0, length, step)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text())
