"""The register tile of a matrix product: a few rows of lhs times one or two panels of rhs, accumulated in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from kernelforge.dtype import ITEMSIZE
from kernelforge_cpu.emit import I64, PTR, Pointer
from kernelforge_cpu.kernels.cores import LINE
from kernelforge_cpu.kernels.matmul.panels import Panels, load_row

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Builder, KernelBuilder, Value


@dataclass(frozen=True)
class Tile:
    """`rows` x (`panels` * `vectors` * `lanes`) sums."""

    rows: int
    panels: int
    vectors: int
    """Vectors in the width of one panel."""
    lanes: int
    unroll: int
    """Steps along the inner dimension between two branches."""
    registers: int
    """Vector registers there are."""
    ahead: int
    """Bytes of panels from memory that are asked for ahead of use, over all streams together."""
    one_stream: bool = False
    """A panel from memory is read from front to back, whatever the number of chains."""

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def low(self) -> int:
        """Rows of the largest tile of a remainder; one of 8 rows or more takes two."""
        return max(1, min(self.rows - 1, 7))

    def heights(self, rows: int | None) -> list[int]:
        """Numbers of rows that a tile of a matrix with `rows` rows (None: any number) can have."""
        if rows is None:
            return sorted({*range(1, self.low + 1), self.rows})
        full, rest = divmod(rows, self.rows)
        low, last = divmod(rest, self.low)
        return sorted({h for h, wanted in ((last, last), (self.low, low), (self.rows, full)) if wanted})

    def chains(self, rows: int) -> int:
        """Stretches of the inner dimension that `rows` rows walk side by side (with `one_stream`: neighbouring steps), each
        with sums of its own.

        A low tile has too few sums to hide the latency of additions, and reads too few streams for the memory's speed.
        """
        columns = self.panels * self.vectors
        chains = 1
        while 2 * chains * rows * columns + columns + 1 <= self.registers:
            chains *= 2
        return chains


def emit_products(
    k: KernelBuilder,
    tile: Tile,
    rows: int,
    lhs: Pointer,
    steps: tuple[Value, Value],
    panels: Sequence[Pointer],
    n: Value,
    out: Pointer,
    *,
    streamed: bool,
    kept: Sequence[Pointer] = (),
) -> None:
    """out[r, p, :] = sum over i < n of lhs[r, i] * panel p[i, :] for `rows` rows; f32 [tile.rows][panels][width].

    `steps`: from row to row and from column to column of lhs, in elements. `streamed`: the panels are read once, from
    memory. `kept`: where the panels are written to as f32 [n][width], if they are. Sums are f32, whatever the types of
    the operands. The code is a function of its own, which knows the numbers that are constant.
    """
    numbers = (*steps, n)
    passed = [v for v in numbers if v.const is None]
    count = len(panels)

    def write(b: Builder, left: Value, sums: Value, *rest: Value) -> list[Value]:
        right, wide = (
            [Pointer(b, v.name, p.element) for v, p in zip(rest[start:], own, strict=False)]
            for start, own in ((0, panels), (count, kept))
        )
        variables = iter(rest[count + len(kept) :])
        row_step, inner_step, total = (next(variables) if v.const is None else b.i64(int(v.const)) for v in numbers)
        results = _sums(
            b, tile, rows, Pointer(b, left.name, lhs.element), (row_step, inner_step), right, total, streamed, wide
        )
        for i, found in enumerate(results):
            Pointer(b, sums.name, "f32").store(found, i * tile.lanes)
        return []

    types = [PTR] * (2 + count + len(kept)) + [I64] * len(passed)
    name = f"{k.name}_rows{rows}{'_kept' if kept else ''}_{panels[0].element}"
    k.call(k.function(name, types, write, inline=False), lhs, out, *panels, *kept, *passed)


def _sums(
    k: Builder,
    tile: Tile,
    rows: int,
    lhs: Pointer,
    steps: tuple[Value, Value],
    panels: Sequence[Pointer],
    n: Value,
    streamed: bool,
    kept: Sequence[Pointer],
) -> list[Value]:
    """Vectors of `out` of `emit_products`."""
    row_step, inner_step = steps
    chains = tile.chains(rows)
    stretch = n // chains
    together = streamed and tile.one_stream
    starts = [k.i64(0) if together else stretch * c for c in range(chains)]
    ahead = tile.ahead // ((1 if together else chains) * len(panels))
    lefts = [lhs.at(start * inner_step) for start in starts]
    rights, wide = ([[p.at(start * tile.width) for p in own] for start in starts] for own in (panels, kept))

    def step(chain: int, i: Value, u: int, sums: Sequence[Value]) -> list[Value]:
        """The sums of one chain after step i + u from its start."""
        left = lefts[chain].at(i * inner_step).at(inner_step * u)
        right = [p.at(i * tile.width).at(u * tile.width) for p in rights[chain]]
        if streamed:
            for p in right:
                emit_prefetch(p, tile.width, u, ahead)
        columns = [c for p in right for c in load_row(k, p, Panels(tile.vectors, tile.lanes, p.element))]
        for p, first in zip(wide[chain], range(0, len(columns), tile.vectors), strict=False):
            for v, column in enumerate(columns[first : first + tile.vectors]):
                p.at(i * tile.width).store(column, u * tile.width + v * tile.lanes)
        done: list[Value] = []
        for r in range(rows):  # each factor just before its use: LLVM keeps the order, and has no registers to spare
            factor = k.broadcast(left.load_f32(row_step * r), tile.lanes)
            done += [k.fma(factor, c, s) for c, s in zip(columns, sums[len(done) :], strict=False)]
        return done

    count = rows * len(panels) * tile.vectors
    sums = [k.f32(0.0, tile.lanes)] * (count * chains)
    whole = stretch // tile.unroll * tile.unroll
    for first, last, unroll in ((k.i64(0), whole, tile.unroll), (whole, stretch, 1)):
        if first.const is not None and first.const == last.const:
            continue
        with k.for_(first, last, unroll, sums) as loop:
            carried = [loop.values[c * count : (c + 1) * count] for c in range(chains)]
            for u in range(unroll):
                for c, own in enumerate(carried):
                    carried[c] = step(c, loop.i * chains, u * chains + c, own) if together else step(c, loop.i, u, own)
            loop.yield_(*(s for own in carried for s in own))
        sums = loop.results
    sums = [reduce(lambda a, b: a + b, sums[s::count]) for s in range(count)]
    done = stretch * chains
    if n.const is None or n.const != done.const:
        with k.for_(done, n, 1, sums) as rest:
            rest.yield_(*step(0, rest.i, 0, rest.values))
        sums = rest.results
    return sums


def emit_prefetch(panel: Pointer, width: int, step: int, ahead: int) -> None:
    """Asks for the lines of row `step` that begin in it, `ahead` bytes on."""
    size = ITEMSIZE[panel.element]
    for offset in range(-step * width * size % LINE, width * size, LINE):
        panel.prefetch((ahead + offset) // size)
