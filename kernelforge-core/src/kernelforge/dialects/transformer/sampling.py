"""`sample`: the next token of each row of logits, drawn with a number that is given."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    required,
    shape_text,
    traffic,
    want_float,
    want_i32,
    want_rank,
    want_shape,
)
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, f32, i32, make, ragged
from kernelforge.op import Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays

LEAST_TEMPERATURE = 1e-30
"""What is below it counts as 0: no two logits of one scale are that close."""

BOUNDARY = 1e-5
"""How near to the boundary between two tokens' shares of the probabilities a number must be for rounding in f32 to decide."""

_COLUMNS = 512


def infer_sample(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    logits = required(operands, 0)
    want_float("logits", logits)
    want_rank("logits", logits, 2)
    if logits.shape[1] == 0:
        raise OpError(f"operand 'logits' of shape {shape_text(logits.shape)} has no tokens to choose from")
    rows = logits.shape[:1]
    for i, spec in enumerate(SAMPLE.operands[1:], 1):
        found = required(operands, i)
        if spec.name == "top_k":
            want_i32(spec.name, found, rows, "one for each row of operand 'logits'")
            continue
        if found.dtype != "f32":
            raise OpError(f"operand '{spec.name}' must be of type f32, got {found.dtype}")
        want_shape(spec.name, found, rows, "one for each row of operand 'logits'")
    return (TensorType(rows, "i32"),)


def choose(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The token that `uniform`, a number in [0, 1), draws from `logits` [vocab]. Computed in their dtype, sums in float64.

    The order is that of most decoders: temperature, top-k, top-p (Holtzman et al. 2019), min-p (Nguyen et al. 2024), each
    seeing the probabilities that the one before it left, scaled to sum to 1. Top-k and top-p keep the largest logits, of
    equal ones the lowest ids. The draw is the first id at which the sum of what is left, in order of ids, is more than
    `uniform` of the whole. A temperature of 0 takes the largest logit, `top_k` 0 and `top_p` 1 keep all. Where the largest
    logit is NaN or infinite there is nothing to draw from: the result is its id (`argmax`).
    """
    import numpy as np

    best = int(logits.argmax())  # the first NaN, if there is one
    top = logits[best]
    if not np.isfinite(top) or temperature < LEAST_TEMPERATURE or top_k == 1:
        return best
    ids = _top_k(logits, top_k)
    kept = logits if ids is None else logits[ids]
    with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest -inf, as it should
        weights = np.exp((kept - top) / kept.dtype.type(temperature))
    if top_p < 1.0:
        inside = _top_p(kept, weights, top_p)
        ids, weights = inside if ids is None else ids[inside], weights[inside]
    if min_p > 0.0:
        weights = np.where(weights >= min_p, weights, 0.0)
    sums = weights.cumsum(dtype=np.float64)
    aim = min(uniform * sums[-1], np.nextafter(sums[-1], 0.0))
    drawn = int(sums.searchsorted(aim, side="right"))
    return drawn if ids is None else int(ids[drawn])


def _top_k(logits: Array, k: int) -> Array | None:
    """Ids of the k largest logits, ascending; None for all."""
    import numpy as np

    if not 0 < k < logits.size:
        return None
    columns = max(_COLUMNS, 2 * k)
    whole = logits.size - logits.size % columns
    ids: Array | None = None
    if whole > 2 * columns:
        # Each column's maximum is a logit, so that the k-th largest of them is at most the k-th largest logit: what is
        # below it is out, and few are left for the slower selection.
        maxima = logits[:whole].reshape(-1, columns).max(axis=0)
        ids = np.flatnonzero(logits >= np.partition(maxima, columns - k)[columns - k])
        logits = logits[ids]
    least = np.partition(logits, logits.size - k)[logits.size - k]
    above = np.flatnonzero(logits > least)
    level = np.flatnonzero(logits == least)[: k - above.size]
    chosen = np.sort(np.concatenate([above, level]))
    return chosen if ids is None else ids[chosen]


def _top_p(logits: Array, weights: Array, p: float) -> Array:
    """Places of the largest logits whose weights together first reach the share `p`, ascending."""
    import numpy as np

    # Weights below the cut sum to less than 1 - p, so that all that is wanted lies above it: few are left to be sorted.
    total = float(weights.sum(dtype=np.float64))
    places = np.flatnonzero(weights >= (1.0 - p) * total / weights.size)
    order = places[np.argsort(-logits[places], kind="stable")]
    count = int(weights[order].cumsum(dtype=np.float64).searchsorted(p * total)) + 1
    return np.sort(order[:count])


def sample_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """For each row the token that its number in [0, 1) draws: temperature, top-k, top-p, min-p, then the first id at which the
    sum of the probabilities that are left, in order of ids, is more than that number."""
    import numpy as np

    return (np.array([choose(*row) for row in zip(*arrays, strict=True)], np.int32),)


def sample_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Logits as peaked as a model's, each row with parameters of its own."""
    import numpy as np

    from kernelforge.dtype import to_numpy

    rows, vocabulary = problem.operand(0).static_shape()
    logits = 3.0 * rng.standard_normal((rows, vocabulary), dtype=np.float32)
    parameters = (
        rng.choice([0.7, 0.0, 1.0, 1.5], rows).astype(np.float32),
        rng.choice([0, 40, 1, 5, vocabulary], rows).astype(np.int32),
        rng.choice([1.0, 0.9, 0.5, 0.01], rows).astype(np.float32),
        rng.choice([0.0, 0.05, 0.4, 0.9], rows).astype(np.float32),
        rng.random(rows, dtype=np.float32),
    )
    return settled([logits.astype(to_numpy(problem.operand(0).dtype)), *parameters], rng)


def settled(arrays: list[Array | None], rng: np.random.Generator) -> list[Array | None]:
    """Operands whose result rounding does not decide: other numbers are drawn, then less is kept, until twice `BOUNDARY` to
    either side makes no difference."""
    from itertools import product

    import numpy as np

    from kernelforge.quant import widened

    logits, temperature, top_k, top_p, min_p, uniform = (a for a in arrays if a is not None)
    moves = (0.0, -2 * BOUNDARY, 2 * BOUNDARY)
    for row, values in enumerate(np.asarray(widened(logits), np.float64)):
        for attempt in range(24):
            if attempt:
                uniform[row] = rng.random(dtype=np.float32)
                top_k[row] = {8: 20, 16: 1}.get(attempt, top_k[row])
            p, m, u = (float(a[row]) for a in (top_p, min_p, uniform))
            near = {
                choose(
                    values,
                    float(temperature[row]),
                    int(top_k[row]),
                    p if p == 1.0 else p * (1.0 + kept),
                    min(m * (1.0 - kept), 1.0),
                    max(u + drawn, 0.0),
                )
                for kept, drawn in product(moves, moves)
            }
            if len(near) == 1:
                break
    return arrays


def sample_cost(problem: Problem) -> Cost:
    return Cost(3 * problem.operand(0).size(), traffic(problem))


def sample_samples(rng: random.Random) -> Iterator[Problem]:
    def problem(rows: int, vocabulary: int, dtype: str = "f32") -> Problem:
        each = f32(rows)
        return make(SAMPLE, TensorType((rows, vocabulary), dtype), each, i32(rows), each, each, each)

    yield problem(1, 1)
    yield problem(3, 5)
    for dtype in ACTIVATIONS:
        yield problem(3, ragged(rng, 5, 300), dtype)
    for model in MODELS:
        for rows in (1, 7):
            yield problem(rows, model.vocabulary)


SAMPLE = OpDef(
    name="sample",
    summary="draw a token from each row of logits: temperature, top-k, top-p, min-p, and a number in [0, 1)",
    operands=tuple(map(Operand, ("logits", "temperature", "top_k", "top_p", "min_p", "uniform"))),
    results=("out",),
    infer=infer_sample,
    reference=sample_reference,
    sample=sample_samples,
    cost=sample_cost,
    inputs=sample_inputs,
    dialect=DIALECT,
)
