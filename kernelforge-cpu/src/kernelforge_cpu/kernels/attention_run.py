"""Attention of a run: consecutive tokens of one slot or sequence, whose query rows go through the keys together.

Each block of keys is transposed and each block of values copied to scratch, as f32, once for all rows of a bundle (the heads
of one kv head times the tokens). Then tiles of rows go over it: keys and values come from memory once for many rows, and
products are those of a matrix multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge_cpu.kernels.attention_tile import Tile

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Pointer, Value
    from kernelforge_cpu.kernels.attention_access import Access

MAX_ROWS = 96
"""Query rows that go through the keys together: enough to make preparing a block of keys cheap."""

STATE_BYTES = 128 * 1024
"""Stack for the rows' queries and sums: what stays in any second-level cache."""


class Run:
    """Emits runs of one attention kernel."""

    def __init__(self, access: Access, key_block: int) -> None:
        self.access, self.key_block = access, key_block
        k, size = access.k, access.head_dim
        rows = access.registers // 2
        self.tile = Tile(rows, key_block, k.lanes, k.lanes, size, "f32", access.softcap, access.registers, direct=False)
        self.padded = self.tile.padded
        self.rows = max(1, min(MAX_ROWS, STATE_BYTES // (8 * self.padded)) // rows) * rows
        self.block = max(1, self.rows // access.heads)
        """Tokens of the longest run."""
        if isinstance(access.tokens, int):
            self.block = max(1, min(self.block, access.tokens))
            self.rows = -(-self.block * access.heads // rows) * rows
        self.rows = max(self.rows, -(-access.heads // rows) * rows)
        self.queries, self.out = (k.alloca("f32", self.rows * self.padded) for _ in range(2))
        self.top, self.total = (k.alloca("f32", self.rows) for _ in range(2))
        self.scores = k.alloca("f32", rows * key_block)
        self.scales = k.alloca("f32", rows)
        self.firsts, self.ends = (k.alloca("i32", rows) for _ in range(2))
        self.keys = k.alloca("f32", key_block * -(-size // k.lanes) * k.lanes)
        self.values = k.alloca("f32", key_block * self.padded)

    def run(self, bundles: Sequence[Value], sequence: Value, start: Value, count: Value, position: Value) -> None:
        """`count` tokens from `start` on, the first one at `position`, against the keys of one slot or sequence."""
        access, k = self.access, self.access.k
        rows = count * access.heads
        limit = access.limit(sequence)
        first, _ = access.visible(position, limit)
        _, end = access.visible(position + (count - 1), limit)
        with k.for_(bundles[0], bundles[1]) as bundle:
            head, group = bundle.i * access.heads, access.group_of(bundle.i)
            self._load(sequence, start, head, rows)
            with k.for_(first, end, self.key_block) as block:
                keys = k.min(end - block.i, self.key_block)
                self._transpose(access.key_row(sequence, block.i, group), keys)
                self._copy(access.value_row(sequence, block.i, group), keys)
                with k.for_(0, rows, self.tile.rows) as row:
                    self._tile(row.i, position, rows, limit, block.i, keys)
            with k.for_(0, rows) as row:
                token, h = self._place(row.i, rows)
                source = self.out.at(row.i * self.padded)
                access.store_result(source, self.total.load(row.i), sequence, start + token, head + h, k.lanes)

    def _place(self, row: Value, rows: Value) -> tuple[Value, Value]:
        """Token of the run and head of the bundle of a row; those of the last one for rows that only fill a tile."""
        k, heads = self.access.k, self.access.heads
        row = k.min(row, rows - 1)
        if heads == 1:
            return row, k.i64(0)
        token = (row * (65536 // heads + 1)) >> 16  # row // heads, exact for small rows
        return token, row - token * heads

    def _load(self, sequence: Value, start: Value, head: Value, rows: Value) -> None:
        """Scaled queries, the last one again in rows that only fill a tile, and empty sums."""
        k, tile = self.access.k, self.tile
        with k.for_(0, (rows + (tile.rows - 1)) // tile.rows * tile.rows) as row:
            token, h = self._place(row.i, rows)
            at = row.i * self.padded
            self.access.load_query(sequence, start + token, head + h, self.queries.at(at), k.lanes)
            for d in range(0, self.padded, k.lanes):
                self.out.at(at).store(k.f32(0.0, k.lanes), d)
            self.top.store(k.f32(float("-inf")), row.i)
            self.total.store(k.f32(0.0), row.i)

    def _transpose(self, source: Pointer, keys: Value) -> None:
        """The block's keys to f32 [head_dim, key_block]."""
        k, size, n, step = self.access.k, self.access.head_dim, self.access.k.lanes, self.access.key_steps[1]
        with k.for_(0, keys, n) as first:
            # Past the end the last key is read again: its memory is there, its scores are hidden.
            rows = [source.at(k.min(first.i + j, keys - 1) * step) for j in range(n)]
            for d in range(0, size, n):
                columns = k.transpose([self.access.load_row(row, d, n) for row in rows])
                for j, column in enumerate(columns[: size - d]):
                    self.keys.at(first.i).store(column, (d + j) * self.key_block)

    def _copy(self, source: Pointer, keys: Value) -> None:
        """The block's values to f32 [key_block, padded]."""
        k, size, n, step = self.access.k, self.access.head_dim, self.access.k.lanes, self.access.value_steps[1]
        with k.for_(0, keys) as key:
            row, to = source.at(key.i * step), self.values.at(key.i * self.padded)
            for d in range(0, size, n):
                to.store(self.access.load_row(row, d, n), d)

    def _tile(self, row: Value, position: Value, rows: Value, limit: Value, first: Value, keys: Value) -> None:
        """The rows from `row` on against the block of `keys` keys that begins at `first`."""
        access, k, tile = self.access, self.access.k, self.tile
        ends = [position + self._place(r, rows)[0] for r in (row, row + (tile.rows - 1))]
        (some_first, seen_end), (seen_first, some_end) = (access.visible(p, limit) for p in ends)
        end = k.min(some_end - first, keys)
        with k.if_(end.gt(0) & some_first.lt(first + keys)):
            # Keys head..tail are seen by every row, `end` is where no row sees any more.
            head = k.min(k.max(seen_first - first, 0), end)
            tail = k.max(k.min(seen_end - first, end), head)
            k.call(tile.scores(k), self.queries.at(row * self.padded), self.keys, k.i64(0), self.scores, end)
            weights = (self.scores, self.top.at(row), self.total.at(row), self.scales, self.firsts, self.ends, end)
            with k.if_((tail - head).eq(self.key_block)) as whole:
                k.call(tile.softmax(k, masked=False), *weights)
            with whole.else_():
                with k.for_(0, tile.rows) as r:
                    token, _ = self._place(row + r.i, rows)
                    bounds = access.visible(position + token, limit)
                    for to, bound in zip((self.firsts, self.ends), bounds, strict=True):
                        to.store(k.convert(k.max(k.min(bound - first, self.key_block), 0), "i32"), r.i)
                k.call(tile.softmax(k, masked=True), *weights)
            k.call(
                tile.values(k),
                *(self.out.at(row * self.padded), self.scores, self.values, k.i64(self.padded), self.scales),
                *(head, tail, end, self.firsts, self.ends),
            )
