"""What the checks of devices and of executables share: a session, an executable and a sum to try, and what to expect of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy
from kernelforge.errors import DeviceError, UsageError
from kernelforge.problem import Problem, TensorType
from kernelforge.testing.case import Failure, NotClaimed

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Executable
    from kernelforge.session import Session
    from kernelforge.testing.bench import Bench

    Array = np.ndarray[Any, np.dtype[Any]]

ADD = "transformer.add"


def opened(bench: Bench, target: str) -> Session:
    """Raises NotClaimed without a device."""
    try:
        return bench.session(target)
    except DeviceError as error:
        raise NotClaimed(f"there is no device here: {error}") from None


def compiled(bench: Bench, target: str, op: str, operands: Sequence[TensorType]) -> Executable:
    """Raises NotClaimed when the target has no kernel for the problem."""
    session = opened(bench, target)
    if op not in bench.registry.ops:
        raise NotClaimed(f"there is no op {op}")
    problem: Problem = bench.registry.ops[op].problem(list(operands), {})
    try:
        return session.compile_problem(problem)
    except UsageError as error:
        if "no kernel on target" not in str(error):
            raise
        raise NotClaimed(str(error)) from None


def small_sum(bench: Bench, target: str) -> tuple[Executable, Array, Array]:
    """a + b with a dynamic dimension, and operands of size 5."""
    t = TensorType(("n", 3), "f32")
    executable = compiled(bench, target, ADD, (t, t))
    a, b = (np.arange(15, dtype=np.float32).reshape(5, 3) * factor for factor in (1.0, 0.5))
    return executable, a.astype(np.float32), b.astype(np.float32)


def expect_refused(
    action: Callable[[], object], errors: type[Exception] | tuple[type[Exception], ...], what: str
) -> None:
    """Raises Failure unless one of these errors, with a message, comes of it."""
    try:
        action()
    except errors as error:
        if not str(error):
            raise Failure("error", f"the refusal of {what} says nothing") from None
        return
    except Exception as error:
        raise Failure("error", f"{what} raises {type(error).__name__}: {error}, must be refused") from None
    raise Failure("not-refused", f"{what} is taken")


def expect_sum(outputs: Sequence[Any], want: Array, when: str) -> None:
    """Raises Failure unless the first output is a sum, as near as f32 is."""
    got = outputs[0] if isinstance(outputs[0], np.ndarray) else outputs[0].numpy()
    if not np.allclose(got, want, rtol=1e-6, atol=0.0):
        raise Failure("wrong-values", f"a sum is wrong {when}")


def expect_holds(buffer: Buffer, want: Array, what: str) -> None:
    """Raises Failure unless it does, exactly."""
    got = buffer.numpy()
    if got.shape != want.shape or tuple(buffer.shape) != want.shape:
        raise Failure("wrong-shape", f"{what} has shape {got.shape}")
    if got.dtype != want.dtype or to_numpy(buffer.dtype) != want.dtype:
        raise Failure("wrong-dtype", f"{what} is of type {got.dtype}")
    if not np.array_equal(got, want):
        raise Failure("wrong-values", f"{what} does not hold what was written to it")
