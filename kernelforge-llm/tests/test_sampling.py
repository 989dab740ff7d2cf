from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernelforge.errors import KernelForgeError, UsageError
from kernelforge_llm.sampling import Draws, Sampling, greedy, make_sampler

Logits = NDArray[np.float32]


def test_a_number_that_is_drawn_is_below_1_in_float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest:
        def random(self) -> float:
            return math.nextafter(1.0, 0.0)

    draws = Draws(0)
    monkeypatch.setattr(draws, "_generator", Largest())
    assert draws.take() == np.nextafter(np.float32(1), np.float32(0))


def logits_of(*probabilities: float) -> Logits:
    return np.asarray(np.log(probabilities), np.float32)


def drawn(logits: Logits, count: int = 400, history: list[int] | None = None, **options: Any) -> set[int]:
    """The ids that many draws give."""
    sample = make_sampler(Sampling(seed=0, **options))
    return {sample(logits, history or []) for _ in range(count)}


def expected_probabilities(logits: Logits, sampling: Sampling, history: list[int]) -> NDArray[np.float64]:
    """The same filters, written as plainly as possible."""
    scores = [float(value) for value in logits]
    for token in set(history):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    scores = [float(np.float32(score)) / sampling.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[: sampling.top_k or None]
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in order}
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token]
        if mass >= sampling.top_p * sum(weights.values()):
            break
    kept = [token for token in kept if weights[token] >= sampling.min_p]
    total = sum(weights[token] for token in kept)
    return np.array([weights[token] / total if token in kept else 0.0 for token in range(len(scores))])


@settings(deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 14),
    st.sampled_from([0.1, 0.55, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    st.sampled_from([0.8, 1.0, 1.7]),
)
def test_filters_equal_their_plain_form(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits: Logits = np.array(values, np.float32) / np.float32(4)
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, seed=7)
    history = [token for token in (0, 3, 3, 5) if token < len(values)]
    expected = expected_probabilities(logits, sampling, history)
    sample = make_sampler(sampling)
    for _ in range(20):
        assert expected[sample(logits, history)] > 0


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 2.0}, {"min_p": 0.3}])
def test_frequencies_follow_the_probabilities(options: dict[str, Any]) -> None:
    logits = logits_of(0.1, 0.4, 0.05, 0.3, 0.15)
    sampling = Sampling(seed=11, **options)
    sample = make_sampler(sampling)
    count = 20_000
    found = np.bincount([sample(logits, []) for _ in range(count)], minlength=5) / count
    np.testing.assert_allclose(found, expected_probabilities(logits, sampling, []), atol=0.015)


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    assert greedy(np.array([1, 5, 2, 5], np.float32)) == 1
    sample = make_sampler(Sampling(temperature=0.0, top_k=2, top_p=0.1, seed=3))
    assert sample is greedy
    assert drawn(np.array([1, 5, 2, 5], np.float32), temperature=0.0, repetition_penalty=2.0) == {1}


def test_top_k_of_equals_keeps_the_lowest_ids() -> None:
    assert drawn(np.array([1, 7, 7, 7, 9, 7], np.float32), top_k=3, temperature=5.0) == {1, 2, 4}
    assert drawn(np.zeros(6, np.float32), top_k=2) == {0, 1}
    assert drawn(np.zeros(3, np.float32), top_k=50) == {0, 1, 2}


def test_top_p_includes_the_token_that_reaches_it() -> None:
    logits = logits_of(0.2, 0.5, 0.3)
    assert drawn(logits, top_p=0.49) == {1}
    assert drawn(logits, top_p=0.51) == {1, 2}
    assert drawn(logits, top_p=0.81) == {0, 1, 2}
    assert drawn(np.zeros(4, np.float32), top_p=0.5) == {0, 1}


def test_top_p_counts_what_top_k_left() -> None:
    assert drawn(logits_of(0.4, 0.35, 0.25), top_k=2, top_p=0.52) == {0}
    assert drawn(logits_of(0.4, 0.35, 0.25), top_p=0.52) == {0, 1}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert drawn(logits_of(0.5, 0.3, 0.2), min_p=0.5) == {0, 1}
    assert drawn(logits_of(0.5, 0.3, 0.2), min_p=1.0) == {0}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([4.0, 3.0, -1.0], np.float32)
    assert drawn(logits, history=[0, 0], temperature=0.0, repetition_penalty=1.4) == {1}
    assert drawn(logits, history=[0, 0], temperature=0.0, repetition_penalty=1.2) == {0}
    assert drawn(-logits, history=[2], temperature=0.0, repetition_penalty=0.5) == {2}
    low = np.array([-1.0, -1.5], np.float32)
    assert drawn(low, history=[0], temperature=0.0, repetition_penalty=1.6) == {1}
    np.testing.assert_array_equal(logits, [4.0, 3.0, -1.0])


def test_a_tiny_temperature_is_greedy_and_masked_tokens_are_never_drawn() -> None:
    assert drawn(np.array([1, 1.5, -np.inf, 1.4], np.float32), temperature=1e-320) == {1}
    assert drawn(np.array([0, -np.inf, 0], np.float32), temperature=100.0) == {0, 2}


def test_a_seed_decides_the_draws() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)

    def run(seed: int | None) -> list[int]:
        sample = make_sampler(Sampling(seed=seed))
        return [sample(logits, []) for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)
    # The draws are fixed for good: a seed in a document shows the same text next year.
    assert run(2024)[:6] == [652, 211, 281, 766, 995, 135]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("bad", [[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [-math.inf] * 3])
def test_broken_logits_are_an_error(options: dict[str, Any], bad: list[float]) -> None:
    with pytest.raises(KernelForgeError, match="the largest logit is") as caught:
        make_sampler(Sampling(**options))(np.array(bad, np.float32), [0])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True]),
        ("top_k", [-1, 1.5, True]),
        ("top_p", [0.0, -1.0, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.0, -1.0, math.inf, math.nan]),
        ("seed", [-1, 1.5]),
    ],
)
def test_refuses(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{field} must be"):
            Sampling(**{field: value})
