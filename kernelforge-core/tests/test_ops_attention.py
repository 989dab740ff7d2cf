from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer.attention import ATTENTION, positions_and_slots
from kernelforge.dtype import from_numpy
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]


def attend(*arrays: Array | None, **attrs: Attr) -> Array:
    types = [None if a is None else TensorType(a.shape, from_numpy(a.dtype)) for a in arrays]
    problem = ATTENTION.problem(types, attrs)
    (out,) = ATTENTION.evaluate(problem, [*arrays, *([None] * (6 - len(arrays)))])
    assert out.shape == arrays[0].shape  # type: ignore[union-attr]  # q is always given
    return out


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def one_token(
    q: Array, keys: Array, values: Array, seen: list[int], scale: float | None = None, softcap: float = 0.0
) -> Array:
    """Attention of one token, q [H, D], over the keys of index `seen`; keys, values [L, G, D]. Scalars only."""
    heads, size = q.shape
    out = np.zeros((heads, size))
    for h in range(heads):
        g = h // (heads // keys.shape[1])
        scores = []
        for j in seen:
            score = math.fsum(q[h, d] * keys[j, g, d] for d in range(size))
            score *= 1 / math.sqrt(size) if scale is None else scale
            scores.append(softcap * math.tanh(score / softcap) if softcap else score)
        weights = [math.exp(s - max(scores)) for s in scores]
        for j, weight in zip(seen, weights, strict=True):
            out[h] += weight / math.fsum(weights) * values[j, g]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(("scale", "softcap"), [(0.0, 0.0), (0.3, 0.0), (0.0, 2.0)])
def test_cached_against_a_loop_over_tokens(groups: int, window: int, scale: float, softcap: float) -> None:
    keys, values = normal(3, 8, groups, 4, seed=1), normal(3, 8, groups, 4, seed=2)
    q = normal(5, 4, 4)
    positions, slots = ints(0, 7, 3, 4, 5), ints(2, 0, 1, 1, 2)
    out = attend(q, keys, values, positions, slots, window=window, scale=scale, softcap=softcap)
    for t, (p, s) in enumerate(zip(positions, slots, strict=True)):
        seen = [j for j in range(p + 1) if not window or j > p - window]
        want = one_token(q[t], keys[s], values[s], seen, scale or None, softcap)
        np.testing.assert_allclose(out[t], want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (6, 3)])
def test_dense_against_a_loop_over_tokens(window: int, causal: bool, lengths: tuple[int, int] | None) -> None:
    q, k, v = normal(2, 4, 4, 3), normal(2, 6, 2, 3, seed=1), normal(2, 6, 2, 3, seed=2)
    given = None if lengths is None else ints(*lengths)
    out = attend(q, k, v, None, None, given, causal=causal, window=window)
    for b, i in np.ndindex(2, 4):
        position = i + 2
        limit = 6 if lengths is None else lengths[b]
        limit = min(limit, position + 1) if causal else limit
        seen = [j for j in range(limit) if not window or j > position - window]
        want = one_token(q[b, i], k[b], v[b], seen) if seen else np.zeros((4, 3))
        np.testing.assert_allclose(out[b, i], want, rtol=1e-12, atol=1e-14)


def test_dense_without_a_batch_axis_is_a_batch_of_one() -> None:
    q, k, v = normal(4, 4, 3), normal(6, 2, 3, seed=1), normal(6, 2, 3, seed=2)
    np.testing.assert_array_equal(attend(q, k, v), attend(q[None], k[None], v[None])[0])
    shorter = attend(q, k, v, None, None, ints(4))
    np.testing.assert_array_equal(shorter, attend(q[None], k[None], v[None], None, None, ints(4))[0])
    assert not np.array_equal(shorter, attend(q, k, v))


def test_cached_equals_dense_when_the_cache_holds_the_sequence() -> None:
    q, k, v = normal(6, 4, 8), normal(6, 2, 8, seed=1), normal(6, 2, 8, seed=2)
    cache_k, cache_v = np.full((3, 9, 2, 8), np.nan), np.full((3, 9, 2, 8), np.nan)
    cache_k[1, :6], cache_v[1, :6] = k, v
    for window in (0, 3):
        cached = attend(q, cache_k, cache_v, ints(*range(6)), ints(*[1] * 6), window=window)
        np.testing.assert_allclose(cached, attend(q, k, v, window=window), rtol=1e-12, atol=1e-14)


def test_a_ragged_batch_equals_its_tokens_alone() -> None:
    cache_k, cache_v = normal(3, 8, 2, 4, seed=1), normal(3, 8, 2, 4, seed=2)
    q, positions, slots = normal(4, 4, 4), ints(5, 2, 0, 6), ints(2, 0, 2, 1)
    whole = attend(q, cache_k, cache_v, positions, slots)
    for t in range(4):
        alone = attend(q[t : t + 1], cache_k, cache_v, positions[t : t + 1], slots[t : t + 1])
        np.testing.assert_allclose(whole[t], alone[0], rtol=1e-12)


def test_cached_without_causality_sees_the_slot_up_to_its_length() -> None:
    cache_k, cache_v = normal(2, 8, 2, 4, seed=1), normal(2, 8, 2, 4, seed=2)
    q = normal(3, 4, 4)
    out = attend(q, cache_k, cache_v, ints(0, 1, 2), ints(0, 1, 0), ints(5, 0), causal=False)
    for t in (0, 2):
        np.testing.assert_allclose(out[t], one_token(q[t], cache_k[0], cache_v[0], list(range(5))), rtol=1e-12)
    np.testing.assert_array_equal(out[1], 0.0)


def test_padding_is_zero_and_its_slot_is_not_read() -> None:
    cache = normal(1, 4, 1, 2)
    out = attend(normal(3, 1, 2), cache, cache, ints(-1, 2, -7), ints(99, 0, -3))
    np.testing.assert_array_equal(out[[0, 2]], 0.0)
    assert np.all(out[1] != 0.0)


def test_a_row_that_sees_no_key_is_zero() -> None:
    q, k = normal(1, 3, 2, 4), normal(1, 5, 2, 4, seed=1)
    out = attend(q, k, k, None, None, ints(1), causal=False, window=2)
    np.testing.assert_array_equal(out, 0.0)


def test_hidden_keys_may_hold_anything() -> None:
    keys, values = normal(1, 6, 1, 4, seed=1), normal(1, 6, 1, 4, seed=2)
    q, p, s = normal(1, 2, 4), ints(3), ints(0)
    want = attend(q, keys, values, p, s, window=2)
    keys[0, [0, 1, 4, 5]], values[0, [0, 1, 4, 5]] = np.nan, np.inf
    np.testing.assert_array_equal(attend(q, keys, values, p, s, window=2), want)


def test_rows_that_do_not_see_a_key_do_not_see_its_nan() -> None:
    keys, values = normal(1, 6, 1, 4, seed=1), normal(1, 6, 1, 4, seed=2)
    q, p, s = normal(3, 2, 4), ints(2, 3, 4), ints(0, 0, 0)
    want = attend(q, keys, values, p, s)
    values[0, 3, 0, 1] = np.nan
    out = attend(q, keys, values, p, s)
    assert np.isnan(out[1:, :, 1]).all()
    out[1:, :, 1] = want[1:, :, 1]
    np.testing.assert_allclose(out, want, rtol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    k, v = np.full((2, 1, 4), 500.0), normal(2, 1, 4)
    np.testing.assert_allclose(attend(np.full((2, 1, 4), 500.0), k, v)[1, 0], v[:, 0].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(("tokens", "slots", "capacity"), [(1, 1, 1), (1, 4, 8), (9, 3, 16), (50, 2, 8), (256, 4, 512)])
def test_sampled_places_are_distinct_and_inside_the_cache(tokens: int, slots: int, capacity: int) -> None:
    for seed in range(5):
        positions, owners = positions_and_slots(tokens, slots, capacity, np.random.default_rng(seed))
        used = positions >= 0
        places = set(zip(positions[used].tolist(), owners[used].tolist(), strict=True))
        assert len(places) == used.sum() > 0
        assert positions.max() < capacity
        assert owners.min() >= 0
        assert owners.max() < slots
        assert used.all() or tokens >= 8


def test_inputs_are_valid_for_every_sample() -> None:
    for problem in ATTENTION.samples(random.Random(1)):
        if ATTENTION.problem_cost(problem).flops < 1e6:
            arrays = ATTENTION.make_inputs(problem, np.random.default_rng(0))
            (out,) = ATTENTION.evaluate(problem, arrays)
            assert np.isfinite(out.astype(np.float64)).all()
            assert np.any(out != 0)


def test_costs() -> None:
    q, kv = TensorType((4, 2, 8), "f32"), TensorType((6, 1, 8), "f32")
    dense = ATTENTION.problem_cost(ATTENTION.problem([q, kv, kv], {}))
    assert dense.flops == 4 * (3 + 4 + 5 + 6) * 2 * 8
    assert dense.bytes == 4 * (64 + 48 + 48 + 64)
    windowed = ATTENTION.problem_cost(ATTENTION.problem([q, kv, kv], {"window": 2}))
    assert windowed.flops == 4 * (2 * 4) * 2 * 8
    cache, index = TensorType((5, 100, 1, 8), "bf16"), TensorType((4,), "i32")
    cached = ATTENTION.problem_cost(ATTENTION.problem([q, cache, cache, index, index], {}))
    assert cached.flops == 4 * 4 * 50 * 2 * 8
    assert cached.bytes == 2 * q.nbytes() + 2 * 4 * 50 * 8 * 2 + 2 * 16


@pytest.mark.parametrize(
    ("attrs", "positions", "slots", "pairs", "moved"),
    [
        ({}, [9, 10, 3], [0, 0, 1], 10 + 11 + 4, 11 + 4),
        ({}, [9, -1, 3], [0, 0, 1], 10 + 4, 10 + 4),
        ({"window": 4}, [9, 10, 2], [0, 0, 1], 4 + 4 + 3, 5 + 3),
        ({"causal": False}, [9, 10, 3], [0, 0, 1], 20 + 20 + 7, 20 + 7),
    ],
)
def test_the_work_is_that_of_the_keys_seen(
    attrs: dict[str, Any], positions: list[int], slots: list[int], pairs: int, moved: int
) -> None:
    cache, numbers = TensorType((2, 32, 2, 8), "f32"), TensorType((3,), "i32")
    lengths = None if attrs.get("causal", True) else ints(20, 7)
    operands = [TensorType((3, 4, 8), "f32"), cache, cache, numbers, numbers]
    problem = ATTENTION.problem([*operands, *([] if lengths is None else [TensorType((2,), "i32")])], attrs)
    cost = ATTENTION.known_cost(problem, [None, None, None, ints(*positions), ints(*slots), lengths])
    assert cost is not None
    assert cost.flops == 4 * 8 * 4 * pairs
    assert cost.bytes == 2 * 3 * 4 * 8 * 4 + 2 * moved * 2 * 8 * 4 + 8 * 3
    assert ATTENTION.known_cost(problem, [None] * 6) is None


@pytest.mark.parametrize(("slots", "capacity"), [(0, 4), (3, 0)])
def test_a_cache_without_room_leaves_every_token_padding(slots: int, capacity: int) -> None:
    positions, owners = positions_and_slots(9, slots, capacity, np.random.default_rng(0))
    assert (positions == -1).all()
    assert owners.shape == (9,)
