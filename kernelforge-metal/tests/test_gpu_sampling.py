"""Sampling on the GPU where its reference cannot go unnoticed: thresholds and ties across parts of a row, edges, frequencies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kernelforge.dialects.transformer.sampling import SAMPLE, settled
from kernelforge.problem import TensorType, parse_problem
from kernelforge.session import Session
from kernelforge.variant import Accept, DeviceInfo, Reject
from kernelforge_metal.kernels.sampling import MOST, PART, takes_sample

Array = np.ndarray[Any, np.dtype[Any]]
INF = math.inf
NAMES = [o.name for o in SAMPLE.operands]


def operands(logits: Array, *rows: tuple[float, int, float, float, float]) -> list[Array | None]:
    """Of rows (temperature, top_k, top_p, min_p, uniform), each on its own row of logits, or all on the same ones."""
    temperature, top_k, top_p, min_p, uniform = zip(*rows, strict=True)
    floats = [np.array(x, np.float32) for x in (temperature, top_p, min_p, uniform)]
    shape = (len(rows), logits.shape[-1])
    return [np.broadcast_to(logits, shape).copy(), floats[0], np.array(top_k, np.int32), *floats[1:]]


def sampled(gpu: Session, arrays: list[Array | None]) -> tuple[list[int], list[int]]:
    """What the GPU chooses and what the reference does."""
    given = {name: a for name, a in zip(NAMES, arrays, strict=True) if a is not None}
    types = [TensorType(given[name].shape, "i32" if name == "top_k" else "f32") for name in NAMES]
    problem = SAMPLE.problem(types, {})
    (found,) = gpu.compile_problem(problem, variant="wgsl").run(given)
    assert isinstance(found, np.ndarray)
    return found.tolist(), SAMPLE.evaluate(problem, arrays)[0].tolist()


def test_filters_of_long_rows(gpu: Session) -> None:
    rng = np.random.default_rng(0)
    size = 9 * PART + 77
    rows = [
        (temperature, top_k, top_p, min_p, float(rng.random()))
        for temperature in (0.6, 1.4)
        for top_k in (0, 2, 50, 3000)
        for top_p in (1.0, 0.95, 0.3)
        for min_p in (0.0, 0.02)
    ]
    logits = 4 * rng.standard_normal((len(rows), size), np.float32)
    logits[::5] = np.round(logits[::5])  # ties
    found, want = sampled(gpu, settled(operands(logits, *rows), rng))
    assert found == want
    assert len(set(want)) > len(want) // 2


def test_ties_and_numbers_that_are_none(gpu: Session) -> None:
    size = 3 * PART + 5
    level = np.zeros(size, np.float32)
    masked = np.full(size, -INF, np.float32)
    masked[[7, PART + 3, size - 1]] = 1.0
    flawed, endless, lost = level.copy(), level.copy(), np.full(size, -INF, np.float32)
    flawed[[PART, size - 1]] = np.nan
    endless[[9, 2 * PART]] = INF
    peaked = level.copy()
    peaked[[PART + 1, 2 * PART]] = 9.0
    raised = level.copy()
    raised[2 * PART - 1] = 0.5
    cases = [
        (level, (1.0, 0, 1.0, 0.0, 0.0), 0),
        (level, (1.0, 0, 1.0, 0.0, 1 - 2.0**-24), size - 1),
        (level, (1.0, 0, 1.0, 0.0, (PART + 0.5) / size), PART),
        (level, (1.0, PART + 2, 1.0, 0.0, 0.9999), PART + 1),
        (level, (1.0, 0, (PART + 1.5) / size, 0.0, 0.9999), PART + 1),
        (level, (1.0, 2 * PART, 0.5, 1.0, 0.9999), PART - 1),
        (level, (1e-31, 0, 1.0, 0.0, 0.9), 0),
        (raised, (1.0, PART + 2, 1.0, 0.0, 0.9999), 2 * PART - 1),
        (masked, (50.0, 0, 1.0, 0.0, 0.5), PART + 3),
        (masked, (1.0, 5, 1.0, 0.0, 0.99), size - 1),
        (masked, (1.0, 2, 1.0, 0.0, 0.99), PART + 3),
        (flawed, (1.0, 3, 0.5, 0.1, 0.5), PART),
        (endless, (1.0, 3, 0.5, 0.1, 0.5), 9),
        (lost, (1.0, 0, 1.0, 0.0, 0.7), 0),
        (peaked, (1e-20, 0, 1.0, 0.0, 0.9), 2 * PART),
        (peaked, (0.0, 0, 1.0, 0.0, 0.9), PART + 1),
        (peaked, (1.0, 1, 1.0, 0.0, 0.9), PART + 1),
        (peaked, (1.0, 0, 1e-9, 0.0, 0.9), PART + 1),
        (peaked, (1.0, 0, 1.0, 1.0, 0.9), 2 * PART),
        (peaked, (1.0, size + 1, 1.0, 0.5, 0.1), PART + 1),
    ]
    found, want = sampled(gpu, operands(np.stack([c[0] for c in cases]), *(c[1] for c in cases)))
    assert found == want == [c[2] for c in cases]


def test_frequencies_are_the_probabilities(gpu: Session) -> None:
    """Pearson's chi-square over draws of a fixed seed, below the 99.9 % point for 6 degrees of freedom."""
    shares = np.array([0.3, 0.05, 0.2, 0.25, 0.1, 0.07, 0.03])
    count = 500
    rows = [(1.0, 0, 1.0, 0.0, float(u)) for u in np.random.default_rng(5).random(count, np.float32)]
    found, _ = sampled(gpu, operands(np.log(shares).astype(np.float32), *rows))
    expected = count * shares
    assert ((np.bincount(found, minlength=7) - expected) ** 2 / expected).sum() < 22.5


def test_what_it_does_not_take() -> None:
    def verdict(size: int | str, dtype: str = "f32") -> Accept | Reject:
        text = f"transformer.sample({dtype}[2,{size}], f32[2], i32[2], f32[2], f32[2], f32[2]) -> (i32[2]) {{}}"
        return takes_sample(parse_problem(text), DeviceInfo("gpu", "null", "null"))

    assert verdict(MOST) == Accept()
    assert verdict(9, "bf16") == Reject("takes f32 logits, as decoders give them, not bf16")
    assert verdict(MOST + 1) == Reject(f"takes at most {MOST} logits, not {MOST + 1}")
    assert verdict("n") == Reject("takes a number of logits that is known when it is built")
