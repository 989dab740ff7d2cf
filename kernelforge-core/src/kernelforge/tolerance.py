"""How far a right result may be from the exact one: the error model that tuning and conformance share.

A result is right when it is within `4 u |exact| + 8 w sqrt(L) c` of the exact one. u is the unit roundoff of its type, for
the last rounding; w that of the sums, which are f32, or f64 for f64 results; L is the length of the sums. When roundings
are independent, a sum of L terms is off by about w sqrt(L) times c, the sum of the magnitudes of its terms (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 4.2; Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", 2019).

The tuner takes the largest magnitude of the result for |exact| and c: cheap, and enough for random data with more than a few
results. Conformance, and the tuner where results are few, take both for each element, c by `condition` and the op's own
`magnitude`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, QUANTISED, epsilon, from_numpy, to_numpy
from kernelforge.errors import WrongResultError
from kernelforge.op import OpDef
from kernelforge.problem import Problem
from kernelforge.quant import dequantize, offsets, widened

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

_RESULT_ROUNDINGS = 4
_SUM_ROUNDINGS = 8

_STEP = 2.0**-30
"""Relative change of the operands by which the condition is found: small enough to be linear, large beside 2^-53."""
_TRIALS = 5

_SMALLEST = {
    "f64": 2.0**-1022,
    "f32": 2.0**-126,
    "bf16": 2.0**-126,
    "f16": 2.0**-24,
    "q8": 127 * 2.0**-24,
    "q8a": 127 * 2.0**-126,
}
"""Results may be off by this much: subnormal numbers may be flushed to zero, but for those of f16. Of quantised ones the
scales are such numbers."""

_STEPS = {"q8": 0.55 / 127 + 2.0**-11, "q8a": 0.55 / 127}
"""How far the numbers of a group may be off by the rounding of its values and its scale, relative to the largest of them:
half a step, and a tenth of that for a kernel whose own numbers are a little larger or smaller."""

MismatchKind = Literal["wrong-shape", "wrong-dtype", "wrong-values"]


class Mismatch(WrongResultError):
    """A result that is not the reference's."""

    def __init__(self, kind: MismatchKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Roundings:
    """The error of one result that rounding explains; both are 0 where bits must agree."""

    result: float
    """Relative to the result's magnitude."""
    sums: float
    """Relative to the magnitudes of the terms that it is the sum of."""


def roundings(problem: Problem, op: OpDef, index: int) -> Roundings:
    """Of result `index` of a static problem."""
    dtype = problem.results[index].dtype
    if op.exact or dtype not in (*FLOATS, *_STEPS):
        return Roundings(0.0, 0.0)
    elements = sum(t.size() for t in problem.results)
    rows = [t.static_shape()[-1] for t in problem.operands if t is not None and t.rank]
    length = max(2, op.problem_cost(problem).flops // max(elements, 1), *rows)
    accumulated = epsilon("f64") if dtype == "f64" else epsilon("f32")
    rounding = _STEPS[dtype] if dtype in _STEPS else _RESULT_ROUNDINGS * epsilon(dtype)
    return Roundings(rounding, _SUM_ROUNDINGS * accumulated * math.sqrt(length))


def tolerance(problem: Problem, op: OpDef) -> float:
    """Largest error that rounding explains, relative to the largest magnitude of a result; 0 where bits must agree."""
    found = [roundings(problem, op, i) for i in range(len(problem.results))]
    return max((r.result + r.sums for r in found), default=0.0)


@dataclass(frozen=True)
class Expected:
    """What one result must be."""

    exact: Array
    """Not rounded to the result's type."""
    allowed: Array
    """Largest absolute error of each element."""


def expect(
    problem: Problem,
    op: OpDef,
    arrays: Sequence[Array | None],
    *,
    factor: float = 1.0,
    between: float = 0.0,
    flushes: bool = False,
) -> tuple[Expected, ...]:
    """What a static problem's results must be for these operands. `factor` widens the tolerance; `between` is the unit
    roundoff of what may be rounded on the way; with `flushes`, subnormal operands may count as zero, each time they are read
    or never."""
    exact = op.compute(problem, arrays)
    models = [roundings(problem, op, i) for i in range(len(exact))]
    if not any(m.result for m in models):
        return tuple(Expected(e, np.zeros(e.shape)) for e in exact)
    conditions = condition(problem, op, arrays, exact)
    magnitudes = op.magnitudes(problem, arrays) or tuple(np.zeros(e.shape) for e in exact)
    terms = [c + np.where(np.isfinite(m), np.abs(m), 0.0) for c, m in zip(conditions, magnitudes, strict=True)]
    undecided = op.either_way(problem, arrays) or tuple(np.zeros(e.shape) for e in exact)
    others = op.compute(problem, [None if a is None else _flushed(a) for a in arrays]) if flushes else exact
    found = []
    for e, other, m, c, t, more in zip(exact, others, models, terms, problem.results, undecided, strict=True):
        size = np.abs(np.where(np.isfinite(e), e, 0.0))
        if t.quantised and m.result:
            size = np.repeat(_grouped(size).max(axis=-1, initial=0.0), GROUP, axis=-1)
        smallest = _SMALLEST[t.dtype] if m.result else 0.0
        with np.errstate(invalid="ignore"):
            apart = np.abs(np.asarray(other, np.float64) - e) if m.result and flushes else np.zeros(e.shape)
        apart, more = (np.where(np.isfinite(a), a, 0.0) for a in (apart, more))
        on_the_way = between * c if m.result else 0.0
        found.append(Expected(e, factor * (m.result * size + m.sums * c) + on_the_way + smallest + apart + more))
    return tuple(found)


def _flushed(a: Array) -> Array:
    """Subnormal numbers of f32 and bf16 as zeros of their sign; those of f16 are kept, f32 holds them."""
    if from_numpy(a.dtype) not in ("f32", "bf16"):
        return a
    wide = a.astype(np.float64)
    return np.asarray(np.where(np.abs(wide) < 2.0**-126, np.copysign(0.0, wide), wide).astype(a.dtype))


def condition(problem: Problem, op: OpDef, arrays: Sequence[Array | None], exact: Sequence[Array]) -> tuple[Array, ...]:
    """For each element y of the results, the sum of |dy/dx x| over all operand elements and float attributes x: for a
    matrix product the sum of |a b|.

    Estimated without knowing the op: changing every x by a relative step times a Cauchy variable of its own changes y by
    a Cauchy variable whose scale is that sum; the median magnitude of a few trials estimates it (Indyk, "Stable
    Distributions, Pseudorandom Generators, Embeddings and Data Stream Computation", 2000).
    """
    rng = np.random.default_rng(0)
    changes: list[list[Array]] = [[] for _ in exact]
    for _ in range(_TRIALS):
        moved = [a if a is None or a.dtype.kind in "iu" else _moved(widened(a), rng) for a in arrays]
        attrs = tuple((name, float(_moved(v, rng)) if isinstance(v, float) else v) for name, v in problem.attrs)
        with np.errstate(all="ignore"):
            for found, y, before in zip(changes, op.compute(replace(problem, attrs=attrs), moved), exact, strict=True):
                found.append(np.abs(np.asarray(y, np.float64) - before) / _STEP)
    with np.errstate(all="ignore"):
        medians = (np.median(np.stack(found), axis=0) for found in changes)
        return tuple(np.where(np.isfinite(m), m, 0.0) for m in medians)


def _moved(x: Any, rng: np.random.Generator) -> Any:
    with np.errstate(all="ignore"):
        return x * (1.0 + _STEP * np.clip(rng.standard_cauchy(np.shape(x)), -1e6, 1e6))


def compare(got: Array, exact: Array, allowed: Array | float, dtype: str, what: str) -> float:
    """The largest error, relative to the largest magnitude of the exact result. NaN and infinity must be where they
    belong; where nothing is allowed, bits must agree. `exact` of a quantised result holds groups, which must agree, or
    the numbers that they were made from.

    Raises Mismatch, beginning with `what`, for another shape, dtype or value.
    """
    if dtype in QUANTISED and exact.dtype.names is None:
        return _compare_numbers(got, exact, allowed, dtype, what)
    if got.shape != exact.shape or got.dtype != to_numpy(dtype):
        have, want = f"{got.dtype}{list(got.shape)}", f"{to_numpy(dtype)}{list(exact.shape)}"
        kind: MismatchKind = "wrong-shape" if got.shape != exact.shape else "wrong-dtype"
        raise Mismatch(kind, f"{what} is {have}, the reference gives {want}")
    if dtype in QUANTISED:
        return compare(got.view(np.int8), exact.view(np.int8), 0.0, "i8", what)
    with np.errstate(all="ignore"):
        rounded = exact.astype(got.dtype)
        if dtype not in FLOATS:
            _refuse(got != rounded, got, rounded, what)
            return 0.0
        values, wanted = got.astype(np.float64), rounded.astype(np.float64)
        truth = exact.astype(np.float64)
        limit = np.broadcast_to(np.asarray(allowed, np.float64), values.shape)
        same = (values == wanted) | (np.isnan(values) & np.isnan(wanted))
        bits = same & ((values != 0.0) | (np.signbit(values) == np.signbit(wanted)))
        # What may overflow by the error that is allowed may be infinite or not.
        most = float(np.finfo(got.dtype).max) if got.dtype.kind == "f" else float.fromhex("0x1.fep127")
        reach = np.isfinite(truth) & np.isfinite(limit) & (np.abs(truth) + limit >= most)
        close = reach & np.isinf(values) & (values * truth > 0)
        difference = np.where(np.isfinite(truth) & np.isfinite(values), np.abs(values - truth), 0.0)
        decided = np.isfinite(truth) & np.isfinite(values)
        odd = ~np.where(limit == 0.0, bits, same | close | decided)
    _refuse(odd, values, truth, what)
    scale = float(np.max(np.abs(truth), initial=0.0, where=np.isfinite(truth))) or 1.0
    excess = np.where(bits | close, 0.0, difference - limit)
    if not np.max(excess, initial=0.0) <= 0.0:
        at = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
        raise Mismatch(
            "wrong-values",
            f"{what} has {values[at]:g} at {list(at)} where the reference has {truth[at]:g}: "
            f"relative error {difference[at] / scale:.2e}, tolerated {limit[at] / scale:.2e} "
            f"({int((excess > 0).sum())} of {excess.size} elements)",
        )
    return float(np.max(np.where(close, 0.0, difference), initial=0.0)) / scale


def _grouped(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def _compare_numbers(got: Array, exact: Array, allowed: Array | float, dtype: str, what: str) -> float:
    groups = _grouped(exact)
    if got.shape != groups.shape[:-1] or got.dtype != to_numpy(dtype):
        message = f"{what} is {got.dtype}{list(got.shape)}, the reference gives {dtype}{list(exact.shape)}"
        raise Mismatch("wrong-shape", message)
    if dtype == ACTIVATION_FORMAT:
        if not np.array_equal(got["zeros"], offsets(got["values"])):
            raise Mismatch("wrong-values", f"{what} has a group whose sums are not those of its values")
        spoilt = ~np.isfinite(groups).all(axis=-1, keepdims=True)
        exact = np.where(spoilt, np.nan, groups).reshape(exact.shape)
    return compare(dequantize(got), exact, allowed, "f32", what)


def _refuse(odd: Array, values: Array, truth: Array, what: str) -> None:
    if odd.any():
        at = tuple(int(i) for i in np.argwhere(odd)[0])
        raise Mismatch(
            "wrong-values",
            f"{what} has {values[at]:g} at {list(at)} where the reference has {truth[at]:g} "
            f"({int(odd.sum())} such elements)",
        )
