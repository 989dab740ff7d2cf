"""What a call of a compiled op costs above its kernel's own time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.session import Session

OP = "transformer.add"
SHAPE = (4, 16)
"""So small that one thread computes it in well under a microsecond."""

_ROUNDS = 200
_CALLS = 50


@dataclass(frozen=True)
class Dispatch:
    """Seconds of one call, each the best of many blocks of calls: what it costs when nothing disturbs it."""

    problem: Problem
    kernel: float
    """Run again and again by native code, where the target can."""
    bound: float
    """Of what `Executable.bind` returns."""
    plain: float
    """Of `Executable.run` with arrays, a new output each time."""


def measure_dispatch(session: Session) -> Dispatch:
    """Time the dispatch of a small op. All three are timed in turn, so that a slow moment hits all alike."""
    import numpy as np

    operand = TensorType(SHAPE, "f32")
    problem = session.registry.ops[OP].problem((operand, operand), {})
    executable = session.compile_problem(problem)
    values = executable.plan.values
    inputs = {values[i].name: np.ones(SHAPE, np.float32) for i in executable.plan.inputs}
    bound = executable.bind(inputs)
    best = [float("inf")] * 3
    for _ in range(_ROUNDS):
        times = (
            min(executable.measure(inputs, repeats=2).samples),
            _block(bound),
            _block(lambda: executable.run(inputs)),
        )
        best = [min(pair) for pair in zip(best, times, strict=True)]
    return Dispatch(problem, *best)


def _block(call: Callable[[], object]) -> float:
    """Seconds of one call, the mean of some."""
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - start) / _CALLS
