"""`blocked` and `parallel`: matmul of f32 tensors of any shape and layout, compiled by numba."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase, one_part
from kernelforge_cpu.kernels.axes import ZERO, Size, size_of, strides_of
from kernelforge_cpu.kernels.matmul.geometry import geometry, tensors

if TYPE_CHECKING:
    from kernelforge.problem import Problem, TensorType
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.kernel import Array, Count

PART_FLOPS = 200_000
"""Work below which a part costs more than it saves."""
PARTS_PER_THREAD = 4


def takes_f32(problem: Problem, device: DeviceInfo) -> Verdict:
    for t in tensors(problem):
        if t.dtype != "f32":
            return Reject(f"takes f32, not {t.dtype}")
    return Accept()


def block_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`mc` rows of lhs pass through a block of `kc` rows and `nc` columns of rhs."""
    return ConfigSpace((("mc", (32, 64, 128)), ("kc", (256, 128, 512)), ("nc", (256, 128, 512))))


def build_blocked(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _kernel(problem, config, one_part)


def build_parallel(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    work = size_of(2, *problem.results[0].shape, geometry(problem).inner)

    def parts(dims: Sequence[int], threads: int) -> int:
        flops = work.evaluate(dict(zip(problem.dims, dims, strict=True)))
        return max(1, min(PARTS_PER_THREAD * threads, flops // PART_FLOPS))

    return _kernel(problem, config, parts)


def _kernel(problem: Problem, config: Config, parts: Count) -> NativeKernel:
    from kernelforge_cpu.kernels.matmul.numba_gemm import compiled_kernel

    compiled = compiled_kernel()
    return NativeKernel((Phase(compiled.address, parts),), tables=(_table(problem, config),), keep=compiled)


def _table(problem: Problem, config: Config) -> Array:
    """int64: the number of dynamic dimensions, then each size as a number and the powers of those dimensions."""
    import numpy as np

    def entry(size: Size) -> list[int]:
        return [size.number, *(size.names.count(name) for name in problem.dims)]

    return np.array([len(problem.dims), *(n for size in _sizes(problem, config) for n in entry(size))], np.int64)


def _sizes(problem: Problem, config: Config) -> Iterator[Size]:
    """In the order in which the compiled kernel reads them."""
    g = geometry(problem, packed=False)
    down, right = strides_of(problem.operand(1))[-2:]
    if g.transpose_rhs:
        down, right = right, down

    def last(t: TensorType | None) -> Size:
        return ZERO if t is None else strides_of(t)[-1]

    bias, residual = problem.operands[2:]
    yield from (Size(int(config[name])) for name in ("mc", "kc", "nc"))
    yield from (size_of(g.inner), size_of(g.columns), g.inner_step, down, right)
    yield from (last(bias), last(problem.results[0]), last(residual))
    yield from (Size(("none", "silu", "gelu", "gelu_tanh").index(g.activation)), Size(len(g.batches)))
    for axis in (g.rows, *g.batches):
        yield from (axis.extent, *axis.strides, *[ZERO] * (4 - len(axis.strides)))
