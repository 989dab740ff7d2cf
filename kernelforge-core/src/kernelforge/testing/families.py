"""How the problems of an op are made from named choices, so that few of them cover all pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import FLOATS, WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Values = Callable[[Problem, list[Array | None], np.random.Generator], list[Array | None]]

Choice = Mapping[str, Any]

TOKENS = "tokens"
"""Name of the dynamic dimension."""

SIZES = (7, 1, 2, 3, 5, 13, 17, 31, 33, 64, 127)


@dataclass(frozen=True)
class Family:
    """The problems of an op. A choice has a value for every factor and a size for every extent."""

    factors: Mapping[str, Sequence[Any]]
    """Attributes, types, absent operands: all pairs of them are covered. The first values are the plain ones; `dtype`
    is the types of the float operands."""
    make: Callable[[OpDef, Choice], Problem]
    """The problem of a choice. Raises OpError where the op refuses it."""
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Extents: each size occurs, not every pair."""
    tiled: tuple[str, ...] = ()
    """Extents that are also tried on either side of the tile sizes that a variant declares."""
    dynamic: str = ""
    """The extent that may be known only when running."""
    zero: tuple[str, ...] = ()
    """Extents that may be 0."""
    extremes: Mapping[str, Choice] = field(default_factory=dict)
    """Choices (in part) of large problems, each tried once."""
    values: Mapping[str, Values] = field(default_factory=dict)
    """Edge values of the op's own."""
    _made: dict[tuple[str, frozenset[tuple[str, Any]]], Problem | None] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Problems of ops and choices: all variants of an op are asked for mostly the same ones."""

    def problem(self, op: OpDef, choice: Choice, *, dynamic: bool = False) -> Problem | None:
        """The canonical problem of a complete choice, None where the op refuses it. `dynamic` leaves an extent open."""
        if dynamic:
            choice = {**choice, self.dynamic: TOKENS}
        key = op.full_name, frozenset(choice.items())
        if key not in self._made:
            try:
                self._made[key] = self.make(op, choice).canonical()
            except (OpError, UsageError):
                self._made[key] = None
        return self._made[key]

    def first(self, **changed: Any) -> dict[str, Any]:
        """The plainest choice."""
        plain = {name: values[0] for name, values in (*self.factors.items(), *self.sizes.items())}
        return {**plain, **changed}


def family_of(op: OpDef) -> Family:
    """The op's family: written by hand for the transformer dialect, else made from its samples."""
    from kernelforge.testing.transformer import FAMILIES

    return FAMILIES.get(op.full_name) or sampled(op)


MOST_BYTES = 1 << 20
MOST_SAMPLES = 12
AS_SAMPLED = "as sampled"


def sampled(op: OpDef) -> Family:
    """The family of an op of which nothing is known but its `OpDef`: its small samples, with other float types, and with
    the first dimension of the first operand, wherever it occurs first, left open."""
    samples = []
    for problem in op.samples(random.Random(0)):
        if any(t.dtype in WEIGHT_FORMATS for t in problem.results):
            continue  # computed when a module is compiled, never by a kernel
        if sum(t.nbytes() for t in (*problem.operands, *problem.results) if t is not None) <= MOST_BYTES:
            samples.append(problem)
        if len(samples) == MOST_SAMPLES:
            break

    def make(op: OpDef, choice: Choice) -> Problem:
        if not samples:
            raise OpError("there is no small sample")
        sample = samples[choice["sample"]]
        operands = [None if t is None else _retyped(t, choice["dtype"]) for t in sample.operands]
        if choice["lead"] == TOKENS:
            operands = _relead(operands, choice["lead"])
        return op.problem(operands, dict(sample.attrs))

    return Family(
        {"dtype": (AS_SAMPLED, "bf16", "f16"), "sample": range(max(len(samples), 1))},
        make,
        {"lead": (3, 1, 2, 7, 17)},
        dynamic="lead",
        zero=("lead",),
    )


def _retyped(t: TensorType, dtype: str) -> TensorType:
    if dtype == AS_SAMPLED or t.dtype not in FLOATS:
        return t
    return TensorType(t.shape, dtype, t.strides, t.constant)


def _relead(operands: Sequence[TensorType | None], lead: str) -> list[TensorType | None]:
    first = next((t for t in operands if t is not None and t.rank), None)
    if first is None:
        raise OpError("no operand has dimensions")
    return [
        TensorType((lead, *t.shape[1:]), t.dtype)
        if t is not None and t.rank and not t.constant and t.shape[0] == first.shape[0]
        else t
        for t in operands
    ]


def dtype_label(problem: Problem) -> str:
    """The distinct types of the float operands in order, the results' where they differ: "f32*bf16", "f32->bf16"."""
    operands = dict.fromkeys(t.dtype for t in problem.operands if t is not None and (t.quantised or t.dtype in FLOATS))
    results = dict.fromkeys(t.dtype for t in problem.results)
    floats = "*".join(operands) or "*".join(dict.fromkeys(t.dtype for t in problem.operands if t is not None))
    return floats if set(results) <= set(operands) or set(results) == {"i32"} else f"{floats}->{'*'.join(results)}"
