"""Attention of one token: its query rows against keys and values as they are in the cache, in order.

Blocks of keys are the outer loop and kv heads the inner one: the rows of a block lie together, so that memory is read once
and from front to back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kernelforge_cpu.kernels.attention_tile import Tile
from kernelforge_cpu.kernels.cores import LINE

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Pointer, Value
    from kernelforge_cpu.kernels.attention_access import Access


class Sums(NamedTuple):
    """Of rows, a bundle's side by side: f32 [rows, padded] sums of weighted values, and [rows] maxima and sums of weights."""

    out: Pointer
    top: Pointer
    total: Pointer


class Single:
    """Emits the attention of one token for some bundles."""

    def __init__(self, access: Access, key_block: int, *, streamed: bool) -> None:
        """`streamed`: the next block's keys and values are asked for while a block is worked on."""
        self.access, self.key_block, self.streamed = access, key_block, streamed
        k, heads, size = access.k, access.heads, access.head_dim
        width = k.lanes
        while size % width and width > 4:
            width //= 2
        if size % width:
            width = max(4, min(k.lanes, 1 << (size - 1).bit_length()))
        dtype = "f32" if access.quantised else access.problem.operand(1).dtype
        self.tile = Tile(
            *(heads, key_block, k.lanes, width, size, dtype, access.softcap, access.registers),
            direct=True,
            streamed=streamed and not access.quantised,
        )
        self.padded = self.tile.padded
        self.rows = heads * access.bundles
        self.queries = k.alloca("f32", max(1, self.rows) * self.padded)
        self.scores = k.alloca("f32", heads * key_block)
        self.scales = k.alloca("f32", heads)
        copied = key_block * self.padded if access.quantised else 0
        self.copies = [k.alloca("f32", copied) for _ in range(2)] if copied else []
        self.firsts, self.ends = (k.alloca("i32", heads) for _ in range(2))

    def attend(
        self, sums: Sums, bundles: Sequence[Value], sequence: Value, token: Value, first: Value, end: Value
    ) -> None:
        """Fill the bundles' `sums` with what keys first..end of one slot or sequence contribute."""
        k, heads = self.access.k, self.access.heads
        rows = (bundles[1] - bundles[0]) * heads
        zero = k.f32(0.0, self.tile.width)
        with k.for_(0, rows) as row:
            at = row.i * self.padded
            for d in range(0, self.padded, self.tile.width):
                sums.out.at(at).store(zero, d)
            sums.top.store(k.f32(float("-inf")), row.i)
            sums.total.store(k.f32(0.0), row.i)
            head = bundles[0] * heads + row.i
            self.access.load_query(sequence, token, head, self.queries.at(at), self.tile.width)
        with k.for_(0, heads) as row:
            self.firsts.store(k.const(0, k.convert(row.i, "i32").type), row.i)
        with k.for_(first, end, self.key_block) as block:
            count = k.min(end - block.i, self.key_block)
            # In the last block each row asks for itself, which is there.
            ahead = k.min(end - block.i - count, self.key_block)
            with k.for_(0, heads) as row:
                self.ends.store(k.convert(count, "i32"), row.i)
            with k.for_(bundles[0], bundles[1]) as bundle:
                self._block(sums, sequence, bundle.i, (bundle.i - bundles[0]) * heads, block.i, count, ahead)

    def _block(
        self, sums: Sums, sequence: Value, bundle: Value, row: Value, first: Value, count: Value, ahead: Value
    ) -> None:
        access, k, tile = self.access, self.access.k, self.tile
        group = access.group_of(bundle)
        keys, values = access.key_row(sequence, first, group), access.value_row(sequence, first, group)
        key_step, value_step = access.key_steps[1], access.value_steps[1]
        if self.copies:
            keys, values = (
                self._widened(*each, count, ahead)
                for each in zip((keys, values), (key_step, value_step), self.copies, strict=True)
            )
            key_step = value_step = k.i64(self.padded)

        def far(step: Value) -> list[Value]:
            return [ahead * step] if tile.streamed else []

        k.call(tile.scores(k), self.queries.at(row * self.padded), keys, key_step, self.scores, count, *far(key_step))
        weights = (self.scores, sums.top.at(row), sums.total.at(row), self.scales, self.firsts, self.ends, count)
        with k.if_(count.eq(self.key_block)) as whole:
            k.call(tile.softmax(k, masked=False), *weights)
        with whole.else_():
            k.call(tile.softmax(k, masked=True), *weights)
        out = sums.out.at(row * self.padded)
        seen = (k.i64(0), count, count, self.firsts, self.ends)
        k.call(tile.values(k), out, self.scores, values, value_step, self.scales, *seen, *far(value_step))

    def _widened(self, rows: Pointer, step: Value, copy: Pointer, count: Value, ahead: Value) -> Pointer:
        """`count` rows of a quantised cache as f32 [count, padded]: each is read for several queries."""
        with self.access.k.for_(0, count) as key:
            row, to = rows.at(key.i * step), copy.at(key.i * self.padded)
            if self.streamed:
                for line in range(0, self.access.row_bytes, LINE):
                    row.at(ahead * step).prefetch(line, locality=2)
            for d in range(0, self.padded, self.tile.width):
                to.store(self.access.load_row(row, d, self.tile.width), d)
        return copy

    def store(self, sums: Sums, bundles: Sequence[Value], sequence: Value, token: Value) -> None:
        """Write the token's results from its sums over all keys."""
        k, heads = self.access.k, self.access.heads
        with k.for_(0, (bundles[1] - bundles[0]) * heads) as row:
            head = bundles[0] * heads + row.i
            source = sums.out.at(row.i * self.padded)
            self.access.store_result(source, sums.total.load(row.i), sequence, token, head, self.tile.width)
