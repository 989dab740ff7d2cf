"""What stands between a layer's queries, keys and values and its attention: RoPE, and the update of both caches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.attention import positions_and_slots
from kernelforge.dialects.transformer.checks import DIALECT, Attrs, int_attr, required, standard_inputs, want_shape
from kernelforge.dialects.transformer.lookup import check_update, kv_cache_update_reference
from kernelforge.dialects.transformer.models import ACTIVATIONS, LARGE, MODELS, TOKENS, i32, make
from kernelforge.dialects.transformer.rope import ATTRIBUTES, check_rope, rope_reference
from kernelforge.op import Cost, OpDef, Operand, OperandTypes, OpError, Part
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays


def infer_rope_cache_update(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    q, k, v, key_cache, value_cache, positions, slots = (required(operands, i) for i in range(7))
    check_rope("q", q, positions, attrs)
    check_rope("k", k, positions, attrs)
    want_shape("q", q, (k.shape[0], q.shape[1], k.shape[2]), "tokens and head size of operand 'k'")
    check_update("key_cache", key_cache, "k", k, positions, slots)
    check_update("value_cache", value_cache, "v", v, positions, slots)
    for name, t, like, other in (
        ("k", k, "q", q),
        ("v", v, "q", q),
        ("value_cache", value_cache, "key_cache", key_cache),
    ):
        if t.dtype != other.dtype:
            raise OpError(f"operand '{name}' is of type {t.dtype}, must be of that of operand '{like}', {other.dtype}")
    want_shape("value_cache", value_cache, key_cache.shape, "the shape of operand 'key_cache'")
    return (
        TensorType(q.shape, q.dtype),
        TensorType(key_cache.shape, key_cache.dtype),
        TensorType(value_cache.shape, value_cache.dtype),
    )


def rope_cache_update_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """`rope` of q and k, and `kv_cache_update` with k and v. Raises UsageError as they do."""
    q, k, v, key_cache, value_cache, positions, slots = arrays
    (queries,), (keys,) = (rope_reference((x, positions), attrs) for x in (q, k))
    updates = ((key_cache, keys), (value_cache, v))
    caches = (kv_cache_update_reference((cache, new, positions, slots), {})[0] for cache, new in updates)
    return (queries, *caches)


def rope_cache_update_parts(problem: Problem) -> tuple[Part, ...]:
    places, attrs = ("positions", "slots"), dict(problem.attrs)
    return (
        Part("transformer.rope", ("q", "positions"), ("rotated",), attrs),
        Part("transformer.rope", ("k", "positions"), ("rotated_keys",), attrs),
        Part("transformer.kv_cache_update", ("key_cache", "rotated_keys", *places), ("keys",)),
        Part("transformer.kv_cache_update", ("value_cache", "v", *places), ("values",)),
    )


def rope_cache_update_cost(problem: Problem) -> Cost:
    """Queries are read and written, keys and values read, and written in the caches' type."""
    q, k, cache = problem.operand(0), problem.operand(1), problem.operand(3)
    rows = 2 * (k.nbytes() + cache.bytes_of(k.size()))
    return Cost(3 * (q.size() + k.size()), 2 * q.nbytes() + rows + 8 * k.static_shape()[0])


def rope_cache_update_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Distinct places of a ragged batch, with padding."""
    arrays = standard_inputs(problem, rng)
    slots, capacity = problem.operand(3).static_shape()[:2]
    capacity = min(capacity, int_attr(dict(problem.attrs), "max_position"))
    arrays[5], arrays[6] = positions_and_slots(problem.operand(0).static_shape()[0], slots, capacity, rng)
    return arrays


def rope_cache_update_samples(rng: random.Random) -> Iterator[Problem]:
    def update(
        tokens: int, cache: tuple[int, ...], heads: int, dtype: str, x: str = "f32", /, **attrs: Attr
    ) -> Problem:
        _, capacity, groups, size = cache
        q, new = TensorType((tokens, heads, size), x), TensorType((tokens, groups, size), x)
        memory = TensorType(cache, dtype)
        return make(
            ROPE_CACHE_UPDATE, q, new, new, memory, memory, i32(tokens), i32(tokens), max_position=capacity, **attrs
        )

    yield update(1, (1, 1, 1, 2), 1, "f32")
    yield update(20, (3, 8, 2, 6), 4, "f32", rotary_dim=4)
    yield update(5, (2, 16, 1, 8), 3, "f32", interleaved=True)
    yield update(5, (2, 16, 2, 8), 4, "f16", scaling="linear", factor=4.0)
    llama3: dict[str, Attr] = {"scaling": "llama3", "factor": 32.0, "original_max_position": 64, "theta": 500000.0}
    yield update(9, (1, 256, LARGE.kv_heads, LARGE.head_dim), LARGE.heads, "f16", **llama3)
    for dtype in ACTIVATIONS:
        yield update(rng.randrange(2, 20), (4, 32, 2, 16), 4, dtype, dtype)
    yield update(rng.randrange(2, 20), (4, 32, 2, 96), 2, "q8")
    for model in MODELS:
        for tokens in TOKENS:
            for dtype in ("f32", "f16", "q8"):
                yield update(tokens, (4, 512, model.kv_heads, model.head_dim), model.heads, dtype)


ROPE_CACHE_UPDATE = OpDef(
    name="rope_cache_update",
    summary="rotate queries and keys; write keys and values into their slots of the caches, in place",
    operands=tuple(map(Operand, ("q", "k", "v", "key_cache", "value_cache", "positions", "slots"))),
    results=("rotated", "keys", "values"),
    attributes=ATTRIBUTES,
    infer=infer_rope_cache_update,
    reference=rope_cache_update_reference,
    sample=rope_cache_update_samples,
    cost=rope_cache_update_cost,
    inputs=rope_cache_update_inputs,
    parts=rope_cache_update_parts,
    in_place=((1, 3), (2, 4)),
    dialect=DIALECT,
)
