"""Edge values of the transformer dialect's ops: masks, ends of ranges, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dialects.transformer.sampling import settled
from kernelforge.testing.values import changed

if TYPE_CHECKING:
    from kernelforge.problem import Problem

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = list[Array | None]
    Generator = np.random.Generator


def _present(arrays: Arrays, index: int) -> Array:
    found = arrays[index]
    assert found is not None
    return found


def _unwritten(a: Array) -> Array:
    """An element of `a` as memory that was never written may be: NaN."""
    return np.array((np.nan, -1) if a.dtype.names else np.nan, a.dtype)


def hidden(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Attention: keys and values that no query may see are NaN, as memory that was never written may be."""
    k, v = _present(arrays, 1), _present(arrays, 2)
    positions, slots, lengths = arrays[3:6]
    if positions is not None and slots is not None:
        for slot in range(len(k)):
            mine = positions[(slots == slot) & (positions >= 0)]
            last = int(mine.max(initial=-1)) + 1 if lengths is None else int(lengths[slot])
            k[slot, last:] = v[slot, last:] = _unwritten(k)
    elif lengths is not None:
        for b, last in enumerate(lengths):
            for a in (k, v):
                (a[b] if a.ndim == 4 else a)[int(last) :] = _unwritten(a)
    return arrays


def hidden_caches(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """RoPE and attention: what stands in the caches from the first new position on is NaN, as memory that was never written."""
    caches, (positions, slots) = (_present(arrays, 3), _present(arrays, 4)), arrays[5:7]
    assert positions is not None
    for slot in range(len(caches[0])):
        mine = positions[(slots == slot) & (positions >= 0)]
        for cache in caches:
            cache[slot, int(mine.min(initial=cache.shape[1])) :] = _unwritten(cache)
    return arrays


def last_position(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """RoPE and attention: tokens at the end of their caches, a slot each as far as there are some."""
    slots, capacity = _present(arrays, 3).shape[:2]
    positions, owners = _present(arrays, 5), _present(arrays, 6)
    count = np.arange(positions.size)
    owners[...] = count % slots
    positions[...] = np.where(count < slots, capacity - 1, -1)
    return arrays


def padding(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """RoPE and attention: the first token is none."""
    _present(arrays, 5)[:1] = -1
    return arrays


def masked(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Attention: some queries see no key at all."""
    positions, lengths = arrays[3], arrays[5]
    if positions is not None:
        positions[::2] = -1
    if lengths is not None:
        lengths[::2] = 0
    return arrays


def ends(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Attention: the first position and the last, the shortest length and the whole."""
    capacity = problem.operand(1).static_shape()[-3]
    positions, lengths = arrays[3], arrays[5]
    if positions is not None:
        positions[...] = np.where(np.arange(positions.size) % 2, 0, capacity - 1)
    if lengths is not None:
        lengths[...] = np.where(np.arange(lengths.size) % 2, 1, capacity)
    return arrays


def masked_logits(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Half of the logits are -inf; all of the first row, and all but one of the last."""
    x = _present(arrays, 0)
    x[rng.random(x.shape) < 0.5] = -np.inf
    if x.ndim > 1 and len(x) > 1:
        x[0] = -np.inf
        x[-1] = -np.inf
        x[-1, ..., -1] = 1.0
    return arrays


def signed_zeros(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Zeros of both signs, which are equal."""
    x = _present(arrays, 0)
    x[...] = np.copysign(0.0, rng.standard_normal(x.shape))
    return arrays


def small_variance(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Rows so small that eps decides."""
    for i, t in enumerate(problem.operands):
        a = arrays[i]
        if a is not None and t is not None and t.shape == problem.operand(0).shape and not t.quantised:
            a[...] = a * 1e-3
    return arrays


def first_and_last_positions(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Position 0, the last one, and padding."""
    positions = _present(arrays, 1)
    last = int(str(problem.attr("max_position"))) - 1
    positions[...] = np.resize([last, 0, -1, -2], positions.shape)
    return arrays


def spoilt_padding(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """RoPE, alone and with caches: every other token is padding, and one element of each of its heads is infinite or NaN."""
    rows, positions = (arrays[:1], arrays[1]) if len(arrays) == 2 else (arrays[:3], arrays[5])
    assert positions is not None
    positions[::2] = -1
    for a in rows:
        assert a is not None
        a[::2, :, int(rng.integers(a.shape[-1]))] = rng.choice([np.inf, -np.inf, np.nan])
    return arrays


def first_and_last_ids(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    ids = _present(arrays, 1)
    ids[...] = np.resize([problem.operand(0).static_shape()[0] - 1, 0], ids.shape)
    return arrays


def halfway(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
    """Numbers halfway between two of a 16-bit type: they round to the even one."""
    x = _present(arrays, 0)
    with np.errstate(all="ignore"):
        halves = 1.0 + rng.integers(0, 512, x.shape) * 2.0**-9 if x.dtype.kind != "i" else x
        x[...] = np.asarray(halves).astype(x.dtype)
    return arrays


def drawn(change: str) -> Callable[[Problem, Arrays, Generator], Arrays]:
    """Sampling: these values in the logits alone, and numbers whose draw rounding does not decide."""

    def make(problem: Problem, arrays: Arrays, rng: Generator) -> Arrays:
        if change == "masked":
            arrays = masked_logits(problem, arrays, rng)
        else:
            arrays[0] = changed(change, _present(arrays, 0), problem.operand(0).dtype, rng)
        return settled(arrays, rng)

    return make
