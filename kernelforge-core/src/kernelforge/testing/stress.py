"""Level 6: one executable used again with other sizes and values, several at once, and many times."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from kernelforge.testing.case import Case, Failure
from kernelforge.testing.kernel_cases import KernelCases
from kernelforge.testing.kernels import KernelRun, Subject, arranged, same_bits
from kernelforge.testing.memory import Guarded

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.testing.bench import Bench

    Array = np.ndarray[Any, np.dtype[Any]]

PARALLEL = 3
ROUNDS = 20
LEAK_RUNS = 300
LEAK_BYTES = 64 << 20
"""Growth of the process that is one."""


def stress_cases(made: KernelCases) -> list[Case]:
    """For the first claimed problems with and without a dynamic dimension."""
    cases: list[Case] = []

    def add(label: str, check: Callable[..., None], **arguments: Any) -> None:
        where = f"{made.variant.target}/{made.variant.op}/{made.variant.name}/6/{label}"
        cases.append(Case(where, 6, made.op.full_name, made.variant.name, partial(check, **arguments)))

    fixed = next(made.plain_problems(dynamic=False), None)
    open_ = next(made.plain_problems(dynamic=True), None)
    if fixed is not None:
        add("at-once", at_once, run=made.run(fixed))
        add("many-times", many_times, run=made.run(fixed))
        add("bound", bound, run=made.run(fixed))
    if open_ is not None:
        add("other-sizes", other_sizes, made=made, problem=open_)
    return cases


class _Repeated:
    """A kernel that is run again and again on given operands."""

    def __init__(self, bench: Bench, run: KernelRun, number: int = 0) -> None:
        self.subject = Subject(bench, run)
        self.executable = self.subject.executable()
        arrays = self.subject.draw(number)
        self.inputs = arranged(self.subject, arrays, "plain")
        self.expected = self.subject.expect(arrays)
        self.first = self.run()
        self.subject.compare(self.first, self.expected)

    def run(self) -> list[Array]:
        return [np.asarray(o) if isinstance(o, np.ndarray) else o.numpy() for o in self.executable.run(self.inputs)]

    def again(self, when: str) -> None:
        same_bits(self.subject, self.first, self.run(), when)


def at_once(bench: Bench, run: KernelRun) -> None:
    """Executables of one problem, each with a thread of its own, do not disturb each other. Raises Failure."""
    repeated = [_Repeated(bench, run, number) for number in range(PARALLEL)]
    failures: list[Exception] = []

    def work(one: _Repeated) -> None:
        try:
            for _ in range(ROUNDS):
                one.again(f"with {PARALLEL} executables at once")
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(one,)) for one in repeated]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def other_sizes(bench: Bench, made: KernelCases, problem: Problem) -> None:
    """One executable with a dynamic dimension: sizes that grow, shrink and come back. Raises Failure."""
    runs: dict[int, tuple[Subject, dict[str, Array], list[Array]]] = {}
    executable = None
    for size in (5, 64, 1, 5, 33, 64, 2, 5):
        run = made.run(problem, (size,) * len(problem.dims))
        first_time = size not in runs
        if first_time:
            subject = Subject(bench, run)
            if executable is None:
                executable, constants = subject.executable(), subject.constants
            subject.constants = constants
            arrays = subject.draw(0)
            inputs = arranged(subject, arrays, "plain")
            runs[size] = (subject, inputs, [])
        subject, inputs, kept = runs[size]
        assert executable is not None
        out = {
            name: Guarded(t.array_shape(), t.dtype).array
            for i, (name, t) in enumerate(zip(subject.result_names, subject.run.static.results, strict=True))
            if i not in dict(subject.op.in_place)
        }
        outputs = [o.copy() if isinstance(o, np.ndarray) else o.numpy() for o in executable.run(inputs, out)]
        if first_time:
            subject.compare(outputs, subject.expect(arrays), f" at size {size} after others")
            kept.extend(outputs)
        else:
            same_bits(subject, kept, outputs, f"at size {size} again after others")


def many_times(bench: Bench, run: KernelRun) -> None:
    """Many runs neither change results nor use up memory. Raises Failure."""
    repeated = _Repeated(bench, run)
    process = psutil.Process()
    for _ in range(LEAK_RUNS // 10):
        repeated.run()

    def growth() -> int:
        before = process.memory_info().rss
        for _ in range(LEAK_RUNS):
            repeated.run()
        return process.memory_info().rss - before

    grown = growth()
    if grown > LEAK_BYTES:
        grown = growth()  # a driver or an allocator may take a block once; what leaks is taken again
    repeated.again(f"after {LEAK_RUNS} runs")
    if grown > LEAK_BYTES:
        raise Failure("leaked", f"{run}: {LEAK_RUNS} runs took {grown >> 20} MiB that were not given back")


def bound(bench: Bench, run: KernelRun) -> None:
    """What `Executable.bind` returns reads the inputs as they are at each call. Raises Failure."""
    repeated = _Repeated(bench, run)
    subject, inputs = repeated.subject, repeated.inputs
    call = repeated.executable.bind(inputs)
    for number in (0, 1, 0):
        arrays = subject.draw(number)
        for name, array in arranged(subject, arrays, "plain").items():
            inputs[name][...] = array
        outputs = [o if isinstance(o, np.ndarray) else o.numpy() for o in call()]
        if not subject.op.in_place:  # an array that is donated is copied when it is bound
            subject.compare(outputs, subject.expect(arrays), " of a bound call")
