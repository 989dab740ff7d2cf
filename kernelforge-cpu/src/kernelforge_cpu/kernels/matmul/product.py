"""The loops of a matrix product around its register tile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kernelforge_cpu.kernels.activation import activate
from kernelforge_cpu.kernels.axes import emit_offsets, emit_rows, emit_size
from kernelforge_cpu.kernels.matmul.config import static_rows
from kernelforge_cpu.kernels.matmul.geometry import LHS, OUT, RESIDUAL, RHS
from kernelforge_cpu.kernels.matmul.tile import emit_products
from kernelforge_cpu.kernels.matmul.vectorized import UNITS_PER_PART

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value
    from kernelforge_cpu.kernels.matmul.geometry import Geometry
    from kernelforge_cpu.kernels.matmul.tile import Tile

KEPT_FROM = 8
"""Full tiles of rows in a block from which on it pays to keep panels as f32: writing them costs half a tile."""


class Operands(NamedTuple):
    """Where the matrices of one batch are."""

    lhs: Pointer
    rhs: tuple[Pointer, ...]
    """Packed."""
    out: Pointer
    residual: Pointer | None


class Widened(NamedTuple):
    """Where the full tiles of rows of a block keep the panels of a tile as f32."""

    panels: tuple[Pointer, ...]
    first: Value
    """Whether the tile is the first of the block, which writes them; the others read them."""
    several: Value
    """Whether there are enough others."""


@dataclass(frozen=True)
class Product:
    """Writes the kernel.

    A unit of work is one block of rows times the columns of one tile; a part does a range of units, row block by row
    block. Within it: groups of tiles side by side, blocks of the inner dimension, tiles of rows, tiles of columns; so
    the panels of a group stay in L2 while the rows pass, and a tile's rows of lhs in L1 while its columns pass.
    """

    k: KernelBuilder
    problem: Problem
    g: Geometry
    tile: Tile
    kc: int
    """Inner block; sums of several are added up in the result."""
    group: int
    """Tiles side by side."""
    rhs: Sequence[Pointer]
    """Packed."""
    widen_once: bool = field(default=False, kw_only=True)
    """The first tile of rows keeps its panels as f32, and the other full tiles of the block read those."""

    @property
    def panels(self) -> int:
        """Of one right-hand side."""
        return -(-int(self.g.columns) // self.tile.width)

    @property
    def advance(self) -> int:
        """Panels of one right-hand side that a tile covers."""
        return max(1, self.tile.panels // len(self.rhs))

    @property
    def apart(self) -> bool:
        """Gate and up one after the other, each with all registers; their sums meet in memory."""
        return self.tile.panels < len(self.rhs)

    @property
    def steps(self) -> int:
        """Blocks of the inner dimension; at least one, which writes the epilogue of an empty sum."""
        return max(1, -(-int(self.g.inner) // self.kc))

    def emit(self) -> None:
        if not self.g.columns:
            return
        k, tile = self.k, self.tile
        rows, batches = emit_size(k, self.problem, self.g.rows.extent), emit_rows(k, self.problem, self.g.batches)
        # Few rows are shared out panel by panel, so that threads read the same amount of rhs.
        across = (
            k.i64(self.advance) if self.advance == 1 else k.select(rows.gt(tile.rows), k.i64(self.advance), k.i64(1))
        )
        columns = ceil_div(k, k.i64(self.panels), across)
        tiles = k.max(1, (rows + (tile.rows - 1)) // tile.rows)
        most = k.max(1, tiles // KEPT_FROM) if self.widen_once else tiles
        blocks = k.min(most, ceil_div(k, k.parts * UNITS_PER_PART, columns))
        height = ceil_div(k, tiles, blocks) * tile.rows
        blocks = ceil_div(k, tiles * tile.rows, height)
        lo, hi = k.share(batches * blocks * columns)
        with k.for_(k.binary("divu", lo, columns), ceil_div(k, hi, columns)) as loop:
            index = k.binary("divu", loop.i, blocks)
            row0 = (loop.i - index * blocks) * height
            done = loop.i * columns
            first = k.max(lo - done, 0) * across
            last = k.min(k.min(hi - done, columns) * across, self.panels)
            self.emit_block(self.operands(index), row0, k.min(row0 + height, rows), first, last)

    def operands(self, batch: Value) -> Operands:
        k, g = self.k, self.g
        offsets = emit_offsets(k, self.problem, g.batches, batch, len(g.rows.strides))
        matrix = self.panels * self.tile.width * int(g.inner)
        residual = None
        if g.residual is not None:
            residual = k.buffer(g.residual, self.problem.operand(g.residual).dtype).at(offsets[RESIDUAL])
        return Operands(
            k.buffer(0, self.problem.operand(0).dtype).at(offsets[LHS]),
            tuple(p.at(offsets[RHS] * matrix) for p in self.rhs),
            k.buffer(g.out, self.problem.results[0].dtype).at(offsets[OUT]),
            residual,
        )

    def emit_block(self, at: Operands, row0: Value, row1: Value, first: Value, last: Value) -> None:
        """Rows row0..row1 times panels first..last."""
        k, tile = self.k, self.tile
        sums = k.alloca("f32", tile.rows * max(tile.panels, len(self.rhs)) * tile.width)
        full = (row1 - row0) // tile.rows
        panel = min(int(self.g.inner), self.kc) * tile.width
        slots = self.group * self.advance
        kept = k.alloca("f32", len(self.rhs) * slots * panel) if self.widen_once else None
        rest = row1 - row0 - full * tile.rows
        low = tile.low
        with k.for_(first, last, self.group * self.advance) as side:
            end = k.min(side.i + self.group * self.advance, last)
            with k.for_(0, self.steps) as step, k.for_(0, full + (rest + (low - 1)) // low) as down:
                whole = down.i.lt(full)
                row = row0 + k.select(whole, down.i * tile.rows, full * tile.rows + (down.i - full) * low)
                count = k.select(whole, k.i64(tile.rows), k.min(low, row1 - row))
                with k.for_(side.i, end, self.advance) as across:
                    wide = None
                    if kept is not None:
                        start = kept.at((across.i - side.i) * panel)
                        places = [r * slots + i for r in range(len(self.rhs)) for i in range(self.advance)]
                        wide = Widened(tuple(start.at(i * panel) for i in places), down.i.eq(0), full.ge(KEPT_FROM))
                    self.emit_tile(at, row, count, across.i, end, step.i, sums, wide)
                    self.emit_epilogue(at, row, count, across.i, end, step.i, sums)

    def emit_tile(
        self,
        at: Operands,
        row: Value,
        count: Value,
        panel: Value,
        end: Value,
        step: Value,
        sums: Pointer,
        wide: Widened | None,
    ) -> None:
        k, g, tile, inner = self.k, self.g, self.tile, int(self.g.inner)
        steps = emit_size(k, self.problem, g.rows.strides[LHS]), emit_size(k, self.problem, g.inner_step)
        start = step * self.kc
        n = k.i64(min(inner, self.kc)) if inner % self.kc == 0 or self.steps == 1 else k.min(inner - start, self.kc)
        lhs = at.lhs.at(row * steps[0]).at(start * steps[1])
        # Where there is no second panel for the tile the first stands in for it: its sums are not used.
        numbers = [panel, *(k.min(panel + i, end - 1) for i in range(1, self.advance))]
        panels = [p.at((i * inner + start) * tile.width) for p in at.rhs for i in numbers]
        rows = static_rows(g)
        heights = tile.heights(rows)
        for height in heights:
            with k.if_(count.eq(height)) if len(heights) > 1 else nullcontext():
                streamed = height < tile.rows or height == rows
                for i in range(len(panels) if self.apart else 1):
                    own = slice(i, i + 1) if self.apart else slice(None)
                    to = sums.at(i * tile.rows * tile.width)
                    emit = partial(emit_products, k, tile, height, lhs, steps, n=n, out=to)
                    if wide is None or height < tile.rows:
                        emit(panels[own], streamed=streamed)
                        continue
                    with k.if_(wide.several) as several:
                        with k.if_(wide.first) as first:
                            emit(panels[own], streamed=True, kept=wide.panels[own])
                        with first.else_():
                            emit(wide.panels[own], streamed=False)
                    with several.else_():
                        emit(panels[own], streamed=streamed)

    def emit_epilogue(
        self, at: Operands, row: Value, count: Value, panel: Value, end: Value, step: Value, sums: Pointer
    ) -> None:
        """From the sums to the result, one vector at a time; the last panel may not be full."""
        k, tile, columns = self.k, self.tile, int(self.g.columns)
        with k.for_(panel, k.min(panel + self.advance, end)) as across, k.for_(0, count) as down:
            found = sums.at(down.i * (tile.panels * tile.width)).at((across.i - panel) * tile.width)
            column = across.i * tile.width

            def write(valid: Value | None) -> None:
                with k.for_(0, tile.width, tile.lanes) as v:
                    j = column + v.i
                    self.emit_result(at, row + down.i, j, found.at(v.i), step, None if valid is None else valid - j)

            if columns % tile.width == 0:
                write(None)
            else:
                with k.if_(across.i.lt(self.panels - 1)) as whole:
                    write(None)
                with whole.else_():
                    write(k.i64(columns))

    def emit_result(
        self, at: Operands, row: Value, column: Value, found: Pointer, step: Value, valid: Value | None
    ) -> None:
        """`valid` elements (None: a full vector) of the result from the sums at `found`."""
        k, g, lanes = self.k, self.g, self.tile.lanes

        def finish(x: Value) -> Value:
            if len(self.rhs) == 2:
                up = (self.tile.rows if self.apart else 1) * self.tile.width
                return activate(k, g.activation, x) * found.load(up, lanes)
            if g.bias is not None:
                x = x + k.buffer(g.bias, self.problem.operand(g.bias).dtype).load_f32(column, lanes, valid=valid)
            x = activate(k, g.activation, x)
            if at.residual is not None:
                x = x + self.line(at.residual, row, RESIDUAL).load_f32(column, lanes, valid=valid)
            return x

        out = self.line(at.out, row, OUT)
        x = found.load(0, lanes)
        if self.steps == 1:
            x = finish(x)
        else:
            with k.if_(step.gt(0)) as later:
                later.yield_(x + out.load_f32(column, lanes, valid=valid))
            with later.else_():
                later.yield_(x)
            (x,) = later.results
            with k.if_(step.eq(self.steps - 1)) as last:
                last.yield_(finish(x))
            with last.else_():
                last.yield_(x)
            (x,) = last.results
        out.store(x, column, valid=valid)

    def line(self, matrix: Pointer, row: Value, index: int) -> Pointer:
        """A row of the matrix whose strides are number `index` of the geometry."""
        return matrix.at(row * emit_size(self.k, self.problem, self.g.rows.strides[index]))


def ceil_div(k: KernelBuilder, a: Value, b: Value) -> Value:
    """Of numbers that are not negative."""
    return k.binary("divu", a + b - 1, b)
