from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge.dialects.transformer.lookup import ARGMAX, EMBEDDING, KV_CACHE_UPDATE
from kernelforge.dtype import from_numpy
from kernelforge.errors import UsageError
from kernelforge.op import OpDef
from kernelforge.problem import Attr, TensorType

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
