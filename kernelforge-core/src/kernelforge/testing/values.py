"""What operands are filled with: the op's own inputs, changed into what kernels get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import FLOATS, WEIGHT_FORMATS, to_numpy
from kernelforge.testing.families import family_of

if TYPE_CHECKING:
    from kernelforge.op import OpDef
    from kernelforge.problem import Problem

    Array = np.ndarray[Any, np.dtype[Any]]
    Generator = np.random.Generator


def _anywhere(a: Array, rng: Generator, *odd: float) -> Array:
    """Put each odd value at a random place."""
    for value in odd:
        if a.size:
            a[np.unravel_index(int(rng.integers(a.size)), a.shape)] = value
    return a


def _denormal(a: Array, rng: Generator) -> Array:
    return np.asarray(a * 2.0**-130)


def _mixed(a: Array, rng: Generator) -> Array:
    """Magnitudes from 1e-3 to 1e3: sums cancel."""
    return np.asarray(np.sign(a) * 10.0 ** rng.uniform(-3, 3, a.shape))


def _zeros(a: Array, rng: Generator) -> Array:
    return np.where(rng.random(a.shape) < 0.5, np.copysign(0.0, a), a)


ALL: dict[str, Callable[[Array, Generator], Array]] = {
    "nan": lambda a, rng: _anywhere(a, rng, np.nan),
    "zeros": _zeros,
    "ties": lambda a, rng: np.asarray(rng.integers(-2, 3, a.shape) / 2.0),
    "ones": lambda a, rng: np.ones(a.shape),
    "tiny": lambda a, rng: np.asarray(a * 1e-4),
    "mixed": _mixed,
}
"""Changes of every float operand."""

FIRST: dict[str, Callable[[Array, Generator], Array]] = {
    "inf": lambda a, rng: _anywhere(a, rng, np.inf, -np.inf),
    "denormal": _denormal,
    "huge": lambda a, rng: np.asarray(a * 1e4),
    "offset": lambda a, rng: np.asarray(1000.0 + a),
}
"""Changes of the first float operand."""


def value_names(op: OpDef, problem: Problem) -> tuple[str, ...]:
    """The kinds of values that suit a problem, "normal" first."""
    floats = [t for t in problem.operands if t is not None and t.dtype in FLOATS]
    if not floats:
        return ("normal",)
    if any(t.dtype not in FLOATS if op.exact else t.dtype in WEIGHT_FORMATS for t in problem.results):
        own = () if op.exact else family_of(op).values
        return ("normal", "zeros", "ties", *own)  # what has no integer has no defined one either
    return tuple(dict.fromkeys(("normal", *ALL, *FIRST, *family_of(op).values)))


def fill(name: str, op: OpDef, problem: Problem, rng: Generator) -> list[Array | None]:
    """Operands of a static problem; `name` is one of `value_names`."""
    arrays = op.make_inputs(problem, rng)
    if name in (special := family_of(op).values):
        return special[name](problem, arrays, rng)
    first = True
    for i, (array, t) in enumerate(zip(arrays, problem.operands, strict=True)):
        if array is None or t is None or t.dtype not in FLOATS or name == "normal":
            continue
        if first or name in ALL:
            arrays[i] = changed(name, array, t.dtype, rng)
        first = False
    return arrays


def changed(name: str, array: Array, dtype: str, rng: Generator) -> Array:
    """A float operand with the values `name`, one of `ALL` or `FIRST`."""
    with np.errstate(all="ignore"):
        wide = {**ALL, **FIRST}[name](array.astype(np.float64), rng)
        if name == "denormal" and dtype == "f16":
            wide *= 2.0**112
        if name == "huge" and dtype == "f16":
            wide = np.clip(wide, -60000.0, 60000.0)
        return wide.astype(to_numpy(dtype))
