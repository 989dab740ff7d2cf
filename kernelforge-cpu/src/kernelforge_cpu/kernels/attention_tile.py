"""The inner kernel of attention: a few query rows against one block of keys, with an online softmax.

A tile is `rows` query rows (1, 2 or 4). Scores are computed `keys` at a time, so that one vector of `lanes = rows * keys` scores
holds row r, key j in lane r * keys + j: masks, maxima and exponentials work on full vectors whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_cpu.emit import I64, PTR, Builder, Pointer, Value, vec
from kernelforge_cpu.vmath import exp, tanh

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Function, KernelBuilder

HIDDEN = -1.0
"""Marks, among the weights (which are never negative), a key that a row does not see."""


@dataclass(frozen=True)
class Tile:
    rows: int
    lanes: int
    """Of a vector of scores."""
    width: int
    """Lanes of a vector along the head."""
    head_dim: int
    dtype: str
    """Of keys and values."""
    softcap: float
    accumulators: int
    """Vector registers for partial results."""

    @property
    def keys(self) -> int:
        return self.lanes // self.rows

    @property
    def padded(self) -> int:
        """Elements of a query or result row in scratch: whole vectors."""
        return -(-self.head_dim // self.width) * self.width

    def function(self, k: KernelBuilder) -> Function:
        """`(q, out, top, total, scores, keys, values, key step, value step, end, seen first, seen end, row first, row end)`

        q: f32 [rows, padded], scaled, zeros after the head. out: f32 [rows, padded], sums of weighted values so far.
        top, total: one score vector each, maxima (the same in all lanes of a row) and partial sums of weights so far.
        scores: f32 scratch. keys, values: the block's first rows, and row steps in elements. The tile sees keys 0..end of the
        block; every row sees seen first..seen end, row r lanes r * keys.. of (row first)..(row end), vectors of i32.
        """
        bounds = vec(self.lanes, "i32")
        return k.function(
            f"{k.name}_{self.rows}x{self.dtype}", (*[PTR] * 7, *[I64] * 5, bounds, bounds), self.write, inline=False
        )

    def write(self, b: Builder, *args: Value) -> Sequence[Value]:
        q, out, top, total, scores = (Pointer(b, a.name, "f32") for a in args[:5])
        keys, values = (Pointer(b, a.name, self.dtype) for a in args[5:7])
        key_step, value_step, end, seen_first, seen_end, row_first, row_end = args[7:]

        high = self._scores(b, q, scores, keys, key_step, end, row_first, row_end)
        old = top.load(0, self.lanes)
        new = self._over_keys(b, b.max, b.max(high, old))
        # A row that has seen no key yet: any finite number makes its weights exp(-inf) = 0.
        pivot = b.select(new.eq(float("-inf")), 0.0, new)
        top.store(new)
        rescale = exp(b, old - pivot)
        added = self._weights(b, scores, end, pivot)
        total.store(b.fma(total.load(0, self.lanes), rescale, added))
        self._values(b, out, rescale, scores, values, value_step, end, seen_first, seen_end)
        return []

    def _steps(self, b: Builder, end: Value) -> Value:
        """How many score vectors cover the block."""
        return (end + (self.keys - 1)) // self.keys

    def _scores(
        self,
        b: Builder,
        q: Pointer,
        scores: Pointer,
        keys: Pointer,
        key_step: Value,
        end: Value,
        row_first: Value,
        row_end: Value,
    ) -> Value:
        """Fill `scores` with the block's scores, -inf where hidden; their maxima, lane by lane."""
        low = b.f32(float("-inf"), self.lanes)
        lane_key = b.consts([lane % self.keys for lane in range(self.lanes)], "i32")
        with b.for_(0, self._steps(b, end), 1, [low]) as loop:
            at = loop.i * self.keys
            # Past the end the last key is read again: its score is hidden, its memory is there.
            rows = [keys.at(b.min(at + j, end - 1) * key_step) for j in range(self.keys)]
            s = lane_sums(b, self._products(b, q, rows))
            if self.softcap:
                s = tanh(b, s) * self.softcap
            key = b.broadcast(b.convert(at, "i32"), self.lanes) + lane_key
            s = b.select(key.ge(row_first) & key.lt(row_end), s, low)
            scores.store(s, loop.i * self.lanes)
            loop.yield_(b.max(s, loop.values[0]))
        return loop.results[0]

    def _products(self, b: Builder, q: Pointer, keys: Sequence[Pointer]) -> list[Value]:
        """For each row and key (the key runs fastest) a vector whose lanes sum to their product."""
        whole, rest = divmod(self.head_dim, self.width)

        def step(d: Value | int, sums: Sequence[Value], valid: Value | None) -> list[Value]:
            k_d = [key.load_f32(d, self.width, valid=valid) for key in keys]
            q_d = [q.at(row * self.padded).load(d, self.width) for row in range(self.rows)]
            pairs = [(x, y) for x in q_d for y in k_d]
            return [b.fma(x, y, s) for (x, y), s in zip(pairs, sums, strict=True)]

        sums = [b.f32(0.0, self.width)] * self.lanes
        with b.for_(0, whole * self.width, self.width, sums) as loop:
            loop.yield_(*step(loop.i, loop.values, None))
        return step(whole * self.width, loop.results, b.i64(rest)) if rest else loop.results

    def _over_keys(self, b: Builder, combine: Callable[[Value, Value], Value], a: Value) -> Value:
        """Combine each row's lanes; all of them get the result."""
        step = 1
        while step < self.keys:
            a = combine(a, b.shuffle(a, a, [lane ^ step for lane in range(self.lanes)]))
            step *= 2
        return a

    def _weights(self, b: Builder, scores: Pointer, end: Value, pivot: Value) -> Value:
        """Turn the block's scores into weights exp(score - pivot), `HIDDEN` where hidden; their sums, lane by lane."""
        with b.for_(0, self._steps(b, end), 1, [b.f32(0.0, self.lanes)]) as loop:
            s = scores.load(loop.i * self.lanes, self.lanes)
            weight = exp(b, s - pivot)
            scores.store(b.select(s.eq(float("-inf")), HIDDEN, weight), loop.i * self.lanes)
            loop.yield_(loop.values[0] + weight)
        return loop.results[0]

    def _values(
        self,
        b: Builder,
        out: Pointer,
        rescale: Value,
        scores: Pointer,
        values: Pointer,
        value_step: Value,
        end: Value,
        seen_first: Value,
        seen_end: Value,
    ) -> None:
        """out = out * rescale + weights @ values, a few vectors of the head at a time."""
        # Keys that every row sees, in whole steps; the few before and after them are added row by row.
        head = b.min((b.max(seen_first, 0) + (self.keys - 1)) // self.keys, self._steps(b, end))
        tail = b.max(b.min(seen_end, end) // self.keys, head)
        partial = b.min(head * self.keys, end)
        remaining = partial + b.max(end - tail * self.keys, 0)
        scales = [b.extract(rescale, row * self.keys) for row in range(self.rows)]

        def group(d: Value, count: int, valid: Value | None) -> None:
            """`count` vectors of the head from element `d` on; the last one has `valid` lanes."""
            starts = [(row, row * self.padded + v * self.width) for row in range(self.rows) for v in range(count)]
            sums = [out.at(d).load(at, self.width) * scales[row] for row, at in starts]

            def load(key: Value) -> list[Value]:
                source = values.at(key * value_step).at(d)
                masks = [valid if v == count - 1 else None for v in range(count)]
                return [source.load_f32(v * self.width, self.width, valid=mask) for v, mask in enumerate(masks)]

            def spread(weight: Value) -> Value:
                return b.broadcast(weight, self.width)

            with b.for_(head, tail, 1, sums) as loop:
                sums = loop.values
                for j in range(self.keys):
                    v = load(loop.i * self.keys + j)
                    w = [spread(scores.load(loop.i * self.lanes + row * self.keys + j)) for row in range(self.rows)]
                    sums = [b.fma(x, y, s) for (x, y), s in zip(((x, y) for x in w for y in v), sums, strict=True)]
                loop.yield_(*sums)
            with b.for_(0, remaining, 1, loop.results) as loop:
                key = b.select(loop.i.lt(partial), loop.i, loop.i - partial + tail * self.keys)
                v = load(key)
                place = (key // self.keys) * self.lanes + key % self.keys
                weights = [scores.load(place + row * self.keys) for row in range(self.rows)]
                # Not s + 0 * y: a value that the row may not see can be NaN.
                terms = zip([(x, y) for x in weights for y in v], loop.values, strict=True)
                loop.yield_(*(b.select(x.lt(0.0), s, b.fma(spread(x), y, s)) for (x, y), s in terms))
            for (_, at), s in zip(starts, loop.results, strict=True):
                out.at(d).store(s, at)

        whole, rest = divmod(self.head_dim, self.width)
        count = min(whole, max(1, self.accumulators // self.rows))
        if count:
            with b.for_(0, whole // count * count * self.width, count * self.width) as loop:
                group(loop.i, count, None)
            if whole % count:
                group(b.i64(whole // count * count * self.width), whole % count, None)
        if rest:
            group(b.i64(whole * self.width), 1, b.i64(rest))


def lane_sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """A vector whose lane i is the sum of the lanes of `vectors[i]`, in about three instructions a vector.

    There are as many vectors as one has lanes (a power of two, at least 4), or a power of two times that.
    """
    n, rows = vectors[0].type.lanes, list(vectors)
    if len(rows) > n:
        return b.concat(*(lane_sums(b, rows[i : i + n]) for i in range(0, len(rows), n)))
    quads = range(0, n, 4)
    stages = [
        ([q + i for q in quads for i in (0, n, 1, n + 1)], 2),
        ([q + i for q in quads for i in (0, 1, n, n + 1)], 2),
    ]
    stages += [([i for i in range(2 * n) if not i & half], half) for half in (16, 8, 4) if half < n]
    for low, distance in stages:  # every shuffle is one instruction on x86
        high = [i + distance for i in low]
        rows = [b.shuffle(x, y, low) + b.shuffle(x, y, high) for x, y in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]
