"""The packed layout of a right-hand side: column panels [..., ceil(N / width)][K][width], zeros after the last column.

A kernel reads `width` columns of one row of the matrix with a few vector loads, and a whole panel as one stream,
whatever the number of rows of the left-hand side: matrix-vector and matrix-matrix kernels share a packed weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.kernel import Pack
from kernelforge_cpu.kernels.axes import ONE, emit_offsets, emit_rows, emit_size, loop_nest, strides_of

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value
    from kernelforge_cpu.kernel import Array

ROWS_AT_ONCE = 256
"""Rows of a panel that are packed at a time, so that what is read and what is written both stay in cache."""


def panel_pack(width: int, dtype: str, transposed: bool) -> Pack:
    """The layout of a constant of shape [..., K, N] ([..., N, K] if transposed)."""
    key = f"panel{width}{'t' if transposed else ''}:{dtype}"
    return Pack(key, lambda array: pack_panels(array.swapaxes(-1, -2) if transposed else array, width))


def pack_panels(matrix: Array, width: int) -> Array:
    """[..., K, N] to [..., ceil(N / width), K, width], same dtype, 64-byte aligned."""
    from kernelforge_cpu.store import aligned_zeros

    *outer, rows, columns = matrix.shape
    shape = (*outer, -(-columns // width), rows, width)
    size = matrix.dtype.itemsize
    for extent in shape:
        size *= extent
    packed: Array = aligned_zeros(size).view(matrix.dtype).reshape(shape)
    for panel in range(shape[-3]):
        source = matrix[..., panel * width : (panel + 1) * width]
        for row in range(0, rows, ROWS_AT_ONCE):
            block = source[..., row : row + ROWS_AT_ONCE, :]
            packed[..., panel, row : row + ROWS_AT_ONCE, : source.shape[-1]] = block
    return packed


def emit_pack(k: KernelBuilder, problem: Problem, index: int, transposed: bool, width: int, packed: Pointer) -> None:
    """This part's share of packing operand `index` at run time. Its shape is static but for the batches."""
    t = problem.operand(index)
    *outer, row_step, column_step = strides_of(t)
    rows, columns = t.shape[-2:]
    if transposed:
        row_step, column_step, rows, columns = column_step, row_step, columns, rows
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    if not columns:
        return
    panels = -(-columns // width)
    nest = loop_nest(t.shape[:-2], outer)
    source = k.buffer(index, t.dtype)
    down, right = emit_size(k, problem, row_step), emit_size(k, problem, column_step)
    with k.for_(*k.share(emit_rows(k, problem, nest) * panels)) as unit:
        batch = k.binary("divu", unit.i, k.i64(panels))
        column = (unit.i - batch * panels) * width
        (offset,) = emit_offsets(k, problem, nest, batch, 1)
        src, dst = source.at(offset).at(column * right), packed.at(unit.i * (rows * width))
        valid = k.min(columns - column, width)
        if column_step == ONE:
            _emit_rows(k, src, down, dst, rows, width, valid if columns % width else None)
        else:
            _emit_columns(k, src, down, right, dst, rows, width, valid)


def _emit_rows(
    k: KernelBuilder, src: Pointer, down: Value, dst: Pointer, rows: int, width: int, valid: Value | None
) -> None:
    """Rows that are contiguous: vector copies; `valid` columns where the panel may not be full."""
    with k.for_(0, rows) as row:
        line, packed = src.at(row.i * down), dst.at(row.i * width)
        for first in range(0, width, k.lanes):
            packed.store(line.load(first, k.lanes, valid=None if valid is None else valid - first), first)


def _emit_columns(
    k: KernelBuilder, src: Pointer, down: Value, right: Value, dst: Pointer, rows: int, width: int, valid: Value
) -> None:
    """Any strides: one element at a time."""
    with k.for_(0, rows) as row:
        line, packed = src.at(row.i * down), dst.at(row.i * width)
        with k.for_(0, valid) as column:
            packed.store(line.load(column.i * right), column.i)
        with k.for_(valid, width) as column:
            packed.store(0, column.i)
