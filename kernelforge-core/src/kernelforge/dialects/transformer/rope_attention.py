"""What stands between a layer's queries, keys and values and its output projection: RoPE, the caches' update, attention."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.attention import (
    ATTENTION,
    attention_cost,
    attention_reference,
    attention_typical,
    attention_work,
    infer_attention,
)
from kernelforge.dialects.transformer.checks import DIALECT, Attrs, required
from kernelforge.dialects.transformer.models import ACTIVATIONS, LARGE, MODELS, i32, make
from kernelforge.dialects.transformer.rope import ATTRIBUTES
from kernelforge.dialects.transformer.rope_cache import (
    ROPE_CACHE_UPDATE,
    infer_rope_cache_update,
    rope_cache_update_cost,
    rope_cache_update_inputs,
    rope_cache_update_reference,
)
from kernelforge.op import Cost, OpDef, OperandTypes, Part
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays

SCORES = tuple(a for a in ATTENTION.attributes if a.name != "causal")
"""What the scores are made with; attention over a cache is causal."""


def _attention_attrs(attrs: Attrs) -> dict[str, Attr]:
    return {"causal": True, **{a.name: attrs[a.name] for a in SCORES}}


def _rope_attrs(attrs: Attrs) -> dict[str, Attr]:
    return {a.name: attrs[a.name] for a in ATTRIBUTES}


def infer_rope_attention(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    q, keys, values = infer_rope_cache_update(operands, attrs)
    positions, slots = (required(operands, i) for i in (5, 6))
    (out,) = infer_attention((q, keys, values, positions, slots, None), _attention_attrs(attrs))
    return out, keys, values


def rope_attention_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """`rope_cache_update`, then causal `attention` of its results. New keys and values count before they are rounded to the
    caches' type; a kernel may do either. Raises UsageError as they do."""
    queries, keys, values = rope_cache_update_reference(arrays, attrs)
    (out,) = attention_reference((queries, keys, values, *arrays[5:], None), _attention_attrs(attrs))
    return out, keys, values


def rope_attention_parts(problem: Problem) -> tuple[Part, ...]:
    attrs = dict(problem.attrs)
    operands = tuple(o.name for o in ROPE_CACHE_UPDATE.operands)
    return (
        Part(ROPE_CACHE_UPDATE.full_name, operands, ("rotated", "keys", "values"), _rope_attrs(attrs)),
        Part(
            ATTENTION.full_name,
            ("rotated", "keys", "values", "positions", "slots"),
            ("out",),
            _attention_attrs(attrs),
        ),
    )


def _attention(problem: Problem) -> Problem:
    """That of the rotated queries over the caches."""
    q, _, _, keys, values, positions, slots = problem.operands
    return ATTENTION.problem((q, keys, values, positions, slots), _attention_attrs(dict(problem.attrs)))


def _update(problem: Problem) -> Problem:
    return ROPE_CACHE_UPDATE.problem(problem.operands, _rope_attrs(dict(problem.attrs)))


def rope_attention_cost(problem: Problem) -> Cost:
    """As of `rope_cache_update` and `attention`, but that rotated queries go nowhere."""
    update, attention = rope_cache_update_cost(_update(problem)), attention_cost(_attention(problem))
    return Cost(update.flops + attention.flops, update.bytes + attention.bytes - 2 * problem.operand(0).nbytes())


def rope_attention_work(problem: Problem, arrays: Sequence[Array | None]) -> Cost | None:
    q, _, _, keys, values, positions, slots = arrays
    attention = attention_work(_attention(problem), [q, keys, values, positions, slots, None])
    if attention is None:
        return None
    update = rope_cache_update_cost(_update(problem))
    return Cost(update.flops + attention.flops, update.bytes + attention.bytes - 2 * problem.operand(0).nbytes())


def rope_attention_typical(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Tokens where those of `attention` are."""
    arrays = rope_cache_update_inputs(problem, rng)
    *_, positions, slots, _ = attention_typical(_attention(problem), rng)
    return [*arrays[:5], positions, slots]


def rope_attention_samples(rng: random.Random) -> Iterator[Problem]:
    def attention(
        tokens: int, cache: tuple[int, ...], heads: int, dtype: str = "f32", x: str = "f32", /, **attrs: Attr
    ) -> Problem:
        _, capacity, groups, size = cache
        q, new = TensorType((tokens, heads, size), x), TensorType((tokens, groups, size), x)
        memory = TensorType(cache, dtype)
        operands = (q, new, new, memory, memory, i32(tokens), i32(tokens))
        return make(ROPE_ATTENTION, *operands, **{"max_position": capacity, **attrs})

    yield attention(1, (1, 1, 1, 2), 1)
    yield attention(20, (3, 8, 2, 6), 4, rotary_dim=4)
    yield attention(5, (2, 16, 1, 8), 3, interleaved=True, window=4)
    yield attention(5, (2, 16, 2, 8), 4, scaling="linear", factor=4.0, softcap=3.0)
    yield attention(1, (2, 150, 1, 16), 3, scale=0.3)
    for dtype in ACTIVATIONS:
        yield attention(rng.randrange(2, 20), (4, 32, 2, 16), 4, "f32", dtype)
    for model in MODELS:
        for tokens in (1, 7):
            yield attention(tokens, (2, 512, model.kv_heads, model.head_dim), model.heads)
    llama3: dict[str, Attr] = {"scaling": "llama3", "factor": 32.0, "original_max_position": 64, "theta": 500000.0}
    for dtype in ("f16", "bf16", "q8"):
        yield attention(1, (1, 4096, LARGE.kv_heads, LARGE.head_dim), LARGE.heads, dtype, **llama3)


ROPE_ATTENTION = OpDef(
    name="rope_attention",
    summary="rotate queries and keys, write keys and values into the caches, and attend to those, causally",
    operands=ROPE_CACHE_UPDATE.operands,
    results=("out", "keys", "values"),
    attributes=(*ATTRIBUTES, *SCORES),
    infer=infer_rope_attention,
    reference=rope_attention_reference,
    sample=rope_attention_samples,
    cost=rope_attention_cost,
    inputs=rope_cache_update_inputs,
    typical=rope_attention_typical,
    work=rope_attention_work,
    parts=rope_attention_parts,
    in_place=((1, 3), (2, 4)),
    dialect=DIALECT,
)
