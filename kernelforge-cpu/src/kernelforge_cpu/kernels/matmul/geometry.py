"""A matrix product as loops: batches, rows, and the offsets of every tensor along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_cpu.kernels.axes import ONE, ZERO, Axis, Size, loop_nest, row_major, strides_of

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType


@dataclass(frozen=True)
class Geometry:
    """act(lhs @ rhs + bias) + residual, or act(x @ gate) * (x @ up), as one matrix product per batch.

    Batches that share a right-hand side are merged into the rows where all strides allow it.
    """

    batches: tuple[Axis, ...]
    """Loops over the batches: strides of lhs, rhs, out and, if it is present, residual, in elements; that of a packed
    rhs in matrices."""
    rows: Axis
    """The rows of one batch, with the same strides."""
    inner: Dim
    columns: Dim
    inner_step: Size
    """From one column of lhs to the next, in elements."""
    rhs: tuple[int, ...]
    """Indices of the right-hand operands: one, or gate and up."""
    transpose_rhs: bool
    bias: int | None
    residual: int | None
    out: int
    """Index of the result's buffer: it follows the operands."""
    activation: str


LHS, RHS, OUT, RESIDUAL = range(4)
"""Positions in the strides of an `Axis` of a `Geometry`."""


def geometry(problem: Problem, *, packed: bool = True) -> Geometry:
    """The loops of a `transformer.matmul` or `transformer.glu_matmul`, rhs packed or as it is."""
    glu = problem.op.endswith(".glu_matmul")
    lhs, rhs, out = problem.operand(0), problem.operand(1), problem.results[0]
    transpose_lhs, transpose_rhs = not glu and bool(problem.attr("transpose_lhs")), bool(problem.attr("transpose_rhs"))
    *outer, row_step, inner_step = strides_of(lhs)
    inner = lhs.shape[-1]
    if transpose_lhs:
        row_step, inner_step, inner = inner_step, row_step, lhs.shape[-2]
    optional = {i: problem.operands[i] for i in (2, 3) if not glu and i < len(problem.operands)}
    residual = optional.get(3)
    matrices = row_major(rhs.shape[:-2]) if packed else strides_of(rhs)[:-2]
    steps = [
        (*outer, row_step),
        (*(matrices if rhs.rank > 2 else [ZERO] * len(outer)), ZERO),
        strides_of(out)[:-1],
        *([strides_of(residual)[:-1]] if residual is not None else []),
    ]
    batches = loop_nest(out.shape[:-1], *steps)
    rows = Axis(ONE, (ONE, ZERO, ONE, ONE)[: len(steps)])
    if batches and batches[-1].strides[RHS] == ZERO:
        rows = batches.pop()
    return Geometry(
        tuple(batches),
        rows,
        inner,
        out.shape[-1],
        inner_step,
        rhs=(1, 2) if glu else (1,),
        transpose_rhs=transpose_rhs,
        bias=2 if optional.get(2) is not None else None,
        residual=3 if residual is not None else None,
        out=len(problem.operands),
        activation=str(problem.attr("activation" if glu else "epilogue")),
    )


def tensors(problem: Problem) -> list[TensorType]:
    """Operands that are present, and results."""
    return [t for t in (*problem.operands, *problem.results) if t is not None]
