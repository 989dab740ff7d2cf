"""Is a kernel right? Fresh inputs, a float64 reference, and a tolerance that follows from the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge import tolerance
from kernelforge.dtype import FLOATS, from_numpy, to_numpy
from kernelforge.errors import UsageError
from kernelforge.problem import Problem, TensorType
from kernelforge.problem_plan import memory_of, operand_names
from kernelforge.quant import dequantize

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Device, Executable
    from kernelforge.session import Session

Array = np.ndarray[Any, np.dtype[Any]]

FEW = 32
"""Up to so many results each is judged by its own terms, as conformance does (`tolerance.expect`): the largest of few may itself
be far smaller than what it is the sum of, or lie where an activation is nearly 0."""


@dataclass(frozen=True)
class Error:
    """How far results are from the reference's."""

    largest: float = 0.0
    """Largest difference, relative to the largest magnitude of the reference."""
    norm: float = 0.0
    """2-norm of the difference, relative to the 2-norm of the reference."""
    tolerated: float = 0.0
    """Largest difference that was allowed, relative as `largest`."""

    def __or__(self, other: Error) -> Error:
        """The worse of both."""
        return Error(*(max(a, b) for a, b in zip(astuple(self), astuple(other), strict=True)))


def compare(got: Array, want: Array, allowed: Array | float, what: str) -> Error:
    """The error of `got`. NaN and infinity must be where they belong.

    Raises WrongResultError, beginning with `what`, for another shape or dtype, or where an error is above what is allowed.
    """
    expected = want.astype(np.float64)
    largest = tolerance.compare(got, want, allowed, from_numpy(want.dtype), what)
    finite = np.isfinite(expected)
    difference = np.subtract(got.astype(np.float64), expected, out=np.zeros_like(expected), where=finite)
    length = float(np.linalg.norm(expected[finite])) or 1.0
    tolerated = float(np.max(allowed, initial=0.0)) / _largest(want)
    return Error(largest, float(np.linalg.norm(difference)) / length, tolerated)


@dataclass(frozen=True)
class Case:
    """Inputs and the results that the reference gives for them."""

    inputs: Mapping[str, Array]
    """By operand name, without the constants; as `Session.compile_problem` takes them."""
    expected: tuple[Array, ...]
    allowed: tuple[Array | float, ...]
    """Largest errors of each result, absolute."""


class Workload:
    """Constants of a static problem, and as many fresh cases for them as are asked for, from an unpredictable seed."""

    def __init__(self, session: Session, problem: Problem) -> None:
        if problem.dims:
            raise UsageError(f"sizes are missing: {problem} has dynamic dimensions", hint="give each a number")
        if problem.op not in session.registry.ops:
            raise UsageError(f"unknown op '{problem.op}'", hint=f"one of: {', '.join(sorted(session.registry.ops))}")
        self.problem = problem
        self.op = session.registry.ops[problem.op]
        self.names = operand_names(problem, session.registry)
        self.tolerance = tolerance.tolerance(problem, self.op)
        results = max(t.size() for t in problem.results)
        self._few = results if results <= FEW and self.tolerance else 0
        self._device: Device = session.device
        self._rng = np.random.default_rng()
        self._operands = self.op.make_inputs(problem, self._rng)
        self._constant = [t is not None and t.constant for t in problem.operands]

    @property
    def constants(self) -> dict[str, Array]:
        return {n: a for n, a, c in zip(self.names, self._operands, self._constant, strict=True) if c and a is not None}

    def timing_inputs(self) -> dict[str, Array | Buffer]:
        """Typical inputs, the same in every process: the work may depend on values (positions), and is to be
        comparable."""
        return self.bind(self._inputs(self.op.typical_inputs(self.problem, np.random.default_rng(0))))

    def case(self) -> Case:
        """Fresh inputs. Memory that the op overwrites is poisoned with NaN where it will be written."""
        fresh = self.op.make_inputs(self.problem, self._rng)
        arrays = [old if c else new for old, new, c in zip(self._operands, fresh, self._constant, strict=True)]
        expected = self.op.evaluate(self.problem, arrays)
        for result, position in self.op.in_place:
            old = arrays[position]
            if old is None or self.problem.results[result].dtype not in FLOATS:
                continue
            poisoned = np.where(expected[result] != old, np.array(np.nan, old.dtype), old)
            again = self.op.evaluate(self.problem, [*arrays[:position], poisoned, *arrays[position + 1 :]])
            # An op that reads what it overwrites (an addition in place) cannot be poisoned.
            if np.array_equal(again[result], expected[result]):
                arrays[position] = poisoned
        return Case(self._inputs(arrays), expected, self._allowed(arrays, expected))

    def _allowed(self, arrays: Sequence[Array | None], expected: Sequence[Array]) -> tuple[Array | float, ...]:
        if self._few:
            return tuple(e.allowed for e in tolerance.expect(self.problem, self.op, arrays))
        undecided: tuple[Array | float, ...] = self.op.either_way(self.problem, arrays) or (0.0,) * len(expected)
        return tuple(self.tolerance * _largest(e) + more for e, more in zip(expected, undecided, strict=True))

    def _inputs(self, arrays: Sequence[Array | None]) -> dict[str, Array]:
        return {
            name: _laid_out(a, t)
            for name, a, t in zip(self.names, arrays, self.problem.operands, strict=True)
            if a is not None and t is not None and not t.constant
        }

    def bind(self, inputs: Mapping[str, Array]) -> dict[str, Array | Buffer]:
        """Inputs as an executable takes them: what is overwritten lies in a buffer of the device."""
        bound: dict[str, Array | Buffer] = dict(inputs)
        for _, position in self.op.in_place:
            name = self.names[position]
            if name in inputs:
                array = inputs[name]
                operand = self.problem.operand(position)
                buffer = self._device.allocate(operand.static_shape(), operand.dtype)
                buffer.write(array)
                bound[name] = buffer
        return bound

    def verify(self, executable: Executable) -> Error:
        """Run fresh cases into poisoned memory and compare. Raises WrongResultError.

        Two, because a kernel must not answer with the results of an earlier run; more where results are few, for one that is
        nearly 0 tells little.
        """
        cases = max(2, FEW // self._few) if self._few else 2
        return reduce(Error.__or__, (self._check(executable, self.case()) for _ in range(cases)))

    def _check(self, executable: Executable, case: Case) -> Error:
        poisoned = {v.name: _poison(v.type) for v in executable.plan.values if v.place == "output"}
        outputs = executable.run(self.bind(case.inputs), poisoned)
        results = executable.plan.steps[-1].problem.results
        error = Error()
        for i, (output, want, allowed) in enumerate(zip(outputs, case.expected, case.allowed, strict=True)):
            name = self.op.results[i] if not self.op.variadic_results else f"{self.op.results[0][1:]}{i}"
            got = output if isinstance(output, np.ndarray) else output.numpy()
            if results[i].quantised and self.op.exact:  # bits must agree
                got, want = got.view(np.int8), want.view(np.int8)
            elif results[i].quantised:  # two roundings to groups: the kernel's and the reference's
                got, want, allowed = dequantize(got), dequantize(want), 2 * allowed
            error |= compare(got, want, allowed, f"result '{name}' of {self.problem.op}")
        return error


def _largest(result: Array) -> float:
    """The largest magnitude of what is finite, or 1 where there is none."""
    numbers = np.abs(dequantize(result) if result.dtype.names else result.astype(np.float64))
    return float(np.max(numbers, initial=0.0, where=np.isfinite(numbers))) or 1.0


def _laid_out(array: Array, t: TensorType) -> Array:
    """`array` in the memory that its type describes; what lies between its elements, and a kernel must not read, is
    poisoned."""
    memory = memory_of(t)
    if memory == t:
        return array
    base = _poison(memory)
    as_strided(base, array.shape, [stride * t.itemsize for stride in t.element_strides()])[...] = array
    return base


def _poison(t: TensorType) -> Array:
    """A tensor that a kernel has yet to write: NaN, or -1 where there is none."""
    if t.quantised:
        groups = np.empty(t.array_shape(), to_numpy(t.dtype))
        groups.view(np.int8)[...] = -1
        return groups
    return np.full(t.static_shape(), np.nan if t.dtype in FLOATS else -1, to_numpy(t.dtype))
