"""One problem, benchmarked: the kernel that selection chooses, found right before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelforge.bench.latency import Latency
from kernelforge.problem import Problem
from kernelforge.roofline import standing_data
from kernelforge.selection import Selection
from kernelforge.tune.measure import Subject

if TYPE_CHECKING:
    from kernelforge.op import Cost
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
    tolerance: float
    subject: Subject
    roofline: Roofline | None = None

    @property
    def latency(self) -> Latency:
        return Latency.of(self.subject.samples)

    def report(self) -> dict[str, Any]:
        """The measurement as plain data: times in ms, speeds in 1e9 operations and bytes per second of the median run
        and as shares of what the device can do."""
        latency = self.latency
        arithmetic = self.selection.variant.arithmetic
        standing = None if self.roofline is None else self.roofline.standing(self.cost, latency.median, arithmetic)
        return {
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
            "tolerance": float(f"{self.tolerance:.3g}"),
            "timing_source": self.subject.source,
        }


def prepare(session: Session, problem: Problem, *, variant: str | None = None) -> Prepared:
    """Select, build and verify, twice on fresh inputs.

    Raises UsageError when no kernel takes the problem, WrongResultError when the kernel's result is not the
    reference's.
    """
    from kernelforge.selection import select
    from kernelforge.tune.verify import Workload

    problem = problem.canonical()
    workload = Workload(session, problem)
    candidates = session.registry.variants(problem.op, session.target)
    selection = select(problem, candidates, session.device.info, session.records, variant=variant)
    executable = session.compile_problem(
        problem, constants=workload.constants, variant=selection.variant.name, config=selection.config
    )
    error = workload.verify(executable)
    inputs = workload.timing_inputs()
    subject = Subject(lambda repeats: executable.measure(inputs, repeats=repeats))
    cost = workload.op.problem_cost(problem)
    return Prepared(problem, selection, cost, error, workload.tolerance, subject, session.roofline())


def gigas(amount: int, seconds: float) -> float:
    """1e9 per second, to four digits."""
    return float(f"{amount / seconds / 1e9:.4g}")
