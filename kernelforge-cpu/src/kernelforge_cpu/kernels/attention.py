"""attention over a KV cache or dense: online softmax over blocks of keys, several query rows at a time.

Work is cut into items: a block of consecutive tokens and a range of heads. In a cache, an item's tokens are cut into runs of one
slot and consecutive positions. All rows of a run (tokens times heads) go through the keys together, block by block, so that keys
and values come from memory once and in order; no score matrix exists (Milakov and Gimelshein 2018; Dao et al. 2022,
"FlashAttention"). What a bundle, the heads of one kv head, reads more than once is first copied together, as f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import ConfigSpace, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_size, size_of, strides_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import takes_rows

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Value
    from kernelforge_cpu.kernel import Count
    from kernelforge_cpu.kernels.attention_run import Run

GRAIN = 1 << 18
"""Pairs of elements (query, key) below which another thread costs more than it saves."""

MAX_HEAD_DIM = 512


def takes_attention(problem: Problem, device: DeviceInfo) -> Verdict:
    heads, size, groups = *problem.operand(0).shape[-2:], problem.operand(1).shape[-2]
    if not all(isinstance(d, int) for d in (heads, size, groups)):
        return Reject("takes static numbers of heads and head sizes")
    if isinstance(size, int) and size > MAX_HEAD_DIM:
        return Reject(f"takes heads of at most {MAX_HEAD_DIM} elements, not {size}")
    return takes_rows(problem, device)


def attention_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return ConfigSpace((("key_block", (64, 32, 128)),))


def build_attention(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.kernels.attention_run import Run

    k = new_kernel(problem, config, device)
    run = Run(k, problem, int(config["key_block"]))
    q = problem.operand(0)
    cached = problem.operands[3] is not None
    batch: Dim = q.shape[0] if q.rank == 4 else 1
    sequences, tokens = k.i64(1) if cached else run.size(batch), run.size(q.shape[-3])
    per_sequence = (tokens + (run.block - 1)) // run.block
    blocks = sequences * per_sequence
    # One block of tokens: each part has a range of heads. More: about two items a part, taken in turns, because later
    # blocks of a prompt see more keys.
    cuts = k.select(blocks.gt(1), k.binary("divu", k.parts * 2 + blocks - 1, k.max(blocks, 1)), k.parts)
    cuts = k.max(k.min(cuts, run.bundles), 1)
    with k.for_(k.part, blocks * cuts, k.parts) as item:
        block, cut = k.binary("divu", item.i, cuts), k.binary("remu", item.i, cuts)
        bundles = [k.binary("divu", (cut + i) * run.bundles, cuts) for i in (0, 1)]
        sequence, block = k.binary("divu", block, per_sequence), k.binary("remu", block, per_sequence)
        first = block * run.block
        end = k.min(first + run.block, tokens)
        if cached:
            emit_runs(k, problem, run, bundles, first, end)
        else:
            run.run(bundles, sequence, first, end - first, first + run.capacity - tokens)
    return NativeKernel((Phase(k.name, parts_of(problem, run)),), k.text())


def parts_of(problem: Problem, run: Run) -> Count:
    """One part for each thread; four when there are many blocks of tokens, which differ in length."""
    q = problem.operand(0)
    work = size_of(*q.shape, problem.operand(1).shape[-3])
    batch, tokens = size_of(*q.shape[:-3]), size_of(q.shape[-3])
    block, bundles = run.block, run.bundles

    def parts(dims: Sequence[int], threads: int) -> int:
        sizes = dict(zip(problem.dims, dims, strict=True))
        blocks = batch.evaluate(sizes) * -(-tokens.evaluate(sizes) // block)
        wanted = threads if blocks < 4 * threads or threads == 1 else 4 * threads
        return max(1, min(wanted, blocks * bundles, work.evaluate(sizes) // GRAIN))

    return parts


def emit_runs(k: KernelBuilder, problem: Problem, run: Run, bundles: Sequence[Value], first: Value, end: Value) -> None:
    """Cut tokens first..end into runs of one slot and consecutive positions; padding gets zeros."""
    steps = [emit_size(k, problem, strides_of(problem.operand(i))[0]) for i in (3, 4)]
    positions, slots = k.buffer(3, "i32"), k.buffer(4, "i32")
    none = k.i64(0)
    with k.for_(first, end + 1, 1, [none, none, none, none]) as loop:  # one more, to end the last run
        start, count, slot, position = loop.values
        token = k.min(loop.i, end - 1)
        here = k.convert(positions.load(token * steps[0]), "i64")
        owner = k.convert(slots.load(token * steps[1]), "i64")
        present = loop.i.lt(end)
        follows = present & count.gt(0) & owner.eq(slot) & here.eq(position + count)
        with k.if_(k.select(follows, 0, count).gt(0)):
            run.run(bundles, slot, start, count, position)
        with k.if_(present & here.lt(0)):
            run.zero(bundles, loop.i)
        alone = k.convert(present & here.ge(0), "i64", unsigned=True)
        loop.yield_(
            k.select(follows, start, loop.i),
            k.select(follows, count + 1, alone),
            k.select(follows, slot, owner),
            k.select(follows, position, here),
        )
