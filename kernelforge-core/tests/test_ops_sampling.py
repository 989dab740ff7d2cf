"""The op `sample`: its reference against the same rule written as plainly as possible."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelforge.dialects.transformer.sampling import SAMPLE, choose

Array = np.ndarray[Any, np.dtype[Any]]
INF = math.inf


def plain(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if mass >= top_p * sum(weights.values()):
            break
    kept = sorted(i for i in kept if weights[i] >= min_p)
    aim, mass = uniform * sum(weights[i] for i in kept), 0.0
    for i in kept:
        mass += weights[i]
        if mass > aim:
            return i
    return kept[-1]


@settings(deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 14),
    st.sampled_from([0.1, 0.55, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]),
)
def test_the_rule_in_its_plain_form(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = [v / 4 for v in values]
    for uniform in np.arange(0.5, 16) / 16.37:
        want = plain(logits, temperature, top_k, top_p, min_p, uniform)
        assert choose(np.array(logits), temperature, top_k, top_p, min_p, uniform) == want
        assert choose(np.array(logits, np.float32), temperature, top_k, top_p, min_p, uniform) == want


def test_many_logits_in_both_widths() -> None:
    rng = np.random.default_rng(3)
    logits = 3 * rng.standard_normal(4000, np.float32)
    for temperature, top_k, top_p, min_p in ((1.0, 0, 1.0, 0.0), (0.7, 40, 0.95, 0.0), (1.3, 700, 0.8, 0.01)):
        for uniform in rng.random(5):
            want = plain(logits.tolist(), temperature, top_k, top_p, min_p, uniform)
            assert choose(logits.astype(np.float64), temperature, top_k, top_p, min_p, uniform) == want
            assert choose(logits, temperature, top_k, top_p, min_p, uniform) == want


@pytest.mark.parametrize(
    ("logits", "options", "want"),
    [
        ([1, 5, 2, 5], (0.0, 0, 1.0, 0.0, 0.99), 1),
        ([1, 5, 2, 5], (1e-31, 0, 1.0, 0.0, 0.99), 1),
        ([1, 5, 2, 5], (1e-20, 0, 1.0, 0.0, 0.99), 3),
        ([1, 5, 2, 5], (1.0, 1, 1.0, 0.0, 0.99), 1),
        ([1, 5, 2, 5], (1.0, 0, 1e-9, 0.0, 0.99), 1),
        ([1, 5, 2, 5], (1.0, 0, 1.0, 1.0, 0.99), 3),
        ([0, -INF, 0, -INF], (100.0, 0, 1.0, 0.0, 0.999), 2),
        ([0, -INF, 0, -INF], (100.0, 0, 1.0, 0.0, 1.0), 2),
        ([-INF, -INF], (1.0, 0, 1.0, 0.0, 0.9), 0),
        ([1, math.nan, INF, 2], (1.0, 2, 0.5, 0.0, 0.9), 1),
        ([1, -INF, INF, INF], (1.0, 0, 1.0, 0.0, 0.9), 2),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges(logits: list[float], options: tuple[float, int, float, float, float], want: int, dtype: type) -> None:
    assert choose(np.array(logits, dtype), *options) == want


def test_rows_have_parameters_of_their_own_and_inputs_keep_clear_of_boundaries() -> None:
    problem = list(SAMPLE.samples(random.Random(0)))[2]
    arrays = SAMPLE.make_inputs(problem, np.random.default_rng(0))
    (found,) = SAMPLE.evaluate(problem, arrays)
    rows: list[Array] = [a for a in arrays if a is not None]
    assert found.tolist() == [choose(*row) for row in zip(*rows, strict=True)]
    for move in (-1e-5, 1e-5):
        near = [*arrays[:5], np.clip(rows[5] + np.float32(move), 0, 1)]
        assert SAMPLE.evaluate(problem, near)[0].tolist() == found.tolist()
