"""One run of attention: the query rows of consecutive tokens against the keys of one slot or sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge_cpu.kernels.attention_tile import Tile
from kernelforge_cpu.kernels.axes import Size, emit_size, size_of, strides_of

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

MAX_ROWS = 64
"""Query rows that go through the keys together: enough to make reading keys and values again and again cheap."""

STATE_BYTES = 128 * 1024
"""Stack for the rows' queries and sums: what stays in any second-level cache."""

BUNDLE_HEADS = 16
"""More heads of one kv head than this are shared out."""

FAR = 1 << 30
"""A window of this many positions hides nothing."""


class Run:
    """Emits runs of one attention kernel. `sequence` is a slot of the cache, or the number of a dense sequence."""

    def __init__(self, k: KernelBuilder, problem: Problem, key_block: int) -> None:
        self.k, self.problem, self.key_block = k, problem, key_block
        q, keys, values, out = (problem.operand(0), problem.operand(1), problem.operand(2), problem.results[0])
        tokens, heads, head_dim = q.shape[-3:]
        groups = keys.shape[-2]
        assert isinstance(heads, int)
        assert isinstance(head_dim, int)
        assert isinstance(groups, int)
        self.head_dim = head_dim
        per_group = heads // groups if groups else 1
        # A bundle is the heads of one kv head or, when they are many, a part of them that divides evenly.
        self.heads = max(n for n in range(1, BUNDLE_HEADS + 1) if per_group % n == 0)
        self.bundles = heads // self.heads
        self.bundles_per_group = per_group // self.heads
        padded = self._tile(1, "f32").padded
        self.rows = min(MAX_ROWS, STATE_BYTES // (8 * padded)) // 4 * 4  # whole tiles
        self.block = 1
        """Tokens of the longest run."""
        while 2 * self.block * self.heads <= self.rows and (isinstance(tokens, str) or self.block < tokens):
            self.block *= 2

        # One token alone may be one tile, which reads the cache directly; more tiles share a copy of each block.
        self.alone = self._tile(4 if self.heads > 2 else self.heads, keys.dtype) if self.heads <= 4 else None
        self.shared = self._tile(4, "f32") if self.block > 1 or self.alone is None else None

        self.q, self.keys, self.values = (k.buffer(i, t.dtype) for i, t in enumerate((q, keys, values)))
        self.out = k.buffer(6, out.dtype)
        self.steps = [self._steps(strides_of(t)) for t in (q, keys, values, out)]
        self.capacity = self.size(keys.shape[-3])

        # Less when all rows of a block of tokens are fewer.
        self.rows = min(self.rows, max(1, self.bundles) * -(-self.block * self.heads // 4) * 4)
        self.scratch_q, self.scratch_out = (k.alloca("f32", self.rows * padded) for _ in range(2))
        self.top, self.total = (k.alloca("f32", self.rows * self._lanes()) for _ in range(2))
        self.scores = k.alloca("f32", 4 * key_block)
        self.copies = [k.alloca("f32", key_block * padded) for _ in range(2)] if self.shared else []

    def size(self, dim: Dim) -> Value:
        return emit_size(self.k, self.problem, size_of(dim))

    def _steps(self, strides: Sequence[Size]) -> list[Value]:
        """Steps in elements of (slot or sequence, token or key, head); a tensor of rank 3 has one sequence."""
        padded = (*(Size(0),) * (4 - len(strides)), *strides)
        return [emit_size(self.k, self.problem, s) for s in padded[:3]]

    def _lanes(self) -> int:
        """Of a vector of scores: at least 8 partial products hide the latency of their additions."""
        return max(8, self.k.lanes)

    def _tile(self, rows: int, dtype: str) -> Tile:
        k, softcap = self.k, self.problem.attr("softcap")
        assert isinstance(softcap, float)
        width = k.lanes
        while self.head_dim % width and width > 4:
            width //= 2
        if self.head_dim % width:
            width = max(4, min(k.lanes, 1 << (self.head_dim - 1).bit_length()))
        few_registers = k.target.arch == "x86_64" and k.lanes < 16
        return Tile(rows, self._lanes(), width, self.head_dim, dtype, softcap, 8 if few_registers else 16)

    def zero(self, bundles: Sequence[Value], token: Value) -> None:
        k = self.k
        with k.for_(bundles[0] * self.heads, bundles[1] * self.heads) as head:
            out = self._row(3, self.out, k.i64(0), token, head.i)
            k.vectorize(0, self.head_dim, lambda d, valid: out.store(k.f32(0.0, k.lanes), d, valid=valid))

    def _visible(self, position: Value, limit: Value) -> tuple[Value, Value]:
        """First and end of the keys that a token at `position` sees (i64, or vectors of i32 for one token a lane)."""
        k, window = self.k, self.problem.attr("window")
        assert isinstance(window, int)
        end = k.min(position + 1, limit) if self.problem.attr("causal") else k.value(limit, position.type)
        first = k.max(position - (window - 1), 0) if 0 < window < FAR else k.const(0, position.type)
        return first, end

    def _limit(self, sequence: Value) -> Value:
        """The end of the keys that exist, lengths counted."""
        k = self.k
        if self.problem.operands[5] is None:
            return self.capacity
        step = emit_size(k, self.problem, strides_of(self.problem.operand(5))[0])
        return k.min(k.convert(k.buffer(5, "i32").load(sequence * step), "i64"), self.capacity)

    def _token(self, row: Value, count: Value) -> Value:
        """The token, of `count` in the run, to which a row belongs; the last one for rows that only fill a tile."""
        k = self.k
        token = (
            row if self.heads == 1 else (row * (65536 // self.heads + 1)) >> 16
        )  # row // heads, exact for small rows
        return k.min(token, count - 1)

    def _row(self, which: int, pointer: Pointer, sequence: Value, token: Value, head: Value) -> Pointer:
        """The row of q (0) or the result (3)."""
        steps = self.steps[which]
        return pointer.at(sequence * steps[0] + token * steps[1] + head * steps[2])

    def run(self, bundles: Sequence[Value], sequence: Value, start: Value, count: Value, position: Value) -> None:
        """`count` tokens from `start` on, the first one at `position`, against the keys of one slot or sequence."""
        k, alone, shared = self.k, self.alone, self.shared
        if alone is None or shared is None:
            tile = alone or shared
            assert tile is not None
            self._run_tiles(tile, bundles, sequence, start, count, position)
            return
        with k.if_(count.gt(1)) as branch:
            self._run_tiles(shared, bundles, sequence, start, count, position)
        with branch.else_():
            self._run_tiles(alone, bundles, sequence, start, count, position)

    def _run_tiles(
        self, tile: Tile, bundles: Sequence[Value], sequence: Value, start: Value, count: Value, position: Value
    ) -> None:
        """The run's rows in tiles, as many bundles at a time as there is scratch for."""
        k = self.k
        rows = count * self.heads
        tiles = (rows + (tile.rows - 1)) // tile.rows
        together = k.binary("divu", k.i64(self.rows), tiles * tile.rows)
        limit = self._limit(sequence)
        first, _ = self._visible(position, limit)
        _, end = self._visible(position + count - 1, limit)
        with k.for_(bundles[0], bundles[1], together) as some:
            here = k.min(together, bundles[1] - some.i)
            with k.for_(0, here) as bundle:
                head = (some.i + bundle.i) * self.heads
                self._load_queries(tile, bundle.i * tiles, sequence, start, head, rows, tiles)
            with k.for_(first, end, self.key_block) as block, k.for_(0, here) as bundle:
                group = k.binary("divu", some.i + bundle.i, k.i64(self.bundles_per_group))
                stop = k.min(block.i + self.key_block, end)
                sources = self._block(tile, sequence, group, block.i, stop)
                with k.for_(0, tiles) as t:
                    self._call_tile(tile, bundle.i * tiles + t.i, t.i, sources, count, position, limit, block.i)
            with k.for_(0, here) as bundle:
                head = (some.i + bundle.i) * self.heads
                self._store_results(tile, bundle.i * tiles, sequence, start, head, rows)

    def _block(
        self, tile: Tile, sequence: Value, group: Value, first: Value, end: Value
    ) -> list[tuple[Pointer, Value]]:
        """Where a tile finds the keys and the values of the block: address of the first row, and row step in elements."""
        k = self.k
        found: list[tuple[Pointer, Value]] = []
        for i, source in enumerate((self.keys, self.values)):
            steps = self.steps[1 + i]
            rows = source.at(sequence * steps[0] + first * steps[1] + group * steps[2])
            if tile is self.alone:
                found.append((rows, steps[1]))
                continue
            copy = self.copies[i]
            with k.for_(0, end - first) as row:
                src, dst = rows.at(row.i * steps[1]), copy.at(row.i * tile.padded)
                self._widen(tile, src, dst, 1.0)
            found.append((copy, k.i64(tile.padded)))
        return found

    def _widen(self, tile: Tile, source: Pointer, to: Pointer, factor: float) -> None:
        """A row of a head to scratch: f32, scaled, zeros to whole vectors."""
        k = self.k
        for d in range(0, tile.padded, tile.width):
            valid = k.i64(self.head_dim - d) if d + tile.width > self.head_dim else None
            x = source.load_f32(d, tile.width, valid=valid)
            to.store(x if factor == 1.0 else x * factor, d)

    def _load_queries(
        self, tile: Tile, place: Value, sequence: Value, start: Value, head: Value, rows: Value, tiles: Value
    ) -> None:
        """Scaled queries of a bundle into tiles `place`.., zeros for rows that only fill a tile, and empty sums."""
        k, scale, softcap = self.k, self.problem.attr("scale"), self.problem.attr("softcap")
        assert isinstance(scale, float)
        assert isinstance(softcap, float)
        factor = (scale or 1.0 / math.sqrt(self.head_dim)) / (softcap or 1.0)
        size = tile.rows * tile.padded
        with k.for_(place * size, (place + tiles) * size, tile.width) as clear:
            for scratch in (self.scratch_q, self.scratch_out):
                scratch.store(k.f32(0.0, tile.width), clear.i)
        with k.for_(place, place + tiles) as t:
            self.top.store(k.f32(float("-inf"), tile.lanes), t.i * tile.lanes)
            self.total.store(k.f32(0.0, tile.lanes), t.i * tile.lanes)
        with k.for_(0, rows) as row:
            token = self._token(row.i, rows)
            source = self._row(0, self.q, sequence, start + token, head + row.i - token * self.heads)
            self._widen(tile, source, self.scratch_q.at(place * size + row.i * tile.padded), factor)

    def _call_tile(
        self,
        tile: Tile,
        place: Value,
        t: Value,
        sources: list[tuple[Pointer, Value]],
        count: Value,
        position: Value,
        limit: Value,
        first: Value,
    ) -> None:
        """Tile `t` of a run (tile `place` of the scratch) against the block of keys that begins at `first`."""
        k = self.k
        row = t * tile.rows
        tokens = [position + self._token(r, count) for r in (row, row + (tile.rows - 1))]
        (_, seen_end), (seen_first, last_end) = (self._visible(token, limit) for token in tokens)
        end = k.min(first + self.key_block, last_end)
        with k.if_(first.lt(end)):
            lane_row = k.consts([lane // tile.keys for lane in range(tile.lanes)], "i32") + k.convert(row, "i32")
            lane_token = k.convert(position, "i32") + self._token(lane_row, k.convert(count, "i32"))
            # Of the block: its first key is number 0.
            bounds = [k.convert(b - first, "i64") for b in (end, seen_first, seen_end)]
            row_bounds = [
                k.value(b, lane_token.type) - k.convert(first, "i32")
                for b in self._visible(lane_token, k.convert(limit, "i32"))
            ]
            (keys, key_step), (values, value_step) = sources
            at = place * (tile.rows * tile.padded)
            k.call(
                tile.function(k),
                *(self.scratch_q.at(at), self.scratch_out.at(at)),
                *(p.at(place * tile.lanes) for p in (self.top, self.total)),
                *(self.scores, keys, values, key_step, value_step, *bounds, *row_bounds),
            )

    def _store_results(self, tile: Tile, place: Value, sequence: Value, start: Value, head: Value, rows: Value) -> None:
        """out = sums of weighted values / sums of weights; 0 for a row that saw no key."""
        k = self.k
        with k.for_(0, rows) as row:
            token = self._token(row.i, rows)
            at = place * tile.rows + row.i
            weight = k.reduce_add(self.total.load(at * tile.keys, tile.keys))
            weight = k.select(weight.eq(0.0), 1.0, weight)
            source = self.scratch_out.at(at * tile.padded)
            to = self._row(3, self.out, sequence, start + token, head + row.i - token * self.heads)

            def store(d: Value, valid: Value | None) -> None:
                to.store(source.load(d, tile.width) / weight, d, valid=valid)

            k.vectorize(0, self.head_dim, store, lanes=tile.width)
