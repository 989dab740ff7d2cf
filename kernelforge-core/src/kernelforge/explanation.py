"""What a compiled plan runs: each step traced to its kernel, the plugin and distribution that brought it, and its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kernelforge.op import Cost
from kernelforge.problem import Problem
from kernelforge.provenance import Provenance
from kernelforge.selection import ConfigSource
from kernelforge.variant import Config, config_key

if TYPE_CHECKING:
    from kernelforge.backend import Catalog
    from kernelforge.plan import Plan


@dataclass(frozen=True)
class Use:
    """A kernel at work: in one step, or in all steps of the same problem, variant and config."""

    problem: Problem
    """With the sizes of the run, as far as they are known."""
    variant: str
    provenance: Provenance
    config: Config
    config_source: ConfigSource
    steps: int
    cost: Cost | None
    """Of all its steps; None where it depends on sizes that are not known, or on values (`OpDef.typical`)."""
    seconds: float | None = None
    """Of all its steps; None where nothing was timed."""

    @property
    def op(self) -> str:
        return self.problem.op


@dataclass(frozen=True)
class Explanation:
    target: str
    steps: tuple[Use, ...]
    """One a step, in the plan's order."""

    @property
    def seconds(self) -> float | None:
        """Of all steps, when they were timed."""
        times = [use.seconds for use in self.steps if use.seconds is not None]
        return sum(times) if times else None

    @property
    def kernels(self) -> tuple[Use, ...]:
        """Equal steps together: the longest first when they were timed, else in order of first appearance."""
        found: dict[tuple[str, ...], Use] = {}
        for use in self.steps:
            key = (str(use.problem), use.variant, config_key(use.config), use.config_source)
            found[key] = _together(found[key], use) if key in found else use
        return tuple(sorted(found.values(), key=lambda use: -(use.seconds or 0.0)))

    def as_data(self) -> dict[str, Any]:
        """`seconds`, and `kernels` with provenance, share of the time, GFLOP/s and GB/s, as plain values."""
        return {
            "target": self.target,
            "seconds": self.seconds,
            "steps": len(self.steps),
            "kernels": [
                {
                    "op": use.op,
                    "problem": str(use.problem),
                    "variant": use.variant,
                    "plugin": use.provenance.plugin,
                    "distribution": use.provenance.distribution,
                    "version": use.provenance.version,
                    "config": dict(use.config),
                    "config_source": use.config_source,
                    "steps": use.steps,
                    "seconds": use.seconds,
                    "share": self._share(use),
                    "gflops": _rate(use, use.cost.flops) if use.cost else None,
                    "gbytes_s": _rate(use, use.cost.bytes) if use.cost else None,
                }
                for use in self.kernels
            ],
        }

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Headers and rows, one a kernel, for `Output.table`; with times only when there are any."""
        headers = ["op", "operands", "variant", "plugin", "config", "source", "steps"]
        rows: list[list[Any]] = []
        timed = self.seconds is not None
        for use in self.kernels:
            operands = ", ".join(str(t) for t in use.problem.operands if t is not None)
            config = config_key(use.config) if use.config else ""
            row = [
                use.op,
                operands,
                use.variant,
                str(use.provenance),
                config,
                use.config_source if config else "",
                use.steps,
            ]
            if timed:
                share = self._share(use)
                row += [f"{(use.seconds or 0) * 1e6:.1f}", "" if share is None else f"{share:.1%}"]
                row += [f"{_rate(use, amount) or 0:.1f}" if use.cost else "" for amount in _amounts(use.cost)]
            rows.append(row)
        return headers + ["us", "share", "GFLOP/s", "GB/s"] * timed, rows

    def _share(self, use: Use) -> float | None:
        return use.seconds / self.seconds if use.seconds is not None and self.seconds else None


def explain_plan(
    plan: Plan, catalog: Catalog, dims: Mapping[str, int] | None = None, seconds: Sequence[float] | None = None
) -> Explanation:
    """Trace the steps of `plan`. `dims` are the sizes of its dynamic dimensions, `seconds` the times of its steps."""
    sizes = dims or {}
    steps: list[Use] = []
    for i, step in enumerate(plan.steps):
        problem = step.problem.with_dims({f"?{k}": sizes.get(name, name) for k, name in enumerate(step.dims)})
        op = catalog.ops[problem.op]
        cost = op.problem_cost(problem) if not problem.dims and op.typical is None else None
        variant = catalog.variant(plan.target, problem.op, step.variant)
        time = None if seconds is None else seconds[i]
        steps.append(Use(problem, step.variant, variant.provenance, step.config, step.config_source, 1, cost, time))
    return Explanation(plan.target, tuple(steps))


def _together(one: Use, other: Use) -> Use:
    both = one.cost and other.cost and Cost(one.cost.flops + other.cost.flops, one.cost.bytes + other.cost.bytes)
    timed = one.seconds is not None and other.seconds is not None
    seconds = (one.seconds or 0.0) + (other.seconds or 0.0) if timed else None
    return replace(one, steps=one.steps + other.steps, cost=both, seconds=seconds)


def _amounts(cost: Cost | None) -> tuple[int, int]:
    return (cost.flops, cost.bytes) if cost else (0, 0)


def _rate(use: Use, amount: int) -> float | None:
    """1e9 per second."""
    return float(f"{amount / use.seconds / 1e9:.4g}") if use.seconds else None
