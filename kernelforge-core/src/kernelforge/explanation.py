"""What a compiled plan runs: each step traced to its kernel, the plugin and distribution that brought it, and its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kernelforge.op import Cost
from kernelforge.problem import Problem
from kernelforge.provenance import Provenance
from kernelforge.roofline import STANDING_HEADERS, Roofline, Standing, standing_cells, standing_data
from kernelforge.selection import ConfigSource
from kernelforge.variant import Arithmetic, Config, config_key

if TYPE_CHECKING:
    from kernelforge.backend import Array, Catalog
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
    arithmetic: Arithmetic = "f32"
    """What its kernel multiplies; see `KernelVariant.arithmetic`."""

    @property
    def op(self) -> str:
        return self.problem.op


@dataclass(frozen=True)
class Explanation:
    target: str
    steps: tuple[Use, ...]
    """One a step, in the plan's order."""
    roofline: Roofline | None = None
    """What the device can do at most; see `beside`."""

    def beside(self, roofline: Roofline | None) -> Explanation:
        """The same, with every kernel's standing beside these limits."""
        return replace(self, roofline=roofline)

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

    @property
    def bottleneck(self) -> Use | None:
        """The kernels in which most time would be saved if they ran at the limits; None without times or limits."""
        found = [(use.seconds - at.least, use) for use in self.kernels if use.seconds and (at := self._standing(use))]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def as_data(self) -> dict[str, Any]:
        """`seconds`, `roofline`, and `kernels` with provenance, share of the time, GFLOP/s, GB/s, the shares of the
        limits and which of them comes first, as plain values."""
        bottleneck = self.bottleneck
        return {
            "target": self.target,
            "seconds": self.seconds,
            "steps": len(self.steps),
            "roofline": None if self.roofline is None else self.roofline.as_data(),
            "bottleneck": None if bottleneck is None else str(bottleneck.problem),
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
                    "arithmetic": use.arithmetic,
                    **standing_data(self._standing(use)),
                }
                for use in self.kernels
            ],
        }

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Headers and rows, one a kernel, for `Output.table`; with times only when there are any, and shares of the
        limits only when those are known."""
        headers = ["op", "operands", "variant", "plugin", "config", "source", "steps"]
        rows: list[list[Any]] = []
        timed = self.seconds is not None
        placed = timed and self.roofline is not None
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
            if placed:
                row += standing_cells(self._standing(use))
            rows.append(row)
        return headers + ["us", "share", "GFLOP/s", "GB/s"] * timed + STANDING_HEADERS * placed, rows

    def verdict(self) -> str:
        """The bottleneck in a sentence; empty without times or limits."""
        use, total = self.bottleneck, self.seconds
        at = None if use is None else self._standing(use)
        if use is None or at is None or use.seconds is None or not total:
            return ""
        reached = at.memory if at.limit == "memory" else at.compute
        what = "of the memory's bandwidth" if at.limit == "memory" else f"of the {use.arithmetic} peak"
        saved = max(use.seconds - at.least, 0.0) / total
        return (
            f"bottleneck: {use.op} ({use.variant}), {self._share(use):.0%} of the time at {reached:.0%} {what}; "
            f"at the limit the step would take {saved:.0%} less"
        )

    def _standing(self, use: Use) -> Standing | None:
        if self.roofline is None or use.cost is None or not use.seconds:
            return None
        return self.roofline.standing(use.cost, use.seconds, use.arithmetic)

    def _share(self, use: Use) -> float | None:
        return use.seconds / self.seconds if use.seconds is not None and self.seconds else None


def explain_plan(
    plan: Plan,
    catalog: Catalog,
    dims: Mapping[str, int] | None = None,
    seconds: Sequence[float] | None = None,
    known: Mapping[int, Array] | None = None,
) -> Explanation:
    """Trace the steps of `plan`. `dims` are the sizes of its dynamic dimensions, `seconds` the times of its steps, `known` the
    arrays of values, as far as they are at hand: work that depends on them is counted."""
    sizes, arrays = dims or {}, known or {}
    steps: list[Use] = []
    for i, step in enumerate(plan.steps):
        problem = step.problem.with_dims({f"?{k}": sizes.get(name, name) for k, name in enumerate(step.dims)})
        operands = [None if value is None else arrays.get(value) for value in step.operands]
        cost = None if problem.dims else catalog.ops[problem.op].known_cost(problem, operands)
        variant = catalog.variant(plan.target, problem.op, step.variant)
        time = None if seconds is None else seconds[i]
        steps.append(
            Use(
                problem,
                step.variant,
                variant.provenance,
                step.config,
                step.config_source,
                1,
                cost,
                time,
                variant.arithmetic,
            )
        )
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
