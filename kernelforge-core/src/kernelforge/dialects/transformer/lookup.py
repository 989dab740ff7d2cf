"""Ops that address rows by index: KV cache update, embedding, argmax."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.attention import positions_and_slots
from kernelforge.dialects.transformer.checks import (
    CACHE_FORMAT,
    DIALECT,
    Attrs,
    required,
    shape_text,
    standard_inputs,
    traffic,
    want_cache,
    want_float,
    want_i32,
    want_rank,
    want_shape,
    want_weight,
)
from kernelforge.dialects.transformer.models import (
    ACTIVATIONS,
    MODELS,
    SMALL,
    TINY,
    TOKENS,
    f32,
    i32,
    make,
    ragged,
    weight,
)
from kernelforge.dtype import FLOATS, WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, View
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays


def check_update(
    cache_name: str, cache: TensorType, name: str, new: TensorType, positions: TensorType, slots: TensorType
) -> None:
    """`new` has rows of `cache`, each with a place in it."""
    want_cache(cache_name, cache)
    want_rank(cache_name, cache, 4)
    want_float(name, new)
    want_rank(name, new, 3)
    wanted = (new.shape[0], *cache.shape[2:])
    want_shape(name, new, wanted, f"tokens, then heads and head size of operand '{cache_name}'")
    want_i32("positions", positions, new.shape[:1], f"one for each token of operand '{name}'")
    want_i32("slots", slots, new.shape[:1], f"one for each token of operand '{name}'")


def infer_kv_cache_update(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    cache, new, positions, slots = (required(operands, i) for i in range(4))
    check_update("cache", cache, "new", new, positions, slots)
    return (TensorType(cache.shape, cache.dtype),)


def kv_cache_update_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """cache[slots[t], positions[t]] = new[t] where positions[t] >= 0. Raises UsageError for one outside the cache, where kernels
    write nothing, and for numbers that a quantised cache cannot hold."""
    from kernelforge.dtype import from_numpy
    from kernelforge.quant import quantize

    cache, new, positions, slots = arrays
    written = positions >= 0
    outside = written & ((positions >= cache.shape[1]) | (slots < 0) | (slots >= cache.shape[0]))
    if outside.any():
        t = int(outside.argmax())
        place = f"slot {int(slots[t])}, position {int(positions[t])}"
        raise UsageError(f"token {t} goes to {place}, outside a cache of {shape_text(cache.shape)}")
    out = cache.copy()
    rows, dtype = new[written], from_numpy(cache.dtype)
    out[slots[written], positions[written]] = (
        quantize(rows, dtype) if dtype == CACHE_FORMAT else rows.astype(cache.dtype)
    )
    return (out,)


def kv_cache_update_cost(problem: Problem) -> Cost:
    """Only the new rows move: read once, written once in the cache's type."""
    cache, new = problem.operand(0), problem.operand(1)
    return Cost(0, new.nbytes() + cache.bytes_of(new.size()) + 8 * new.static_shape()[0])


def kv_cache_update_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Distinct places of a ragged batch, with padding."""
    arrays = standard_inputs(problem, rng)
    slots, capacity = problem.operand(0).static_shape()[:2]
    arrays[2], arrays[3] = positions_and_slots(problem.operand(1).static_shape()[0], slots, capacity, rng)
    return arrays


def kv_cache_update_samples(rng: random.Random) -> Iterator[Problem]:
    def update(tokens: int, slots: int, capacity: int, groups: int, size: int, dtype: str) -> Problem:
        cache = TensorType((slots, capacity, groups, size), dtype)
        return make(KV_CACHE_UPDATE, cache, f32(tokens, groups, size), i32(tokens), i32(tokens))

    yield update(1, 1, 1, 1, 1, "f32")
    yield update(20, 3, 8, 2, 5, "f32")
    for dtype in ACTIVATIONS:
        yield update(rng.randrange(2, 20), 4, 32, 2, 16, dtype)
    yield update(rng.randrange(2, 20), 4, 32, 2, 96, "q8")
    for model in MODELS:
        for tokens in TOKENS:
            for dtype in ("f32", "bf16", "q8"):
                yield update(tokens, 4, 512, model.kv_heads, model.head_dim, dtype)


KV_CACHE_UPDATE = OpDef(
    name="kv_cache_update",
    summary="write each token's row into its slot of the cache, in place",
    operands=(Operand("cache"), Operand("new"), Operand("positions"), Operand("slots")),
    results=("out",),
    infer=infer_kv_cache_update,
    reference=kv_cache_update_reference,
    sample=kv_cache_update_samples,
    cost=kv_cache_update_cost,
    inputs=kv_cache_update_inputs,
    exact=True,
    in_place=((0, 0),),
    dialect=DIALECT,
)


def infer_embedding(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    table, ids = required(operands, 0), required(operands, 1)
    want_weight("table", table)
    want_rank("table", table, 2)
    want_rank("ids", ids, 1)
    want_i32("ids", ids, ids.shape, "one for each row of the result")
    return (
        TensorType((*ids.shape, table.shape[1]), str(attrs["dtype"]) or ("f32" if table.quantised else table.dtype)),
    )


def embedding_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """table[ids]. Raises UsageError for an id that is not a row of the table. Kernels give a row of zeros
    for such an id, and read nothing outside. A table of one row is that row for every id where it becomes a view."""
    from kernelforge.dtype import from_numpy
    from kernelforge.quant import dequantize

    table, ids = arrays
    bad = (ids < 0) | (ids >= len(table))
    if bad.any():
        raise UsageError(f"id {int(ids[bad.argmax()])} is not a row of a table of {len(table)}")
    rows = table[ids]
    return (dequantize(rows) if from_numpy(table.dtype) in WEIGHT_FORMATS else rows,)


def embedding_view(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    """The only row of a table, which is the only one that an id can name; a constant is not viewed but folded or read."""
    table, ids = required(operands, 0), required(operands, 1)
    (out,) = infer_embedding(operands, attrs)
    if table.shape[0] != 1 or ids.shape != (1,) or table.constant or out.dtype != table.dtype:
        return None
    return (View(table.shape, table.element_strides(), 0),)


def embedding_cost(problem: Problem) -> Cost:
    """Only the rows that are looked up move."""
    table, out = problem.operand(0), problem.results[0]
    return Cost(0, table.bytes_of(out.size()) + out.nbytes() + problem.operand(1).nbytes())


def embedding_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    import numpy as np

    arrays = standard_inputs(problem, rng)
    rows = problem.operand(0).static_shape()[0]
    arrays[1] = rng.integers(0, rows, problem.operand(1).static_shape()).astype(np.int32)
    return arrays


def embedding_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(EMBEDDING, f32(1, 1), i32(1))
    for dtype in ACTIVATIONS:
        yield make(EMBEDDING, weight(dtype, ragged(rng, 5, 50), ragged(rng, 3, 40)), i32(6), dtype="f32")
        yield make(EMBEDDING, weight(dtype, 11, 8), i32(3))
    for name in WEIGHT_FORMATS:
        yield make(EMBEDDING, weight(name, ragged(rng, 5, 50), 32 * rng.randrange(1, 9)), i32(6))
    for model in MODELS:
        yield make(EMBEDDING, f32(TOKENS[-1], model.width), i32(4))
    for model, counts in ((TINY, TOKENS), (SMALL, (1, 64))):
        for tokens in counts:
            for dtype in ("bf16", *WEIGHT_FORMATS):
                yield make(EMBEDDING, weight(dtype, model.vocabulary, model.width), i32(tokens), dtype="f32")


EMBEDDING = OpDef(
    name="embedding",
    summary="the rows of a table by index",
    operands=(Operand("table"), Operand("ids")),
    results=("out",),
    attributes=(
        Attribute("dtype", "str", "", ("", *FLOATS), "type of the result; empty: the table's, f32 for a quantised one"),
    ),
    infer=infer_embedding,
    reference=embedding_reference,
    sample=embedding_samples,
    cost=embedding_cost,
    inputs=embedding_inputs,
    view=embedding_view,
    exact=True,
    dialect=DIALECT,
)


def infer_argmax(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_float("x", x)
    if x.rank == 0 or x.shape[-1] == 0:
        raise OpError(f"operand 'x' of shape {shape_text(x.shape)} has no last axis to search")
    return (TensorType(x.shape[:-1], "i32"),)


def argmax_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """The lowest index among equal maxima; the first NaN counts as the maximum (numpy.argmax)."""
    import numpy as np

    return (np.argmax(arrays[0], axis=-1),)


def argmax_cost(problem: Problem) -> Cost:
    return Cost(problem.operand(0).size(), traffic(problem))


def argmax_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(ARGMAX, f32(1))
    yield make(ARGMAX, f32(2, 3, 5))
    for dtype in ACTIVATIONS:
        yield make(ARGMAX, TensorType((3, ragged(rng, 5, 300)), dtype))
    for model in MODELS:
        for tokens in (1, 7):
            yield make(ARGMAX, f32(tokens, model.vocabulary))


ARGMAX = OpDef(
    name="argmax",
    summary="index of the largest element of each row",
    operands=(Operand("x"),),
    results=("out",),
    infer=infer_argmax,
    reference=argmax_reference,
    sample=argmax_samples,
    cost=argmax_cost,
    dialect=DIALECT,
)
