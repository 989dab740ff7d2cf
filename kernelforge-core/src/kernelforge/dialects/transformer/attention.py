"""Scaled dot-product attention, dense or over a KV cache."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    float_attr,
    int_attr,
    merged,
    optional,
    required,
    shape_text,
    standard_inputs,
    traffic,
    want_cache,
    want_float,
    want_i32,
    want_rank,
    want_shape,
)
from kernelforge.dialects.transformer.models import LARGE, SMALL, TINY, f32, i32, make
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, same_dim
from kernelforge.problem import Dim, Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays


def infer_attention(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    q, k, v = (required(operands, i) for i in range(3))
    positions, slots, lengths = (optional(operands, i) for i in range(3, 6))
    want_float("q", q)
    for name, t in (("k", k), ("v", v)):
        want_cache(name, t)
    if (positions is None) != (slots is None):
        missing, given = ("positions", "slots") if positions is None else ("slots", "positions")
        raise OpError(f"operand '{missing}' is required with operand '{given}': both belong to attention over a cache")
    if positions is not None and slots is not None:
        _check_cached(q, k, positions, slots, lengths, causal=bool(attrs["causal"]))
    else:
        _check_dense(q, k, lengths)
    want_shape("v", v, k.shape, "the shape of operand 'k'")
    if v.dtype != k.dtype:
        raise OpError(f"operand 'v' has type {v.dtype} but operand 'k' has {k.dtype}")
    heads, groups = q.shape[-2], k.shape[-2]
    if isinstance(heads, int) and isinstance(groups, int) and (groups == 0 or heads % groups):
        raise OpError(f"operand 'q' has {heads} heads, which {groups} heads of operand 'k' do not divide")
    if not same_dim(q.shape[-1], k.shape[-1]):
        raise OpError(f"operand 'k' has head size {k.shape[-1]} but operand 'q' has {q.shape[-1]}")
    for name in ("scale", "window", "softcap"):
        if not float_attr(attrs, name) >= 0:
            raise OpError(f"attribute '{name}' is {attrs[name]}, must not be negative")
    return (TensorType(q.shape, q.dtype),)


def _check_cached(
    q: TensorType, k: TensorType, positions: TensorType, slots: TensorType, lengths: TensorType | None, *, causal: bool
) -> None:
    want_rank("q", q, 3)
    want_rank("k", k, 4)
    want_i32("positions", positions, q.shape[:1], "one for each token of operand 'q'")
    want_i32("slots", slots, q.shape[:1], "one for each token of operand 'q'")
    if causal and lengths is not None:
        raise OpError("operand 'lengths' has no meaning for causal attention over a cache: positions say what is seen")
    if not causal and lengths is None:
        raise OpError("operand 'lengths' is required for attention over a cache that is not causal")
    if lengths is not None:
        want_i32("lengths", lengths, k.shape[:1], "one for each slot of operand 'k'")


def _check_dense(q: TensorType, k: TensorType, lengths: TensorType | None) -> None:
    want_rank("q", q, 3, 4)
    want_rank("k", k, q.rank)
    batch: tuple[Dim, ...] = (1,)
    if q.rank == 4:
        if not same_dim(q.shape[0], k.shape[0]):
            raise OpError(f"operand 'k' has batch size {k.shape[0]} but operand 'q' has {q.shape[0]}")
        batch = merged(q.shape[:1], k.shape[:1])
    tokens, keys = q.shape[-3], k.shape[-3]
    if isinstance(tokens, int) and isinstance(keys, int) and keys < tokens:
        raise OpError(
            f"operand 'k' has {keys} keys, fewer than the {tokens} queries of operand 'q' {shape_text(q.shape)}"
        )
    if lengths is not None:
        want_i32("lengths", lengths, batch, "one for each sequence")


def attention_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """softmax(q k^T scale) v over the visible keys (Vaswani et al. 2017), with grouped heads (Ainslie et al. 2023), a
    sliding window (Beltagy et al. 2020) and soft-capped scores (Gemma 2, 2024). Rows that see no key are 0."""
    import numpy as np

    q, k, v, positions, slots, lengths = arrays
    if positions is not None:
        out = np.zeros_like(q)
        for slot in np.unique(slots[positions >= 0]):
            rows = np.flatnonzero((slots == slot) & (positions >= 0))
            limit = positions[rows] + 1 if attrs["causal"] else np.full(len(rows), lengths[slot])
            used = min(int(limit.max()), k.shape[1])
            out[rows] = _attend(q[rows], k[slot, :used], v[slot, :used], positions[rows], limit, attrs)
        return (out,)
    batched = q if q.ndim == 4 else q[None]
    keys, values = (k, v) if q.ndim == 4 else (k[None], v[None])
    tokens, total = batched.shape[1], keys.shape[1]
    where = np.arange(tokens) + (total - tokens)
    out = np.empty_like(batched)
    for b in range(len(batched)):
        limit = np.full(tokens, total if lengths is None else lengths[b])
        limit = np.minimum(limit, where + 1) if attrs["causal"] else limit
        out[b] = _attend(batched[b], keys[b], values[b], where, limit, attrs)
    return (out.reshape(q.shape),)


def _attend(q: Array, k: Array, v: Array, positions: Array, limit: Array, attrs: Attrs) -> Array:
    """q [T,H,D] against k, v [L,G,D]; row t sees keys j < limit[t], in a window also j > positions[t] - window."""
    import numpy as np

    tokens, heads, size = q.shape
    groups = k.shape[1]
    grouped = q.reshape(tokens, groups, heads // groups, size).transpose(1, 2, 0, 3)  # [G, H/G, T, D]
    scale = float_attr(attrs, "scale") or 1.0 / math.sqrt(size)
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * scale  # [G, H/G, T, L]
    if softcap := float_attr(attrs, "softcap"):
        scores = softcap * np.tanh(scores / softcap)
    keys = np.arange(k.shape[0])
    visible = keys < limit[:, None]
    if window := int_attr(attrs, "window"):
        visible &= keys > positions[:, None] - window
    scores = np.where(visible, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.where(visible, np.exp(scores - np.where(np.isneginf(top), 0.0, top)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total == 0.0, 1.0, total)
    values = v.transpose(1, 0, 2)[:, None]  # [G, 1, L, D]
    if np.isfinite(v).all():
        out = weights @ values  # [G, H/G, T, D]
    else:  # 0 * NaN is NaN: what a row does not see (memory not yet written, say) stays out of its sum
        rows = [weights[:, :, t : t + 1, seen] @ values[:, :, seen] for t, seen in enumerate(visible)]
        out = np.concatenate(rows, axis=2) if rows else weights @ values
    return np.asarray(out.transpose(2, 0, 1, 3).reshape(q.shape))


def attention_cost(problem: Problem) -> Cost:
    """4 D operations per query head and visible key. Over a cache, contexts count as half its capacity, or the window,
    and only the slots that the tokens can be of move."""
    q, k = problem.operand(0), problem.operand(1)
    heads, size = q.static_shape()[-2:]
    window = int(problem.attr("window"))  # type: ignore[arg-type]  # the attribute's kind is int
    if problem.operands[3] is not None:
        tokens, (slots, capacity, groups, _) = q.static_shape()[0], k.static_shape()
        context = max(1, capacity // 2)
        context = min(context, window) if window else context
        moved = 2 * min(slots, tokens) * context * k.bytes_of(groups * size)
        return Cost(4 * tokens * context * heads * size, 2 * q.nbytes() + moved + 8 * tokens)
    batch = q.static_shape()[0] if q.rank == 4 else 1
    tokens, keys = q.static_shape()[-3], k.static_shape()[-3]
    pairs = 0
    for i in range(tokens):
        last = i + keys - tokens + 1 if problem.attr("causal") else keys
        first = max(0, i + keys - tokens + 1 - window) if window else 0
        pairs += max(0, last - first)
    return Cost(4 * batch * pairs * heads * size, traffic(problem))


def attention_work(problem: Problem, arrays: Sequence[Array | None]) -> Cost | None:
    """As `attention_cost`, of the keys that the tokens at these positions see; those of a slot move once for all its tokens."""
    import numpy as np

    q, k = problem.operand(0), problem.operand(1)
    if problem.operands[3] is None:
        return None if problem.operands[5] is not None else attention_cost(problem)
    positions, slots, lengths = arrays[3:6]
    if positions is None or slots is None:
        return None
    if problem.attr("causal"):
        last = positions + 1
    elif lengths is not None:
        last = lengths[slots]
    else:
        return None
    real = positions >= 0
    window = int(problem.attr("window"))  # type: ignore[arg-type]  # the attribute's kind is int
    first = np.maximum(positions + 1 - window, 0) if window else np.zeros_like(positions)
    pairs = int(np.maximum(last - first, 0)[real].sum())
    moved = sum(
        int(last[here].max() - first[here].min()) for here in (real & (slots == s) for s in np.unique(slots[real]))
    )
    heads, (groups, size) = q.static_shape()[-2], k.static_shape()[-2:]
    return Cost(4 * pairs * heads * size, 2 * q.nbytes() + 2 * moved * k.bytes_of(groups * size) + 8 * len(positions))


def attention_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Over a cache: tokens of random slots at distinct positions, some of them padding; else random lengths."""
    import numpy as np

    arrays = standard_inputs(problem, rng)
    k = problem.operand(1).static_shape()
    if problem.operands[3] is not None:
        tokens = problem.operand(0).static_shape()[0]
        slots, capacity = k[:2]
        arrays[3], arrays[4] = positions_and_slots(tokens, slots, capacity, rng)
        if problem.operands[5] is not None:
            arrays[5] = rng.integers(1, capacity + 1, slots).astype(np.int32)
    elif len(problem.operands) > 5 and problem.operands[5] is not None:
        arrays[5] = rng.integers(1, k[-3] + 1, problem.operand(5).static_shape()).astype(np.int32)
    return arrays


def attention_typical(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Over a cache: the tokens shared out to the slots, each slot's in a run whose middle is that of the capacity."""
    import numpy as np

    arrays = attention_inputs(problem, rng)
    if problem.operands[3] is not None:
        tokens, (slots, capacity) = problem.operand(0).static_shape()[0], problem.operand(1).static_shape()[:2]
        run = -(-tokens // min(slots, tokens))
        start = max(0, min(capacity // 2 - (run + 1) // 2, capacity - run))
        place = start + np.arange(tokens) % run
        arrays[3] = np.where(place < capacity, place, -1).astype(np.int32)
        arrays[4] = (np.arange(tokens) // run).astype(np.int32)
        if problem.operands[5] is not None:
            arrays[5] = np.full(slots, max(1, capacity // 2), np.int32)
    return arrays


def positions_and_slots(tokens: int, slots: int, capacity: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """A ragged batch: each slot in use gets an equal share of the tokens, a run of positions and then padding.

    Pairs (slot, position) are distinct. About one token in eight is padding, and those that the slots cannot hold.
    """
    import numpy as np

    positions = np.full(tokens, -1, np.int32)
    owners = np.zeros(tokens, np.int32)
    used = max(1, min(slots, tokens // 3))
    for share, slot in zip(np.array_split(np.arange(tokens), used), rng.permutation(slots), strict=False):
        count = min(len(share) - len(share) // 8, capacity)
        start = int(rng.integers(0, capacity - count + 1))
        positions[share[:count]] = np.arange(start, start + count)
        owners[share] = slot
    return positions, owners


def attention_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(ATTENTION, f32(1, 1, 4), f32(1, 1, 4), f32(1, 1, 4))
    yield _dense(5, 9, 4, 2, 8, causal=True)
    yield _dense(5, 9, 4, 1, 8, causal=True, window=3)
    yield _dense(6, 6, 3, 3, 16, causal=False, softcap=5.0)
    yield make(ATTENTION, f32(3, 4, 4, 8), f32(3, 7, 2, 8), f32(3, 7, 2, 8), None, None, i32(3), causal=False, window=4)
    yield _cached(1, 1, 8, 2, 1, 4, "f32")
    yield _cached(9, 3, 16, 4, 2, 8, "f32", window=4, scale=0.3)
    yield _cached(9, 3, 16, 4, 4, 8, "f16", softcap=3.0)
    yield _cached(9, 3, 16, 4, 2, 8, "f32", causal=False)
    yield _cached(9, 3, 16, 4, 2, 32, "q8")
    for model in (TINY, SMALL, LARGE):
        heads = (model.heads, model.kv_heads, model.head_dim)
        for tokens in (1, rng.randrange(2, 16), 64):
            for dtype in ("f32", "bf16", "q8"):
                yield _cached(tokens, 4, 512, *heads, dtype)
        yield _dense(64, 64, *heads, causal=True)
    yield _cached(1, 1, 2048, LARGE.heads, LARGE.kv_heads, LARGE.head_dim, "bf16")
    yield _cached(256, 1, 512, SMALL.heads, SMALL.kv_heads, SMALL.head_dim, "f32")


def _dense(
    tokens: int, keys: int, heads: int, groups: int, size: int, *, causal: bool, window: int = 0, softcap: float = 0.0
) -> Problem:
    kv = f32(keys, groups, size)
    return make(ATTENTION, f32(tokens, heads, size), kv, kv, causal=causal, window=window, softcap=softcap)


def _cached(
    tokens: int,
    slots: int,
    capacity: int,
    heads: int,
    groups: int,
    size: int,
    dtype: str,
    *,
    causal: bool = True,
    scale: float = 0.0,
    window: int = 0,
    softcap: float = 0.0,
) -> Problem:
    cache = TensorType((slots, capacity, groups, size), dtype)
    lengths = None if causal else i32(slots)
    operands = (f32(tokens, heads, size), cache, cache, i32(tokens), i32(tokens), lengths)
    return make(ATTENTION, *operands, causal=causal, scale=scale, window=window, softcap=softcap)


ATTENTION = OpDef(
    name="attention",
    summary="softmax(q k^T scale) v; with positions and slots, k and v are caches",
    operands=(
        Operand("q"),
        Operand("k"),
        Operand("v"),
        Operand("positions", optional=True),
        Operand("slots", optional=True),
        Operand("lengths", optional=True),
    ),
    results=("out",),
    attributes=(
        Attribute("causal", "bool", True, doc="a query sees no key at a later position"),
        Attribute("scale", "float", 0.0, doc="factor of the scores; 0 is 1/sqrt(head size)"),
        Attribute("window", "int", 0, doc="see only the last so many positions; 0: all"),
        Attribute("softcap", "float", 0.0, doc="scores become softcap tanh(score / softcap); 0: unchanged"),
    ),
    infer=infer_attention,
    reference=attention_reference,
    sample=attention_samples,
    cost=attention_cost,
    inputs=attention_inputs,
    typical=attention_typical,
    work=attention_work,
    dialect=DIALECT,
)
