"""The packed layout of a right-hand side: column panels [..., ceil(N / width)][K][width], zeros after the last column.

A kernel reads `width` columns of one row of the matrix with a few vector loads, and a whole panel as one stream,
whatever the number of rows of the left-hand side: matrix-vector and matrix-matrix kernels share a packed weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kernelforge_cpu.kernel import Pack
from kernelforge_cpu.kernels.axes import ONE, emit_offsets, emit_rows, emit_size, loop_nest, strides_of
from kernelforge_cpu.ssa import Type, Value, vec

if TYPE_CHECKING:
    from kernelforge.problem import Problem, TensorType
    from kernelforge_cpu.emit import Builder, KernelBuilder, Pointer
    from kernelforge_cpu.kernel import Array

Column = TypeVar("Column", int, Value)

UPPER = -1 << 16
"""The upper half of 32 bits."""


@dataclass(frozen=True)
class Panels:
    """Panels of `vectors` vectors of `lanes` columns, elements in the weight's own type."""

    vectors: int
    lanes: int
    dtype: str

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def interleaved(self) -> bool:
        """bf16 becomes f32 with one instruction when the columns of two vectors alternate: two of them are 32 bits, of which
        a shift leaves the first and a mask the second. The mask may go to any unit of a vector. Vectors of four lanes need no
        such order."""
        return self.dtype == "bf16" and self.vectors % 2 == 0 and self.lanes > 4

    def position(self, column: Column) -> Column:
        """Where a column's element is in a row of the panel."""
        if not self.interleaved:
            return column
        pair, second = column // (2 * self.lanes), column // self.lanes % 2
        return (pair * self.lanes + column % self.lanes) * 2 + second

    def name(self, transposed: bool) -> str:
        """The layout's, of a constant of shape [..., K, N] ([..., N, K] if transposed)."""
        order = f"w{self.lanes}" if self.interleaved else ""
        return f"panel{self.width}{order}{'t' if transposed else ''}:{self.dtype}"

    def pack(self, transposed: bool) -> Pack:
        """The layout of a constant of shape [..., K, N] ([..., N, K] if transposed)."""
        return Pack(
            self.name(transposed),
            lambda array: pack_panels(array if transposed else array.swapaxes(-1, -2), self),
            partial(self.nbytes, transposed),
        )

    def nbytes(self, transposed: bool, t: TensorType) -> int:
        """Of a packed constant of type `t`."""
        *outer, k, n = t.static_shape()
        if transposed:
            k, n = n, k
        return math.prod(outer) * -(-n // self.width) * k * self.width * t.itemsize


def pack_panels(columns: Array, panels: Panels) -> Array:
    """[..., N, K], the columns of a matrix, to [..., ceil(N / width), K, width] of the same dtype, 64-byte aligned."""
    import numpy as np

    from kernelforge_cpu.store import aligned_empty

    *outer, n, k = columns.shape
    shape = (*outer, -(-n // panels.width), k, panels.width)
    packed: Array = aligned_empty(int(np.prod(shape)) * columns.itemsize).view(columns.dtype).reshape(shape)
    order = np.argsort([panels.position(column) for column in range(panels.width)])
    for panel in range(shape[-3]):
        wanted = order + panel * panels.width
        there = wanted < n
        block = packed[..., panel, :, :]
        if not there.all():
            block[...] = 0
            block[..., there] = columns[..., wanted[there], :].swapaxes(-1, -2)
        elif panels.interleaved:
            block[...] = columns[..., wanted, :].swapaxes(-1, -2)
        else:
            block[...] = columns[..., wanted[0] : wanted[-1] + 1, :].swapaxes(-1, -2)
    return packed


def load_row(k: Builder, row: Pointer, panels: Panels) -> list[Value]:
    """The vectors of one row of a panel, as f32, columns in order."""
    lanes = panels.lanes
    if not panels.interleaved:
        return [row.load_f32(v * lanes, lanes) for v in range(panels.vectors)]
    found: list[Value] = []
    for first in range(0, panels.width, 2 * lanes):
        words = k.bitcast(row.load(first, 2 * lanes), Type("i32", lanes))
        found += [k.bitcast(half, vec(lanes)) for half in (words << 16, words & UPPER)]
    return found


def emit_pack(
    k: KernelBuilder, problem: Problem, index: int, transposed: bool, panels: Panels, packed: Pointer
) -> None:
    """This part's share of packing operand `index` at run time. Its shape is static but for the batches."""
    t = problem.operand(index)
    *outer, row_step, column_step = strides_of(t)
    rows, columns = t.shape[-2:]
    if transposed:
        row_step, column_step, rows, columns = column_step, row_step, columns, rows
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    width = panels.width
    count = -(-columns // width)
    if not count:
        return
    nest = loop_nest(t.shape[:-2], outer)
    source = k.buffer(index, t.dtype)
    down, right = emit_size(k, problem, row_step), emit_size(k, problem, column_step)
    with k.for_(*k.share(emit_rows(k, problem, nest) * count)) as unit:
        batch = k.binary("divu", unit.i, k.i64(count))
        column = (unit.i - batch * count) * width
        (offset,) = emit_offsets(k, problem, nest, batch, 1)
        src, dst = source.at(offset).at(column * right), packed.at(unit.i * (rows * width))
        valid = k.min(columns - column, width)
        with k.for_(0, rows) as row:
            line, panel = src.at(row.i * down), dst.at(row.i * width)
            if column_step == ONE and not panels.interleaved:
                for first in range(0, width, k.lanes):
                    part = None if columns % width == 0 else valid - first
                    panel.store(line.load(first, k.lanes, valid=part), first)
            else:
                with k.for_(0, valid) as own:
                    panel.store(line.load(own.i * right), panels.position(own.i))
                with k.for_(valid, width) as own:
                    panel.store(0, panels.position(own.i))
