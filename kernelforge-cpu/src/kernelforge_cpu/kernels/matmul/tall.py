"""Integer products of many rows by tall tiles (AVX2).

Weights of the panels side by side are spread out once for a chunk of rows, and a tile of activations once for all of these
panels, so that the loop over groups (`TallLoop`) does nothing but multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kernelforge.dtype import GROUP
from kernelforge_cpu.emit import I64, PTR, Pointer
from kernelforge_cpu.kernels.matmul.integer import LEAST_ROWS, TALL, IntegerProduct
from kernelforge_cpu.kernels.matmul.product import ceil_div
from kernelforge_cpu.kernels.matmul.tall_loop import NEAR, TURNS, VECTOR, WORDS, TallLoop
from kernelforge_cpu.kernels.matmul.words import WORD
from kernelforge_cpu.kernels.quantize import GROUP_BYTES, VALUES, ZEROS
from kernelforge_cpu.ssa import vec
from kernelforge_cpu.store import ALIGNMENT

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Builder, Value
    from kernelforge_cpu.kernels.matmul.product import Operands

CHUNK = 256
"""Rows whose sums are kept until the inner dimension has been walked."""
BLOCK = 20
"""Groups of the inner dimension at a time, at most: a tile of x stays in L1, the weights of all panels side by side in L2."""


class Side(NamedTuple):
    """Panels `first` to `end`, and a part's memory for them."""

    at: Operands
    first: Value
    end: Value
    weights: Pointer
    x: Pointer
    """A tile."""


@dataclass(frozen=True)
class TallProduct(IntegerProduct):
    """The loops for `LEAST_ROWS` rows and more; fewer go the way of `IntegerProduct`. Both give the same bits."""

    scratch: Pointer
    """`part_bytes` for each part."""

    @property
    def row_sums(self) -> int:
        """f32 of a row and a panel."""
        return len(self.rhs) * self.tile.width

    @property
    def loop(self) -> TallLoop:
        return TallLoop(self.layout.dtype, TALL, 4 * self.row_sums)

    @property
    def block(self) -> int:
        """Groups at a time: blocks of about equal size."""
        groups = self.layout.groups
        return -(-groups // max(1, -(-groups // BLOCK)))

    @property
    def areas(self) -> tuple[int, int, int]:
        """Bytes of a part's weights [panels][rhs][groups], of its tile of x, and of its sums [tiles][panels][TALL][rhs][8]."""
        loop, groups = self.loop, self.block
        weights = self.group * len(self.rhs) * groups * loop.weight_bytes
        sizes = (weights, groups * loop.group_bytes, CHUNK * self.group * self.row_sums * 4)
        a, b, c = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        return a, b, c

    @property
    def part_bytes(self) -> int:
        return sum(self.areas)

    def emit_block(self, at: Operands, row0: Value, row1: Value, first: Value, last: Value) -> None:
        if not self.layout.groups:
            super().emit_block(at, row0, row1, first, last)
            return
        with self.k.if_((row1 - row0).lt(LEAST_ROWS)) as few:
            super().emit_block(at, row0, row1, first, last)
        with few.else_():
            self.emit_chunks(at, row0, row1, first, last)

    def emit_chunks(self, at: Operands, row0: Value, row1: Value, first: Value, last: Value) -> None:
        k, groups, of_panel = self.k, self.layout.groups, TALL * self.row_sums
        weights = self.scratch.at(k.part * self.part_bytes)
        x = weights.at(self.areas[0])
        sums = x.at(self.areas[1]).of("f32")
        # A tile of x is spread out once for each group of panels: these are of about equal size.
        width = ceil_div(k, last - first, k.max(1, ceil_div(k, last - first, k.i64(self.group))))
        with k.for_(row0, row1, CHUNK) as chunk, k.for_(first, last, k.max(1, width)) as across:
            side = Side(at, across.i, k.min(across.i + width, last), weights, x)
            start, stop = chunk.i, k.min(chunk.i + CHUNK, row1)
            tiles = (stop - start + (TALL - 1)) // TALL
            with k.for_(0, groups, self.block) as block:
                n = k.min(groups - block.i, self.block)
                self.emit_spread(side, block.i, n)
                with k.for_(0, tiles) as down:
                    row, own = start + down.i * TALL, sums.at(down.i * (self.group * of_panel))
                    count = k.min(stop - row, TALL)
                    self.emit_tall(side, row, count, block.i, n, own)
            # Row by row, so that whole lines of the result are written one after the other.
            with k.for_(0, stop - start) as down, k.for_(side.first, side.end) as panel:
                tile, line = down.i // TALL, down.i % TALL
                own = sums.at((tile * self.group + (panel.i - side.first)) * of_panel).at(line * self.row_sums)
                self.emit_epilogue(at, start + down.i, k.i64(1), panel.i, side.end, k.i64(0), own)

    def emit_spread(self, side: Side, group: Value, n: Value) -> None:
        """`n` groups of all panels as `TallLoop` reads them."""
        k, layout, nbytes = self.k, self.layout, self.loop.weight_bytes

        def write(b: Builder, source: Value, to: Value, n: Value) -> list[Value]:
            with b.for_(0, n) as g:
                own = Pointer(b, source.name, "i8").at(g.i * layout.group_bytes)
                out = Pointer(b, to.name, "i8").at(g.i * nbytes)
                for word in range(layout.words):
                    w = own.load(word * VECTOR, VECTOR)
                    if layout.dtype == "q8":
                        places = [2 * (WORD * (word % 2) + j) for j in range(WORD)] * (VECTOR // WORD)
                        negative = b.consts([place + 1 for place in places], "i8")
                        turn = 2 * TURNS.index(word // 2) + word % 2
                        out.store(b.abs(w), 2 * turn * VECTOR)
                        out.store(b.select(w.lt(0), negative, b.consts(places, "i8")), (2 * turn + 1) * VECTOR)
                    else:
                        high = b.bitcast(b.shift_right_logical(b.bitcast(w, vec(VECTOR // 2, "i16")), 4), w.type)
                        out.store(w & 15, word * VECTOR)
                        out.store(high & 15, (word + layout.words) * VECTOR)
            return []

        function = k.function(f"{k.name}_spread", (PTR, PTR, I64), write, inline=False)
        with k.for_(side.first, side.end) as panel:
            for i, rhs in enumerate(side.at.rhs):
                source = rhs.at(panel.i * layout.panel_bytes).at(group * layout.group_bytes).at(layout.scale_bytes)
                number = (panel.i - side.first) * len(self.rhs) + i
                k.call(function, source, side.weights.at(number * (n * nbytes)), n)

    def emit_tall(self, side: Side, row: Value, count: Value, group: Value, n: Value, sums: Pointer) -> None:
        """Adds `n` groups, from number `group` on, of a tile of `count` rows times all panels to `sums`."""
        k, layout, loop = self.k, self.layout, self.loop
        self.emit_tile_of_x(side.at.lhs.at(row * self.row_bytes).at(group * GROUP_BYTES), side.x, n, count - 1)

        def write(b: Builder, *args: Value) -> list[Value]:
            b.assembly(loop.text(), loop.constraints, *args)
            return []

        function = k.function(f"{k.name}_tall", (PTR, PTR, PTR, PTR, I64, I64), write, inline=False)
        with k.for_(side.first, side.end) as panel:
            number = panel.i - side.first
            for i, rhs in enumerate(side.at.rhs):
                scales = rhs.at(panel.i * layout.panel_bytes).of("f16").at(group * self.tile.width)
                to = sums.at(number * (TALL * self.row_sums)).at(i * self.tile.width).of("i8").at(NEAR)
                weights = side.weights.at((number * len(self.rhs) + i) * (n * loop.weight_bytes))
                k.call(function, side.x, weights, scales, to, n, group)

    def emit_tile_of_x(self, source: Pointer, to: Pointer, n: Value, last: Value) -> None:
        """`n` groups of rows 0 to `last`, which stands in for those behind it, as `TallLoop` reads them."""
        k, loop, scales = self.k, self.loop, self.loop.group_bytes - 4 * TALL

        def write(b: Builder, source: Value, to: Value, n: Value, last: Value) -> list[Value]:
            first = Pointer(b, source.name, "i8")
            starts = [first, *(first.at(b.min(last, r) * self.row_bytes) for r in range(1, TALL))]
            with b.for_(0, n) as g:
                out = Pointer(b, to.name, "i8").at(g.i * loop.group_bytes)
                groups = [start.at(g.i * GROUP_BYTES) for start in starts]
                for r, own in enumerate(groups):
                    own.prefetch(TALL * self.row_bytes)  # the next tile's, which this one's products push out of L1
                    out.at(scales).of("f32").store(own.of("f32").load(), r)
                if loop.dtype == "q8":
                    for r, own in enumerate(groups):
                        v = own.load(VALUES, GROUP)
                        minus = 0 - v
                        for half in range(2):  # a vector's shuffle stays within its halves: quarters 0 and 2, 1 and 3
                            kept = [16 * (j // 8) + 8 * half + j % 8 for j in range(GROUP // 2)]
                            lanes = [lane for j in kept for lane in (j, GROUP + j)]
                            out.store(b.shuffle(v, minus, lanes), (half * TALL + r) * VECTOR)
                else:
                    words = [own.at(VALUES).of("i32").load(0, WORDS) for own in groups]
                    for word, column in enumerate(b.transpose(words)):
                        out.of("i32").store(column, word * TALL)
                    for r, own in enumerate(groups):
                        out.of("i32").store(own.at(ZEROS).of("i32").load(), WORDS * TALL + r)
            return []

        function = k.function(f"{k.name}_x", (PTR, PTR, I64, I64), write, inline=False)
        k.call(function, source, to, n, last)
