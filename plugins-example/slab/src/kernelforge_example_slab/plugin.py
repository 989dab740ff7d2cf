"""A kernel for `transformer.matmul` on the target `cpu`: slabs of columns, shared by the threads."""

from __future__ import annotations

from typing import Any

from kernelforge.hookspecs import hookimpl
from kernelforge.problem import Problem
from kernelforge.variant import Accept, DeviceInfo, KernelVariant, Reject, Verdict
from kernelforge_cpu.authoring import kernel


def matrices(problem: Problem, device: DeviceInfo) -> Verdict:
    lhs, rhs, *rest = problem.operands
    if rest != [None, None]:
        return Reject("takes neither bias nor residual")
    if lhs is None or rhs is None or (lhs.rank, rhs.rank) != (2, 2):
        return Reject("takes two matrices")
    return Accept()


@kernel(
    op="transformer.matmul",
    dtypes=("f32",),
    language="numba",
    attrs={"transpose_lhs": False, "transpose_rhs": False, "epilogue": "none"},
    supports=matrices,
    space={"width": (256, 64, 1024)},
    priority=-10,
)
def slab(lhs: Any, rhs: Any, bias: Any, residual: Any, out: Any, part: int, parts: int, width: int) -> None:
    """numba, slabs of columns of a width that is tuned"""
    rows, columns = out.shape
    for left in range(part * width, columns, parts * width):
        right = min(left + width, columns)
        for i in range(rows):
            for j in range(left, right):
                out[i, j] = 0.0
            for k in range(lhs.shape[1]):
                factor = lhs[i, k]
                for j in range(left, right):
                    out[i, j] += factor * rhs[k, j]


@hookimpl
def kernelforge_kernels() -> list[KernelVariant]:
    return [slab]
