"""embedding: rows of a table by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_size, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.emit import Value

GRAIN = 32768
"""Elements below which another thread costs more than it saves."""


def build_embedding(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    shape = problem.results[0].shape
    table, ids, out = (tensor(k, problem, i) for i in range(3))
    steps = [emit_size(k, problem, t.strides[0]) for t in (table, ids, out)]
    with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
        row = k.convert(ids.pointer.load(token.i * steps[1]), "i64")
        source, result = table.pointer.at(row * steps[0]), out.pointer.at(token.i * steps[2])

        def step(i: Value, valid: Value | None) -> None:
            result.store(source.load(i, k.lanes, valid=valid), i, valid=valid)

        k.vectorize(0, emit_size(k, problem, size_of(shape[1])), step)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text())
