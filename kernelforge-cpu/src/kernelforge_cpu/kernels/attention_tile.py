"""The inner kernels of attention: a few query rows against one block of keys, with an online softmax.

A tile is `rows` query rows. Scores are [rows, keys] in scratch, a row's keys side by side, so that masks, maxima and
exponentials work on full vectors whatever the number of rows. Keys come either as they are in memory, a row after the other
(`Tile.direct`: dot products, for the rows of one token), or transposed into scratch (outer products, for many rows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import ITEMSIZE
from kernelforge_cpu.emit import I64, PTR, Builder, Pointer, Value
from kernelforge_cpu.kernels.cores import LINE
from kernelforge_cpu.vmath import exp_decay, tanh

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Function, KernelBuilder, Type

CHAINS = 4
"""Vectors of a row's scores at a time: enough to hide the latency of exp."""


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    """Of a block."""
    lanes: int
    """Of a vector of scores."""
    width: int
    """Lanes of a vector along the head."""
    head_dim: int
    dtype: str
    """Of keys and values, as the tile reads them."""
    softcap: float
    registers: int
    """Vector registers for partial results."""
    direct: bool
    streamed: bool = False
    """Keys and values come from memory: each row asks for one that is `ahead` elements on. Direct tiles only."""

    @property
    def padded(self) -> int:
        """Elements of a query or result row in scratch: whole vectors."""
        return -(-self.head_dim // self.width) * self.width

    @property
    def columns(self) -> int:
        """Vectors of a panel: of transposed keys, of values."""
        return 2 if self.rows * 2 <= self.registers else 1

    def scores(self, k: KernelBuilder) -> Function:
        """`(q, keys, step, scores, end[, ahead])`: q f32 [rows, padded], scaled. keys: the block's first row, rows `step`
        elements apart; transposed: f32 [head_dim, keys]. Fills scores[:, :end], and beyond with anything up to a whole
        panel."""
        return self._function(k, "scores", [PTR, PTR, I64, PTR, I64, *self._ahead], self._scores)

    def softmax(self, k: KernelBuilder, *, masked: bool) -> Function:
        """`(scores, top, total, scales, firsts, ends, end)`: scores become weights exp(score - top), 0 where hidden.

        top, total: f32 [rows], maxima and sums of weights so far. scales: f32 [rows], by which earlier sums must be
        multiplied. Row r sees keys firsts[r]..ends[r] (i32) of the block, and none from `end` on; not masked: all.
        """

        def write(b: Builder, *args: Value) -> None:
            self._softmax(b, masked, *args)

        return self._function(k, "masked" if masked else "softmax", [*[PTR] * 6, I64], write)

    def values(self, k: KernelBuilder) -> Function:
        """`(out, weights, values, step, scales, head, tail, end, firsts, ends[, ahead])`: out = out * scales + weights @ values.

        All rows see keys head..tail; of keys 0..head and tail..end row r sees those in firsts[r]..ends[r], if the tile is
        not direct.
        """
        return self._function(k, "values", [*[PTR] * 3, I64, PTR, *[I64] * 3, PTR, PTR, *self._ahead], self._values)

    @property
    def _ahead(self) -> list[Type]:
        return [I64] * self.streamed

    def _function(self, k: KernelBuilder, name: str, params: Sequence[Type], write: Callable[..., None]) -> Function:
        def body(b: Builder, *args: Value) -> Sequence[Value]:
            write(b, *args)
            return ()

        kind = f"{self.rows}x{self.dtype}" if self.direct else f"{self.rows}"
        return k.function(f"{k.name}_{name}_{kind}", params, body, inline=False)

    # --- scores ---

    def _scores(
        self, b: Builder, q: Value, keys: Value, step: Value, scores: Value, end: Value, ahead: Value | None = None
    ) -> None:
        at = (Pointer(b, q.name, "f32"), Pointer(b, keys.name, self.dtype), Pointer(b, scores.name, "f32"))
        if self.direct:
            self._dot_products(b, *at, step, end, ahead)
        else:
            self._outer_products(b, *at, end)

    def _outer_products(self, b: Builder, q: Pointer, keys: Pointer, scores: Pointer, end: Value) -> None:
        panel = self.columns * self.lanes
        starts = [(row, c * self.lanes) for row in range(self.rows) for c in range(self.columns)]
        with b.for_(0, end, panel) as at:
            here, out = keys.at(at.i), scores.at(at.i)
            with b.for_(0, self.head_dim, 1, [b.f32(0.0, self.lanes)] * len(starts)) as d:
                line = here.at(d.i * self.keys)
                k_d = [line.load(c * self.lanes, self.lanes) for c in range(self.columns)]
                q_d = [b.broadcast(q.at(d.i).load(row * self.padded), self.lanes) for row in range(self.rows)]
                products = ((x, y) for x in q_d for y in k_d)
                d.yield_(*(b.fma(x, y, s) for (x, y), s in zip(products, d.values, strict=True)))
            for (row, column), s in zip(starts, d.results, strict=True):
                out.store(s, row * self.keys + column)

    def _dot_products(
        self, b: Builder, q: Pointer, keys: Pointer, scores: Pointer, step: Value, end: Value, ahead: Value | None
    ) -> None:
        # Few products at a time: four keys' would leave no registers for keys and queries.
        most = max(1, self.registers // 3)
        groups = [range(i, min(i + most, self.rows)) for i in range(0, self.rows, most)]

        def four(at: Value, rows: Sequence[Pointer]) -> None:
            for group in groups:
                pairs = [self._products(b, q, rows[i : i + 2], group) for i in (0, 2)]
                for row, *sums in zip(group, *pairs, strict=True):
                    scores.store(lane_sums(b, *sums), at + row * self.keys)

        whole = end // 4 * 4
        with b.for_(0, whole, 4) as loop:
            base = keys.at(loop.i * step)
            rows = [base.at(step * j) for j in range(4)]
            self._prefetch(rows, ahead, self.head_dim)
            four(loop.i, rows)
        with b.if_(whole.lt(end)):
            # Past the end the last key is read again: its memory is there.
            four(whole, [keys.at(b.min(whole + j, end - 1) * step) for j in range(4)])

    def _prefetch(self, rows: Sequence[Pointer], ahead: Value | None, elements: int) -> None:
        """Into L2: a block of keys and one of values take more than a part of L1."""
        if ahead is not None:
            size = ITEMSIZE[self.dtype]
            for row in rows:
                for line in range(0, elements * size, LINE):
                    row.at(ahead).prefetch(line // size, locality=2)

    def _products(self, b: Builder, q: Pointer, keys: Sequence[Pointer], group: range) -> list[Value]:
        """For each row of the group a vector with its products with two keys: see `mixed`."""
        sums = [b.f32(0.0, self.width)] * (2 * len(group))
        for d in range(0, self.head_dim, self.width):
            valid = b.i64(self.head_dim - d) if d + self.width > self.head_dim else None
            k_d = [key.load_f32(d, self.width, valid=valid) for key in keys]
            q_d = [q.load(row * self.padded + d, self.width) for row in group]
            sums = [b.fma(x, y, s) for (x, y), s in zip(((x, y) for x in q_d for y in k_d), sums, strict=True)]
        return [mixed(b, x, y, 2) for x, y in zip(sums[::2], sums[1::2], strict=True)]

    # --- softmax ---

    def _softmax(
        self,
        b: Builder,
        masked: bool,
        scores: Value,
        top: Value,
        total: Value,
        scales: Value,
        firsts: Value,
        ends: Value,
        end: Value,
    ) -> None:
        low = float("-inf")
        s, tops, totals, factors = (Pointer(b, p.name, "f32") for p in (scores, top, total, scales))
        lane = b.consts(range(self.lanes), "i32")
        chains = 1 if masked else min(CHAINS, self.keys // self.lanes)
        count = end if masked else b.i64(self.keys)

        with b.for_(0, self.rows) as row:
            line = s.at(row.i * self.keys)
            bounds = [b.broadcast(Pointer(b, p.name, "i32").load(row.i), self.lanes) for p in (firsts, ends)]

            def score(at: Value, line: Pointer = line, bounds: list[Value] = bounds) -> Value:
                x = line.load(at, self.lanes)
                if self.softcap:
                    x = tanh(b, x) * self.softcap
                if masked:
                    key = b.broadcast(b.convert(at, "i32"), self.lanes) + lane
                    x = b.select(key.ge(bounds[0]) & key.lt(bounds[1]), x, low)
                if masked or self.softcap:
                    line.store(x, at)
                return x

            block = chains * self.lanes
            with b.for_(0, count, block, [b.f32(low, self.lanes)] * chains) as loop:
                found = [score(loop.i + c * self.lanes) for c in range(chains)]
                loop.yield_(*(b.max(x, acc) for x, acc in zip(found, loop.values, strict=True)))
            high = b.reduce_max(fold(b.max, loop.results))
            old = tops.load(row.i)
            new = b.max(high, old)
            # A row that has seen no key yet: any finite number makes its weights exp(-inf) = 0.
            pivot = b.select(new.eq(low), 0.0, new)
            with b.for_(0, count, block, [b.f32(0.0, self.lanes)] * chains) as loop:
                at = [loop.i + c * self.lanes for c in range(chains)]
                weights = [exp_decay(b, line.load(i, self.lanes) - pivot) for i in at]
                for i, w in zip(at, weights, strict=True):
                    line.store(w, i)
                loop.yield_(*(acc + w for acc, w in zip(loop.values, weights, strict=True)))
            scale = exp_decay(b, old - pivot)
            tops.store(new, row.i)
            factors.store(scale, row.i)
            sums = b.reduce_add(fold(lambda x, y: x + y, loop.results))
            totals.store(b.fma(totals.load(row.i), scale, sums), row.i)

    # --- values ---

    def _values(
        self,
        b: Builder,
        out: Value,
        weights: Value,
        values: Value,
        step: Value,
        scales: Value,
        head: Value,
        tail: Value,
        end: Value,
        firsts: Value,
        ends: Value,
        ahead: Value | None = None,
    ) -> None:
        o, w = Pointer(b, out.name, "f32"), Pointer(b, weights.name, "f32")
        source = Pointer(b, values.name, self.dtype)
        seen = [Pointer(b, p.name, "i32") for p in (firsts, ends)]
        rows = range(self.rows)
        factors = [Pointer(b, scales.name, "f32").load(row) for row in rows]

        def group(d: Value, count: int, valid: Value | None) -> None:
            """`count` vectors of the head from element `d` on; the last one has `valid` lanes."""
            starts = [(row, row * self.padded + v * self.width) for row in rows for v in range(count)]
            sums = [o.at(d).load(at, self.width) * factors[row] for row, at in starts]

            def load(key: Value) -> list[Value]:
                line = source.at(key * step).at(d)
                masks = [valid if v == count - 1 else None for v in range(count)]
                return [line.load_f32(v * self.width, self.width, valid=mask) for v, mask in enumerate(masks)]

            def weighted(key: Value, v: Sequence[Value]) -> list[tuple[Value, Value]]:
                spread = [b.broadcast(w.at(key).load(row * self.keys), self.width) for row in rows]
                return [(x, y) for x in spread for y in v]

            with b.for_(head, tail, 1, sums) as loop:
                self._prefetch([source.at(loop.i * step).at(d)], ahead, count * self.width)
                terms = weighted(loop.i, load(loop.i))
                loop.yield_(*(b.fma(x, y, s) for (x, y), s in zip(terms, loop.values, strict=True)))
            sums = loop.results
            if not self.direct:
                with b.for_(0, head + b.max(end - tail, 0), 1, sums) as loop:
                    key = b.select(loop.i.lt(head), loop.i, loop.i - head + tail)
                    terms = weighted(key, load(key))
                    number = b.convert(key, "i32")
                    sees = [number.ge(seen[0].load(row)) & number.lt(seen[1].load(row)) for row in rows]
                    # Not s + 0 * y: a value that the row may not see can be NaN.
                    added = [b.fma(x, y, s) for (x, y), s in zip(terms, loop.values, strict=True)]
                    loop.yield_(
                        *(
                            b.select(sees[i // count], new, s)
                            for i, (new, s) in enumerate(zip(added, loop.values, strict=True))
                        )
                    )
                sums = loop.results
            for (_, at), s in zip(starts, sums, strict=True):
                o.at(d).store(s, at)

        whole, rest = divmod(self.head_dim, self.width) if self.direct else (self.padded // self.width, 0)
        # As many vectors as leave registers for values and weights, in passes of about the same number.
        most = max(1, (self.registers - 2) // self.rows) if self.direct else self.columns
        count = -(-whole // -(-whole // most)) if whole else 0
        if count:
            with b.for_(0, whole // count * count * self.width, count * self.width) as loop:
                group(loop.i, count, None)
            if whole % count:
                group(b.i64(whole // count * count * self.width), whole % count, None)
        if rest:
            group(b.i64(whole * self.width), 1, b.i64(rest))


def fold(combine: Callable[[Value, Value], Value], vectors: Sequence[Value]) -> Value:
    total, *others = vectors
    for other in others:
        total = combine(total, other)
    return total


def mixed(b: Builder, x: Value, y: Value, distance: int) -> Value:
    """Every four lanes are sums of lanes of x and of y that are `distance` (2, then 1) apart: for 2 two sums of x, then two
    of y; for 1 neighbours of x, then of y. Every shuffle is one instruction on x86."""
    n = x.type.lanes
    first = (0, 1, n, n + 1) if distance == 2 else (0, 2, n, n + 2)
    low = [q + i for q in range(0, n, 4) for i in first]
    return b.shuffle(x, y, low) + b.shuffle(x, y, [i + distance for i in low])


def lane_sums(b: Builder, x: Value, y: Value) -> Value:
    """A vector of 4 lanes: the sums over the lanes of the two and two vectors that `mixed` made x and y of."""
    total = mixed(b, x, y, 1)
    while (half := total.type.lanes // 2) >= 4:
        total = b.slice(total, 0, half) + b.slice(total, half, half)
    return total
