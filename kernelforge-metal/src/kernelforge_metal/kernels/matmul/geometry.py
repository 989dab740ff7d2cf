"""A matrix product as kernels see it: batches, rows, columns, and where each element is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from kernelforge_metal.kernel import Size

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType


@dataclass(frozen=True)
class Axis:
    """A loop over rows or batches."""

    extents: tuple[Dim, ...]
    """Its length is their product."""
    lhs: int
    """From one step to the next in lhs, in elements; so for the others."""
    rhs: int
    out: int
    residual: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.lhs, self.rhs, self.out, self.residual


ONE = Axis((1,), 0, 0, 0, 0)


@dataclass(frozen=True)
class Product:
    """act(lhs @ rhs + bias) + residual, or act(x @ gate) * (x @ up), of rows that may be RMS-normalised first."""

    problem: Problem
    batches: tuple[Axis, ...]
    """Loops around a matrix product, merged as far as strides allow."""
    rows: Axis
    columns: int
    inner: int
    lhs_inner: int
    """From one column of lhs to the next."""
    rhs_inner: int
    """From one step of the inner dimension to the next in an rhs that is not packed."""
    rhs_columns: int
    rhs: tuple[int, ...]
    """Indices of the right-hand operands: one, or gate and up."""
    transpose_rhs: bool
    bias: int | None
    residual: int | None
    activation: str
    gain: int | None = None
    """Index of what the normalised rows of lhs are multiplied by, None where lhs is taken as it is."""

    @property
    def out(self) -> int:
        return len(self.problem.operands)

    @property
    def static_rows(self) -> int | None:
        extents = [e for e in self.rows.extents if isinstance(e, int)]
        return prod(extents) if len(extents) == len(self.rows.extents) else None


def product_of(problem: Problem) -> Product:
    """Raises UsageError where strides depend on a dynamic dimension, or sizes of the matrix itself are dynamic."""
    first, *_ = rhs_of(problem)
    glu, normed = is_gated(problem), first == 2
    lhs, rhs, out = problem.operand(0), problem.operand(first), problem.results[0]
    transpose_lhs = bool(dict(problem.attrs).get("transpose_lhs", False))
    transpose_rhs = bool(problem.attr("transpose_rhs"))
    *outer, row_step, inner_step = lhs.element_strides()
    inner = lhs.shape[-1]
    if transpose_lhs:
        row_step, inner_step, inner = inner_step, row_step, lhs.shape[-2]
    *matrices, rhs_rows, rhs_columns = _strides(rhs)
    if transpose_rhs:
        rhs_rows, rhs_columns = rhs_columns, rhs_rows
    bias, residual = (None, None) if glu else (*problem.operands, None, None)[first + 1 : first + 3]
    across = matrices if rhs.rank > 2 else [0] * len(outer)
    steps = zip(
        (*outer, row_step),
        (*across, 0),
        out.element_strides()[:-1],
        residual.element_strides()[:-1] if residual is not None else [0] * (out.rank - 1),
        strict=True,
    )
    axes: list[Axis] = []
    for extent, (a, b, c, d) in zip(out.shape[:-1], steps, strict=True):
        axis = Axis((extent,), a, b, c, d)
        if axes and (merged := _merged(axes[-1], axis)) is not None:
            axes[-1] = merged
        else:
            axes.append(axis)
    axes = [a for a in axes if a.extents != (1,)] or [ONE]
    rows = axes.pop() if axes[-1].rhs == 0 else ONE
    return Product(
        problem,
        tuple(axes),
        rows,
        _static(out.shape[-1]),
        _static(inner),
        inner_step,
        rhs_rows,
        rhs_columns,
        rhs=rhs_of(problem),
        transpose_rhs=transpose_rhs,
        bias=first + 1 if bias is not None else None,
        residual=first + 2 if residual is not None else None,
        activation=str(problem.attr("activation" if glu else "epilogue")),
        gain=1 if normed else None,
    )


def is_gated(problem: Problem) -> bool:
    return problem.op.endswith("glu_matmul")


def rhs_of(problem: Problem) -> tuple[int, ...]:
    """The indices of the right-hand sides: they follow lhs, and the gain of its norm."""
    first = 2 if ".rms_norm_" in problem.op else 1
    return (first, first + 1) if is_gated(problem) else (first,)


def _strides(t: TensorType) -> tuple[int, ...]:
    """Of a quantised tensor, those it would have as floats."""
    return t.element_strides()


def _static(dim: Dim) -> int:
    from kernelforge.errors import UsageError

    if isinstance(dim, str):
        raise UsageError("the columns and the inner dimension must be known")
    return dim


def _merged(outer: Axis, inner: Axis) -> Axis | None:
    """One axis for both, if every tensor's steps allow it."""
    if outer.extents == (1,):
        return inner
    if inner.extents == (1,):
        return outer
    if not all(isinstance(e, int) for e in inner.extents):
        return None
    n = prod(e for e in inner.extents if isinstance(e, int))
    if any(a != b * n for a, b in zip(outer.strides, inner.strides, strict=True)):
        return None
    return Axis((*outer.extents, *inner.extents), *inner.strides)


def count_text(axis: Axis, problem: Problem) -> str:
    """The length of an axis as WGSL."""
    number = prod(e for e in axis.extents if isinstance(e, int))
    names = [f"p.d{problem.dims.index(e)}" for e in axis.extents if isinstance(e, str)]
    return " * ".join([*names, *([f"{number}u"] if number != 1 or not names else [])])


def count_of(axis: Axis, problem: Problem) -> Size:
    """The length of an axis as a `Size`."""
    number = prod(e for e in axis.extents if isinstance(e, int))
    names = [problem.dims.index(e) for e in axis.extents if isinstance(e, str)]
    if not names:
        return number

    def count(dims: Sequence[int]) -> int:
        return number * prod(dims[i] for i in names)

    return count
