"""One problem, benchmarked: the kernel that selection chooses, found right before it is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kernelforge.bench.latency import Latency
from kernelforge.constant import Named
from kernelforge.errors import UsageError
from kernelforge.problem import Problem
from kernelforge.roofline import standing_data
from kernelforge.selection import Selection
from kernelforge.tune.measure import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernelforge.op import Cost
    from kernelforge.plan import Plan
    from kernelforge.roofline import Roofline
    from kernelforge.session import Session
    from kernelforge.tune.verify import Error


@dataclass(frozen=True)
class Prepared:
    """A verified kernel, ready to be timed."""

    problem: Problem
    selection: Selection
    cost: Cost
    error: Error
    subject: Subject
    roofline: Roofline | None = None
    sequence: Subject | None = None
    """`copies` of it one after the other, each with constants of its own, timed as one run."""
    copies: int = 1

    @property
    def subjects(self) -> Iterator[Subject]:
        """What is to be timed."""
        yield self.subject
        if self.sequence is not None:
            yield self.sequence

    @property
    def latency(self) -> Latency:
        return Latency.of(self.subject.samples)

    def report(self) -> dict[str, Any]:
        """The measurement as plain data: times in ms, speeds in 1e9 operations and bytes per second of the median run
        and as shares of what the device can do. `in_sequence` is what each of `copies` takes in a row."""
        latency = self.latency
        arithmetic = self.selection.variant.arithmetic
        standing = None if self.roofline is None else self.roofline.standing(self.cost, latency.median, arithmetic)
        report = {
            "problem": str(self.problem),
            "variant": self.selection.variant.name,
            "config": dict(self.selection.config),
            "config_source": self.selection.chosen.config_source,
            "latency_ms": latency.milliseconds()["median"],
            "latency": latency.milliseconds(),
            "gflops": gigas(self.cost.flops, latency.median),
            "gbytes_s": gigas(self.cost.bytes, latency.median),
            "arithmetic": arithmetic,
            **standing_data(standing),
            "rel_error": float(f"{self.error.largest:.3g}"),
            "rel_error_l2": float(f"{self.error.norm:.3g}"),
            "tolerance": float(f"{self.error.tolerated:.3g}"),
            "timing_source": self.subject.source,
        }
        if self.sequence is None:
            return report
        once = Latency.of([seconds / self.copies for seconds in self.sequence.samples])
        constants = sum(t.nbytes() for t in self.problem.operands if t is not None and t.constant)
        report["in_sequence"] = {
            "copies": self.copies,
            "constant_bytes": self.copies * constants,
            "latency_ms": once.milliseconds()["median"],
            "gflops": gigas(self.cost.flops, once.median),
            "gbytes_s": gigas(self.cost.bytes, once.median),
            "timing_source": self.sequence.source,
        }
        return report


def prepare(session: Session, problem: Problem, *, variant: str | None = None, copies: int = 1) -> Prepared:
    """Select, build and verify, twice on fresh inputs; from 2 `copies` on, also as many of them in sequence.

    Raises UsageError when no kernel takes the problem, or it is to be copied and has no constants; WrongResultError when the
    kernel's result is not the reference's.
    """
    from kernelforge.selection import select
    from kernelforge.tune.verify import Workload

    problem = problem.canonical()
    workload = Workload(session, problem)
    candidates = session.registry.variants(problem.op, session.target)
    named = variant or session.named(problem.op)
    selection = select(problem, candidates, session.device.info, session.records, variant=named)
    executable = session.compile_problem(
        problem, constants=workload.constants, variant=selection.variant.name, config=selection.config
    )
    error = workload.verify(executable)
    inputs = workload.timing_inputs()
    subject = Subject(lambda repeats: executable.measure(inputs, repeats=repeats))
    cost = workload.op.problem_cost(problem)
    sequence = None
    if copies > 1:
        plan = in_sequence(executable.plan, copies)
        constants = {v.constant.name: workload.constants[v.name] for v in plan.values if isinstance(v.constant, Named)}
        several = session.build(plan, constants)
        error |= workload.verify(several)
        sequence = Subject(lambda repeats: several.measure(inputs, repeats=repeats))
    return Prepared(problem, selection, cost, error, subject, session.roofline(), sequence, copies)


def in_sequence(plan: Plan, copies: int) -> Plan:
    """The one step of `plan`, `copies` times in a row: the same inputs and results, but each with constants of its own, which
    are out of the caches again when they are many. Raises UsageError when it has none."""
    (step,) = plan.steps
    values, steps = list(plan.values), [step]
    own = {k: plan.values[v] for k, v in enumerate(step.operands) if v is not None and plan.values[v].constant}
    if not own:
        raise UsageError("there are no weights to copy", hint="leave --copies or --no-constant out")
    for i in range(1, copies):
        operands = list(step.operands)
        for k, value in own.items():
            assert isinstance(value.constant, Named)
            operands[k] = len(values)
            values.append(replace(value, constant=replace(value.constant, name=f"{value.name}.{i}")))
        steps.append(replace(step, operands=tuple(operands), group=step.group + i))
    return replace(plan, values=tuple(values), steps=tuple(steps))


def gigas(amount: int, seconds: float) -> float:
    """1e9 per second, to four digits."""
    return float(f"{amount / seconds / 1e9:.4g}")
