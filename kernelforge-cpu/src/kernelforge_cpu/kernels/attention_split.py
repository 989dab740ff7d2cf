"""Attention of few tokens over a cache: parts take ranges of keys, then one merges their sums.

A part's sums of a token are a record in scratch: weighted values [rows, padded], maxima [rows], sums of weights [rows], all
f32. In front of the records stands their number per token, 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge_cpu.kernel import NativeKernel, Phase, one_part
from kernelforge_cpu.kernels.axes import emit_inside, emit_size, size_of, strides_of
from kernelforge_cpu.kernels.common import new_kernel

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value
    from kernelforge_cpu.kernels.attention_access import Access
    from kernelforge_cpu.kernels.attention_single import Single, Sums

FEW_TOKENS = 8

GRAIN = 1 << 14
"""Pairs of elements (query, key) that are worth a part."""

PARTS_PER_THREAD = 2
"""Parts are taken in turns: a thread may come late."""

CHUNK = 16
"""Keys; ranges are multiples of it, so that their scores are whole vectors."""

SCRATCH = 7
"""Buffer: after the operands and the result."""

HEADER = 16
"""f32 elements: a cache line."""


def few_tokens(problem: Problem) -> bool:
    tokens = problem.operand(0).shape[0]
    return problem.operands[3] is not None and isinstance(tokens, int) and 1 <= tokens <= FEW_TOKENS


def build(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.emit import KernelBuilder, module_text
    from kernelforge_cpu.kernels.attention_access import Access
    from kernelforge_cpu.kernels.attention_single import Single

    k = new_kernel(problem, config, device)
    tokens, heads, size = problem.operand(0).static_shape()
    access = Access(k, problem)
    single = Single(access, int(config["key_block"]), streamed=bool(config["ahead"]))
    record = -(-single.rows * (single.padded + 2) // 16) * 16
    least = max(CHUNK, GRAIN // max(1, heads * size))
    merge = KernelBuilder(f"{k.name}_merge", k.target)
    work = size_of(*problem.operand(0).shape, problem.operand(1).shape[-3])

    def most(threads: int) -> int:
        return 1 if threads == 1 else PARTS_PER_THREAD * threads

    def parts(dims: Sequence[int], threads: int) -> int:
        return max(1, min(most(threads), work.evaluate(dict(zip(problem.dims, dims, strict=True))) // GRAIN))

    def scratch(dims: Sequence[int], threads: int) -> int:
        return 4 * (HEADER + most(threads) * tokens * record)

    def text() -> str:
        _emit_ranges(k, single, problem, least, record)
        _emit_merge(merge, Access(merge, problem), single, tokens, least, record)
        return module_text(k, merge)

    return NativeKernel((Phase(k.name, parts), Phase(merge.name, one_part)), text, scratch=scratch)


def _sums(k: KernelBuilder, rows: int, padded: int, at: Value) -> Sums:
    """The record that begins at element `at`."""
    from kernelforge_cpu.kernels.attention_single import Sums

    start = k.buffer(SCRATCH, "f32").at(at)
    return Sums(start, start.at(rows * padded), start.at(rows * (padded + 1)))


def _emit_ranges(k: KernelBuilder, single: Single, problem: Problem, least: int, record: int) -> None:
    """Each part's range of keys. A token whose keys are in one range is done here."""
    access = single.access
    tokens = problem.operand(0).static_shape()[0]
    bundles = (k.i64(0), k.i64(access.bundles))
    with k.if_(k.part.eq(0)):
        k.buffer(SCRATCH, "i64").store(k.parts)
    with k.for_(0, tokens) as token:
        slot, first, count, length = _ranges(k, access, token.i, k.parts, least)
        lo = length * k.part
        with k.if_(lo.lt(count) | k.part.eq(0)):
            sums = _sums(k, single.rows, single.padded, (k.part * tokens + token.i) * record + HEADER)
            single.attend(sums, bundles, slot, token.i, first + lo, first + k.min(lo + length, count))
            with k.if_(length.ge(count)):
                single.store(sums, bundles, k.i64(0), token.i)


def _ranges(
    k: KernelBuilder, access: Access, token: Value, parts: Value, least: int
) -> tuple[Value, Value, Value, Value]:
    """Slot, first key and number of keys of a token, and the length of a range: at least `least` keys, so that a short
    context is left to few parts. Padding has no keys."""
    steps = [emit_size(k, access.problem, strides_of(access.problem.operand(i))[0]) for i in (3, 4)]
    position = k.convert(k.buffer(3, "i32").load(token * steps[0]), "i64")
    slot = k.convert(k.buffer(4, "i32").load(token * steps[1]), "i64")
    present = position.ge(0) & emit_inside(slot, access.slots)
    slot = k.select(present, slot, 0)
    first, end = access.visible(position, access.limit(slot))
    count = k.select(present, k.max(end - first, 0), 0)
    ranges = k.max(k.min(k.binary("divu", count, k.i64(least)), parts), 1)
    length = k.binary("divu", count + ranges - 1, ranges)
    return slot, first, count, (length + (CHUNK - 1)) // CHUNK * CHUNK


def _emit_merge(k: KernelBuilder, access: Access, single: Single, tokens: int, least: int, record: int) -> None:
    """A row's result from its sums in several records: each is relative to a maximum of its own."""
    parts = k.buffer(SCRATCH, "i64").load()
    with k.for_(0, tokens) as token:
        _, _, count, length = _ranges(k, access, token.i, parts, least)
        with k.if_(length.lt(count)):
            used = k.binary("divu", count + length - 1, length)
            with k.for_(0, single.rows) as row:
                _emit_row(k, access, single, tokens, record, token.i, row.i, used)


def _emit_row(
    k: KernelBuilder, access: Access, single: Single, tokens: int, record: int, token: Value, row: Value, used: Value
) -> None:
    from kernelforge_cpu.vmath import exp_decay

    low, width, padded = float("-inf"), single.tile.width, single.padded
    row_sum = k.alloca("f32", padded)

    def part_sums(part: Value) -> tuple[Value, Value, Pointer]:
        sums = _sums(k, single.rows, padded, (part * tokens + token) * record + HEADER)
        return sums.top.load(row), sums.total.load(row), sums.out.at(row * padded)

    with k.for_(0, used, 1, [k.f32(low)]) as loop:
        top, _, _ = part_sums(loop.i)
        loop.yield_(k.max(top, loop.values[0]))
    pivot = k.select(loop.results[0].eq(low), 0.0, loop.results[0])
    starts = range(0, padded, width)
    with k.for_(0, used, 1, [k.f32(0.0), *[k.f32(0.0, width) for _ in starts]]) as loop:
        total, *sums = loop.values
        top, part_total, out = part_sums(loop.i)
        scale = exp_decay(k, top - pivot)
        spread = k.broadcast(scale, width)
        added = [k.fma(out.load(d, width), spread, s) for d, s in zip(starts, sums, strict=True)]
        loop.yield_(k.fma(part_total, scale, total), *added)
    total, *sums = loop.results
    for d, s in zip(starts, sums, strict=True):
        row_sum.store(s, d)
    access.store_result(row_sum, total, k.i64(0), token, row, width)
