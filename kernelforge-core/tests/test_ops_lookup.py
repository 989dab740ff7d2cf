from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge.dialects.transformer.lookup import ARGMAX, EMBEDDING, KV_CACHE_UPDATE
from kernelforge.dialects.transformer.rope import ROPE
from kernelforge.dialects.transformer.rope_cache import ROPE_CACHE_UPDATE
from kernelforge.dtype import from_numpy, to_numpy
from kernelforge.errors import UsageError
from kernelforge.op import OpDef
from kernelforge.problem import Attr, TensorType
from kernelforge.quant import quantize

Array = np.ndarray[Any, np.dtype[Any]]


def run(op: OpDef, *arrays: Array, **attrs: Attr) -> Array:
    problem = op.problem([TensorType(a.shape, from_numpy(a.dtype)) for a in arrays], attrs)
    (out,) = op.evaluate(problem, arrays)
    assert (out.shape, from_numpy(out.dtype)) == (problem.results[0].shape, problem.results[0].dtype)
    return out


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def test_cache_update_writes_each_row_to_its_place_and_nothing_else() -> None:
    cache, new = normal(3, 5, 2, 4), normal(4, 2, 4, seed=1)
    before = cache.copy()
    out = run(KV_CACHE_UPDATE, cache, new, ints(0, 4, -1, 2), ints(2, 0, 99, 2))
    want = before.copy()
    for t, (slot, position) in {0: (2, 0), 1: (0, 4), 3: (2, 2)}.items():
        want[slot, position] = new[t]
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(cache, before)


def test_cache_update_rounds_to_the_type_of_the_cache() -> None:
    cache, new = np.zeros((1, 2, 1, 3), ml_dtypes.bfloat16), normal(1, 1, 3)
    out = run(KV_CACHE_UPDATE, cache, new, ints(1), ints(0))
    np.testing.assert_array_equal(out[0, 1], new[0].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("position", "slot"), [(5, 0), (0, 3), (0, -1)])
def test_cache_update_outside_the_cache_is_refused(position: int, slot: int) -> None:
    with pytest.raises(
        UsageError, match=rf"token 1 goes to slot {slot}, position {position}, outside a cache of \[3,5,2,4\]"
    ):
        run(KV_CACHE_UPDATE, normal(3, 5, 2, 4), normal(2, 2, 4), ints(0, position), ints(0, slot))


def test_cache_update_is_in_place() -> None:
    assert KV_CACHE_UPDATE.in_place == ((0, 0),)


ROTATED: dict[str, Attr] = {"max_position": 5, "theta": 100.0, "interleaved": True}


def step(dtype: str) -> list[Array]:
    """q, k, v, both caches, positions, slots."""
    q, k, v = normal(4, 4, 32), normal(4, 2, 32, seed=1), normal(4, 2, 32, seed=2)
    filled = [normal(3, 5, 2, 32, seed=seed) for seed in (3, 4)]
    caches = [quantize(c, dtype) if dtype == "q8" else c.astype(to_numpy(dtype)) for c in filled]
    return [q, k, v, *caches, ints(0, 4, -1, 2), ints(2, 0, 99, 2)]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8"])
def test_rope_and_cache_updates_in_one(dtype: str) -> None:
    q, k, v, keys, values, positions, slots = arrays = step(dtype)
    types = [TensorType((3, 5, 2, 32) if i in (3, 4) else a.shape, from_numpy(a.dtype)) for i, a in enumerate(arrays)]
    problem = ROPE_CACHE_UPDATE.problem(types, ROTATED)
    before = [a.copy() for a in arrays]
    rotated, new_keys, new_values = ROPE_CACHE_UPDATE.evaluate(problem, arrays)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rotated, run(ROPE, q, positions, **ROTATED))
    for made, cache, new in ((new_keys, keys, run(ROPE, k, positions, **ROTATED)), (new_values, values, v)):
        cache_type = TensorType((3, 5, 2, 32), dtype)
        update = KV_CACHE_UPDATE.problem([cache_type, types[1], types[5], types[6]], {})
        np.testing.assert_array_equal(made, KV_CACHE_UPDATE.evaluate(update, [cache, new, positions, slots])[0])


def test_what_an_update_leaves_of_a_quantised_cache_keeps_its_bits() -> None:
    arrays = step("q8")
    keys = arrays[3]
    keys["values"][1] = 3  # a group that its numbers would not be quantised to
    keys["scale"][1, 0, 0] = np.nan
    types = [TensorType((3, 5, 2, 32) if i in (3, 4) else a.shape, from_numpy(a.dtype)) for i, a in enumerate(arrays)]
    made = ROPE_CACHE_UPDATE.evaluate(ROPE_CACHE_UPDATE.problem(types, ROTATED), arrays)[1]
    assert made[1].tobytes() == keys[1].tobytes()
    assert made[0, 4].tobytes() != keys[0, 4].tobytes()


@pytest.mark.parametrize(
    ("position", "slot", "message"),
    [
        (5, 0, "position 5 is not below max_position 5"),
        (4, 3, r"token 1 goes to slot 3, position 4, outside a cache of \[3,5,2,32\]"),
        (0, -1, "token 1 goes to slot -1, position 0, outside"),
    ],
)
def test_rope_and_cache_updates_outside_the_cache_are_refused(position: int, slot: int, message: str) -> None:
    arrays = step("f32")
    arrays[5][1], arrays[6][1] = position, slot
    problem = ROPE_CACHE_UPDATE.problem([TensorType(a.shape, from_numpy(a.dtype)) for a in arrays], ROTATED)
    with pytest.raises(UsageError, match=message):
        ROPE_CACHE_UPDATE.evaluate(problem, arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_embedding_takes_rows(dtype: type) -> None:
    table: Array = normal(7, 3).astype(dtype)
    out = run(EMBEDDING, table, ints(6, 0, 6))
    np.testing.assert_array_equal(out, np.stack([table[6], table[0], table[6]]))
    wide = run(EMBEDDING, table, ints(2), dtype="f32")
    np.testing.assert_array_equal(wide, table[2:3].astype(np.float32))


@pytest.mark.parametrize("bad", [7, -1])
def test_embedding_of_an_unknown_id_is_refused(bad: int) -> None:
    with pytest.raises(UsageError, match=f"id {bad} is not a row of a table of 7"):
        run(EMBEDDING, normal(7, 3), ints(0, bad))


def test_argmax_takes_the_lowest_of_equals_and_the_first_nan() -> None:
    x = np.array([[1, 3, 3, 2], [5, 5, 5, 5], [-4, -1, -3, -1]], np.float32)
    np.testing.assert_array_equal(run(ARGMAX, x), [1, 0, 1])
    nan, inf = np.nan, np.inf
    x = np.array([[1, nan, 9, nan], [nan, inf, 0, 0], [-inf, -inf, -inf, -inf], [0, -inf, inf, inf]], np.float32)
    np.testing.assert_array_equal(run(ARGMAX, x), [1, 0, 0, 2])
    np.testing.assert_array_equal(run(ARGMAX, np.array([-0.0, 0.0], np.float32)), 0)


def test_argmax_over_the_last_axis_of_any_rank() -> None:
    x = normal(2, 3, 5)
    out = run(ARGMAX, x)
    for index in np.ndindex(2, 3):
        assert out[index] == max(range(5), key=lambda j: x[index][j])
    assert run(ARGMAX, normal(4)).shape == ()


@pytest.mark.parametrize("op", [KV_CACHE_UPDATE, EMBEDDING])
def test_inputs_are_valid_for_every_sample(op: OpDef) -> None:
    for problem in op.samples(random.Random(0)):
        if op.problem_cost(problem).bytes < 1e6:
            op.evaluate(problem, op.make_inputs(problem, np.random.default_rng(0)))


def test_costs_count_only_the_rows_that_move() -> None:
    cache, new, index = TensorType((9, 99, 2, 4), "bf16"), TensorType((3, 2, 4), "f32"), TensorType((3,), "i32")
    update = KV_CACHE_UPDATE.problem_cost(KV_CACHE_UPDATE.problem([cache, new, index, index], {}))
    assert (update.flops, update.bytes) == (0, 24 * 4 + 24 * 2 + 24)
    table = TensorType((1000, 8), "bf16")
    lookup = EMBEDDING.problem_cost(EMBEDDING.problem([table, index], {"dtype": "f32"}))
    assert (lookup.flops, lookup.bytes) == (0, 24 * 2 + 24 * 4 + 12)
    search = ARGMAX.problem_cost(ARGMAX.problem([TensorType((2, 50), "f32")], {}))
    assert (search.flops, search.bytes) == (100, 400 + 8)
