"""attention over a KV cache or dense: online softmax over blocks of keys; no score matrix is ever written (Milakov and
Gimelshein 2018; Dao et al. 2022, "FlashAttention").

Many tokens: work is cut into items, a block of consecutive tokens and a range of kv heads. In a cache, an item's tokens are
cut into runs of one slot and consecutive positions, whose rows go through the keys together. Few tokens: each part takes a
range of keys for all heads, and a second phase merges what the parts found (Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError
from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_inside, emit_size, size_of, strides_of
from kernelforge_cpu.kernels.cache import as_plain
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.cores import reads_far
from kernelforge_cpu.kernels.strided import takes_rows

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Value
    from kernelforge_cpu.kernel import Count
    from kernelforge_cpu.kernels.attention_access import Access
    from kernelforge_cpu.kernels.attention_run import Run
    from kernelforge_cpu.kernels.attention_single import Single, Sums

GRAIN = 1 << 18
"""Pairs of elements (query, key) below which another thread costs more than it saves."""

ITEMS_PER_THREAD = 16
"""Parts are taken in turns: blocks of tokens differ in length."""

MAX_HEAD_DIM = 512
KEY_BLOCKS = (64, 32, 128)


def takes_attention(problem: Problem, device: DeviceInfo) -> Verdict:
    heads, size, groups = *problem.operand(0).shape[-2:], problem.operand(1).shape[-2]
    if not all(isinstance(d, int) for d in (heads, size, groups)):
        return Reject("takes static numbers of heads and head sizes")
    if isinstance(size, int) and size > MAX_HEAD_DIM:
        return Reject(f"takes heads of at most {MAX_HEAD_DIM} elements, not {size}")
    verdict = takes_rows(as_plain(problem), device)
    if isinstance(verdict, Accept) and not any(fits_stack(problem, n, device) for n in KEY_BLOCKS):
        return Reject(f"takes heads whose rows fit the stack, not {heads} of {size} elements over {groups} kv heads")
    return verdict


def attention_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`ahead`: whether a single token asks for the next block of a cache while it works on one."""
    fits = "the blocks do not fit the stack", lambda c: fits_stack(problem, int(c["key_block"]), device)
    ahead = (0,) if problem.operands[3] is None else (1, 0) if reads_far(device) else (0, 1)
    return ConfigSpace((("key_block", KEY_BLOCKS), ("ahead", ahead)), (fits,))


@lru_cache(maxsize=64)
def fits_stack(problem: Problem, key_block: int, device: DeviceInfo) -> bool:
    """Whether a kernel may keep on the stack what it takes for blocks of so many keys: see `emit.KernelBuilder.alloca`."""
    try:
        build_attention(problem, {"key_block": key_block, "ahead": 0}, device)
    except UsageError:
        return False
    return True


def build_attention(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.kernels import attention_split

    if attention_split.few_tokens(problem):
        return attention_split.build(problem, config, device)
    return _build_blocks(problem, config, device)


def _build_blocks(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.kernels.attention_access import Access
    from kernelforge_cpu.kernels.attention_run import Run
    from kernelforge_cpu.kernels.attention_single import Single, Sums

    k = new_kernel(problem, config, device)
    access = Access(k, problem)
    key_block = int(config["key_block"])
    run, single, sums = Run(access, key_block), None, None
    if problem.operands[3] is not None:
        single = Single(access, key_block, streamed=bool(config["ahead"]))
        rows = max(1, single.rows)
        sums = Sums(k.alloca("f32", rows * single.padded), k.alloca("f32", rows), k.alloca("f32", rows))

    def text() -> str:
        _emit_blocks(access, run, single, sums)
        return k.text()

    return NativeKernel((Phase(k.name, parts_of(problem, run)),), text)


def _emit_blocks(access: Access, run: Run, single: Single | None, sums: Sums | None) -> None:
    k, problem = access.k, access.problem
    q = problem.operand(0)
    batch: Dim = q.shape[0] if q.rank == 4 else 1
    sequences, tokens = k.i64(1) if single is not None else access.size(batch), access.size(q.shape[-3])
    per_sequence = (tokens + (run.block - 1)) // run.block
    blocks = sequences * per_sequence
    with k.for_(k.part, blocks * access.bundles, k.parts) as item:
        # From the end: later blocks of a prompt see more keys, and the longest come first.
        last = blocks * access.bundles - 1 - item.i
        block, bundle = (k.binary(op, last, k.i64(access.bundles)) for op in ("divu", "remu"))
        bundles = (bundle, bundle + 1)
        sequence, block = k.binary("divu", block, per_sequence), k.binary("remu", block, per_sequence)
        first = block * run.block
        end = k.min(first + run.block, tokens)
        if single is not None and sums is not None:
            _emit_runs(access, run, single, sums, bundles, first, end)
        else:
            run.run(bundles, sequence, first, end - first, first + access.capacity - tokens)


def parts_of(problem: Problem, run: Run) -> Count:
    """One part for each thread, more when there are many blocks of tokens, which differ in length."""
    q = problem.operand(0)
    work = size_of(*q.shape, problem.operand(1).shape[-3])
    batch, tokens = size_of(*q.shape[:-3]), size_of(q.shape[-3])
    block, bundles = run.block, run.access.bundles

    def parts(dims: Sequence[int], threads: int) -> int:
        sizes = dict(zip(problem.dims, dims, strict=True))
        items = batch.evaluate(sizes) * -(-tokens.evaluate(sizes) // block) * bundles
        wanted = 1 if threads == 1 else ITEMS_PER_THREAD * threads
        return max(1, min(wanted, items, work.evaluate(sizes) // GRAIN))

    return parts


def _emit_runs(
    access: Access, run: Run, single: Single, sums: Sums, bundles: Sequence[Value], first: Value, end: Value
) -> None:
    """Cut tokens first..end into runs of one slot and consecutive positions; padding and slots that are not there give zeros."""
    k, problem = access.k, access.problem
    steps = [emit_size(k, problem, strides_of(problem.operand(i))[0]) for i in (3, 4)]
    positions, slots = k.buffer(3, "i32"), k.buffer(4, "i32")
    none = k.i64(0)
    with k.for_(first, end + 1, 1, [none, none, none, none]) as loop:  # one more, to end the last run
        start, count, slot, position = loop.values
        token = k.min(loop.i, end - 1)
        here = k.convert(positions.load(token * steps[0]), "i64")
        owner = k.convert(slots.load(token * steps[1]), "i64")
        here = k.select(emit_inside(owner, access.slots), here, -1)
        present = loop.i.lt(end)
        follows = present & count.gt(0) & owner.eq(slot) & here.eq(position + count)
        done = k.select(follows, 0, count)
        with k.if_(done.eq(1)):
            seen = access.visible(position, access.limit(slot))
            single.attend(sums, bundles, slot, start, *seen)
            single.store(sums, bundles, slot, start)
        with k.if_(done.gt(1)):
            run.run(bundles, slot, start, count, position)
        with k.if_(present & here.lt(0)):
            access.store_zeros(bundles, loop.i)
        alone = k.convert(present & here.ge(0), "i64", unsigned=True)
        loop.yield_(
            k.select(follows, start, loop.i),
            k.select(follows, count + 1, alone),
            k.select(follows, slot, owner),
            k.select(follows, position, here),
        )
