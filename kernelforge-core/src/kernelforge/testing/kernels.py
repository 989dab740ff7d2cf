"""One kernel on one problem: forced, run on poisoned and guarded memory, compared with the float64 oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge.problem import Problem
from kernelforge.problem_plan import memory_of, operand_names
from kernelforge.reference import HostBuffer
from kernelforge.testing.case import Failure
from kernelforge.testing.layouts import arrange
from kernelforge.testing.memory import POISONS, Guarded
from kernelforge.testing.values import fill
from kernelforge.tolerance import Expected, Mismatch, compare, expect
from kernelforge.variant import Config, config_key

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Executable
    from kernelforge.op import OpDef
    from kernelforge.session import Session
    from kernelforge.testing.bench import Bench

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = Sequence[Array | None]

OTHER_THREADS = (1, 7)
"""Besides those of the bench: alone, and more than a small machine has cores or a small tensor has rows."""


@dataclass(frozen=True)
class KernelRun:
    """What is run: a variant on a problem, with sizes for its dynamic dimensions."""

    target: str
    variant: str
    problem: Problem
    """Canonical."""
    sizes: tuple[int, ...] = ()
    """Of the problem's dynamic dimensions."""
    values: str = "normal"
    """See `kernelforge.testing.values`."""
    config: Config | None = None
    """None: the variant's default."""

    @cached_property
    def static(self) -> Problem:
        return self.problem.with_dims(dict(zip(self.problem.dims, self.sizes, strict=True)))

    @property
    def seed(self) -> int:
        return crc32(str(self).encode())

    def __str__(self) -> str:
        config = "" if self.config is None else f", config {config_key(self.config)}"
        return f"{self.static}, {self.values} values{config}" + (f" of {self.problem}" if self.sizes else "")


class Subject:
    """A kernel run with its inputs, what they must give, and the executables that are to do it."""

    def __init__(self, bench: Bench, run: KernelRun) -> None:
        self.bench, self.run = bench, run
        self.op: OpDef = bench.registry.ops[run.problem.op]
        self.names = operand_names(run.problem, bench.registry)
        self.constants: dict[str, Array] = {}
        for name, a, t in zip(self.names, self.draw(0), run.static.operands, strict=True):
            if t is not None and t.constant and a is not None:
                self.constants[name] = a
        bench.note(str(run))

    def draw(self, number: int) -> list[Array | None]:
        """Operands; those that are constants are the same in every draw."""
        arrays = fill(self.run.values, self.op, self.run.static, np.random.default_rng((self.run.seed, number)))
        return [self.constants.get(n, a) for n, a in zip(self.names, arrays, strict=True)]

    def expect(self, arrays: Arrays) -> tuple[Expected, ...]:
        key = f"{self.run.target}/{self.run.problem.op}/{self.run.variant}"
        flushes = self.bench.registry.backends[self.run.target].flushes_subnormals
        return expect(self.run.static, self.op, arrays, factor=self.bench.factor(key), flushes=flushes)

    def session(self, threads: int | None = None) -> Session:
        return self.bench.session(self.run.target, threads)

    def executable(self, threads: int | None = None) -> Executable:
        """Compiled with the variant forced. Raises Failure when the plan says that something else would run."""
        made = self.session(threads).compile_problem(
            self.run.problem, constants=self.constants, variant=self.run.variant, config=self.run.config
        )
        plan = made.plan
        ran = [(plan.target, s.problem, s.variant) for s in plan.steps]
        if ran != [(self.run.target, self.run.problem, self.run.variant)]:
            raise Failure("error", f"asked for variant '{self.run.variant}', the plan has {ran}")
        if self.run.config is not None and dict(plan.steps[0].config) != dict(self.run.config):
            raise Failure("error", f"asked for {config_key(self.run.config)}, got {config_key(plan.steps[0].config)}")
        return made

    def compare(self, outputs: Sequence[Array], expected: Sequence[Expected], when: str = "") -> None:
        """Raises Failure for the first result that is wrong."""
        for name, got, want, t in zip(self.result_names, outputs, expected, self.run.static.results, strict=True):
            try:
                compare(got, want.exact, want.allowed, t.dtype, f"result '{name}'{when} of {self.run}")
            except Mismatch as mismatch:
                raise Failure(mismatch.kind, str(mismatch)) from None

    @cached_property
    def result_names(self) -> list[str]:
        if self.op.variadic_results:
            return [f"{self.op.results[0][1:]}{i}" for i in range(len(self.run.problem.results))]
        return list(self.op.results)


class Memory:
    """Guarded inputs and outputs of one executable."""

    def __init__(self, subject: Subject, executable: Executable, poison: int) -> None:
        self.subject, self.executable = subject, executable
        static, in_place = subject.run.static, dict(subject.op.in_place)
        self.operands: dict[str, Guarded] = {}
        self.inputs: dict[str, Array | Buffer] = {}
        self.outputs: list[Guarded] = []
        self.out: dict[str, Array] = {}
        self.donated: set[str] = set()
        dims = dict(zip(subject.run.problem.dims, subject.run.sizes, strict=True))
        for i, (name, t) in enumerate(zip(subject.names, subject.run.problem.operands, strict=True)):
            if t is None or t.constant:
                continue
            guarded = Guarded(memory_of(t).array_shape(dims), t.dtype)
            self.operands[name] = guarded
            self.inputs[name] = guarded.array
            if i in in_place.values():
                self.donated.add(name)
                self.inputs[name] = self._buffer(guarded, memory_of(t).static_shape(dims), t.dtype)
        for i, (name, t) in enumerate(zip(subject.result_names, static.results, strict=True)):
            if i in in_place:
                self.outputs.append(self.operands[subject.names[in_place[i]]])
            else:
                self.outputs.append(Guarded(t.array_shape(), t.dtype, poison))
                self.out[name] = self.outputs[-1].array

    def _buffer(self, guarded: Guarded, shape: tuple[int, ...], dtype: str) -> Buffer:
        """For what is updated in place: the guarded memory itself where the device's memory is the host's."""
        allocated = self.subject.session().device.allocate(shape, dtype)
        return HostBuffer(guarded.array) if isinstance(allocated, HostBuffer) else allocated

    def load(self, arrays: Arrays) -> None:
        """Put operands into the memory and seal everything."""
        for name, array, t in zip(self.subject.names, arrays, self.subject.run.problem.operands, strict=True):
            if name in self.operands and array is not None and t is not None:
                guarded = self.operands[name]
                if memory_of(t) != t:
                    view = as_strided(guarded.array, array.shape, [s * t.itemsize for s in t.element_strides()])
                    view[...] = array
                    guarded.seal()
                else:
                    guarded.fill(array)
                given = self.inputs[name]
                if not isinstance(given, np.ndarray) and not isinstance(given, HostBuffer):
                    given.write(array)
        for name, guarded in zip(self.subject.result_names, self.outputs, strict=True):
            if name in self.out:
                guarded.spoil()

    def execute(self) -> list[Array]:
        """Run and check the memory. Raises Failure; values are not looked at."""
        what = str(self.subject.run)
        outputs = [o if isinstance(o, np.ndarray) else o.numpy() for o in self.executable.run(self.inputs, self.out)]
        if len(outputs) != len(self.outputs):
            raise Failure("wrong-shape", f"{what}: {len(outputs)} results instead of {len(self.outputs)}")
        for name, got, guarded in zip(self.subject.result_names, outputs, self.outputs, strict=True):
            if got.shape != guarded.array.shape:
                raise Failure("wrong-shape", f"{what}: result '{name}' has shape {got.shape}")
            if got.dtype != guarded.array.dtype:
                raise Failure("wrong-dtype", f"{what}: result '{name}' is of type {got.dtype}")
        for guarded in (*self.outputs, *self.operands.values()):
            if (at := guarded.overrun()) is not None:
                side = "before" if at < 0 else "after"
                raise Failure("out-of-bounds", f"{what}: wrote {side} a tensor of {guarded.nbytes} bytes, at byte {at}")
        for name, guarded in self.operands.items():
            if name not in self.donated and guarded.mutated():
                raise Failure("input-mutated", f"{what}: wrote to its operand '{name}'")
        for name, got in zip(self.subject.result_names, outputs, strict=True):
            given = self.out.get(name)
            if given is not None and given.size and not np.may_share_memory(got, given):
                raise Failure("error", f"{what}: result '{name}' is not in the array that it was to be written to")
        return outputs


def check_kernel(bench: Bench, run: KernelRun, *, threads: Sequence[int] = OTHER_THREADS) -> None:
    """Poisoned memory twice, other values in the same memory, other numbers of threads. Raises Failure."""
    subject = Subject(bench, run)
    arrays = subject.draw(0)
    expected = subject.expect(arrays)
    executable = subject.executable()
    first, second = (Memory(subject, executable, poison) for poison in POISONS)
    results: list[list[Array]] = []
    unwritten: list[list[Array]] = []
    for memory in (first, second):
        memory.load(arrays)
        results.append(memory.execute())
        unwritten.append([g.unwritten() for g in memory.outputs])
    for name, *masks in zip(subject.result_names, *unwritten, strict=True):
        never = masks[0] & masks[1]
        if name in first.out and never.any():
            at = [int(i) for i in np.argwhere(never)[0]]
            raise Failure("not-written", f"{int(never.sum())} elements of result '{name}' of {run}, the first at {at}")
    subject.compare(results[0], expected)
    same_bits(subject, results[0], results[1], "run twice")
    other = subject.draw(1)
    second.load(other)
    subject.compare(second.execute(), subject.expect(other), ", with new values in the same memory,")
    for count in threads:
        if subject.session(count).device.info.threads == subject.session().device.info.threads:
            continue
        memory = Memory(subject, subject.executable(count), POISONS[0])
        memory.load(arrays)
        subject.compare(memory.execute(), expected, f" with {count} threads")


def same_bits(subject: Subject, one: Sequence[Array], two: Sequence[Array], when: str) -> None:
    """Raises Failure where equal runs did not give equal results."""
    for name, a, b in zip(subject.result_names, one, two, strict=True):
        differ = (a != b) & ~((a != a) & (b != b))  # NaN, also of types that np.isnan does not know
        if differ.any():
            at = tuple(int(i) for i in np.argwhere(differ)[0])
            message = f"result '{name}' of {subject.run}, {when}, is {a[at]} and then {b[at]} at {list(at)}"
            raise Failure("not-deterministic", message)


def check_plain(bench: Bench, run: KernelRun) -> None:
    """Ordinary runs, results in new arrays: they are right, and stay so when the next run is made. Raises Failure."""
    subject = Subject(bench, run)
    executable = subject.executable()
    kept: list[tuple[list[Array], list[Array]]] = []
    for number in (0, 1):
        arrays = subject.draw(number)
        inputs = arranged(subject, arrays, "plain")
        before = {name: a.copy() for name, a in inputs.items()}
        outputs = [o if isinstance(o, np.ndarray) else o.numpy() for o in executable.run(inputs)]
        subject.compare(outputs, subject.expect(arrays))
        _unmutated(subject, inputs, before)
        kept.append((outputs, [o.copy() for o in outputs]))
    for outputs, copies in kept:
        same_bits(subject, copies, outputs, "after another run")


def check_arrangement(bench: Bench, run: KernelRun, arrangement: str) -> None:
    """Inputs given as arrays in another arrangement; see `arranged`. Raises Failure."""
    subject = Subject(bench, run)
    arrays = subject.draw(0)
    inputs = arranged(subject, arrays, arrangement)
    seen = [inputs.get(n, a) for n, a in zip(subject.names, arrays, strict=True)]
    before = {name: a.copy() for name, a in inputs.items()}
    outputs = [o if isinstance(o, np.ndarray) else o.numpy() for o in subject.executable().run(inputs)]
    subject.compare(outputs, subject.expect(seen), f" from {arrangement} inputs")
    _unmutated(subject, inputs, before)


def _unmutated(subject: Subject, inputs: Mapping[str, Array], before: Mapping[str, Array]) -> None:
    for name, array in inputs.items():
        if array.tobytes() != before[name].tobytes():
            raise Failure("input-mutated", f"{subject.run}: wrote to its operand '{name}'")


def arranged(subject: Subject, arrays: Arrays, arrangement: str) -> dict[str, Array]:
    """Inputs as numpy arrays in an arrangement; see `kernelforge.testing.layouts.arrange`."""
    inputs: dict[str, Array] = {}
    for name, array, t in zip(subject.names, arrays, subject.run.static.operands, strict=True):
        if array is not None and t is not None and not t.constant:
            inputs[name] = arrange(array, arrangement)
    return inputs
