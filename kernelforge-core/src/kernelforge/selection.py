"""Choosing a kernel: a pure function of problem, variants, device and measurements that explains itself.

The rule, in order. A variant named by the user wins or is an error. Among the accepting variants, the one with the best
measured median for exactly this problem wins; one that was never measured still goes first when its priority is higher than
the measured winner's. Without measurements the highest priority wins, then the name, so that the choice is reproducible.
The config comes from the best record of exactly this problem, else of the nearest shape, else from the variant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from kernelforge.errors import UsageError
from kernelforge.faults import failed, leave_out
from kernelforge.problem import Problem
from kernelforge.variant import Accept, Config, DeviceInfo, KernelVariant, Reject, Verdict, config_key

ConfigSource = Literal["record", "nearest-record", "default", "given", "shared-layout"]
"""Where a config comes from; "shared-layout": changed so that a constant is kept once (`kernelforge.layouts`)."""


@dataclass(frozen=True)
class RecordMatch:
    """What the records know of one variant on a problem: the best config and how well it fits."""

    config: Config
    median_s: float
    exact: bool
    problem: str
    """Key of the problem that was measured; another shape when not `exact`."""


class Lookup(Protocol):
    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> Iterable[RecordMatch]:
        """Records of this variant on this device, best first: exact ones by median, then others by distance."""
        ...

    def stamp(self) -> str:
        """Changes when the records change: selections made before must not be reused."""
        ...


class NoRecords:
    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> Iterable[RecordMatch]:
        return ()

    def stamp(self) -> str:
        return ""


NO_RECORDS = NoRecords()
"""Selection without measurements."""


@dataclass(frozen=True)
class Decision:
    """One candidate's fate."""

    variant: KernelVariant
    verdict: Verdict
    config: Config | None = None
    config_source: ConfigSource = "default"
    measured: RecordMatch | None = None
    """The record that the config or the ranking came from."""
    reason: str = ""
    """Why it was or was not chosen, in words."""
    failed: bool = False
    """It was rejected because the variant's own functions failed, which must be said each time."""


class NoKernelError(UsageError):
    """No variant accepts a problem."""

    plugin_failed = False
    """Whether one refuses because its own functions failed, which must be said each time."""


class RefusedError(UsageError):
    """The variant that was asked for by name does not take a problem."""


@dataclass(frozen=True)
class Selection:
    problem: Problem
    chosen: Decision
    decisions: tuple[Decision, ...]
    """All candidates, the chosen one first, then in the order they would have been taken, rejected ones last."""

    @property
    def variant(self) -> KernelVariant:
        return self.chosen.variant

    @property
    def config(self) -> Config:
        assert self.chosen.config is not None
        return self.chosen.config

    @property
    def seconds(self) -> float:
        """The median measured on exactly this problem; infinite where there is none."""
        return _exact_median(self.chosen)


def select(
    problem: Problem,
    variants: Iterable[KernelVariant],
    device: DeviceInfo,
    records: Lookup = NO_RECORDS,
    *,
    variant: str | None = None,
    config: Config | None = None,
) -> Selection:
    """Choose a variant and a config for `problem` on `device`.

    `variant` forces one by name, `config` its configuration. Raises UsageError when no variant accepts the problem (with
    every reason), when the forced one is unknown or refuses, or when the given config is illegal. A variant whose own
    functions fail counts as one that refuses, with a warning; the forced one raises PluginError.
    """
    problem = problem.canonical()
    candidates = sorted(
        (v for v in variants if v.op == problem.op and v.target == device.target),
        key=lambda v: (-v.priority, v.name),
    )
    if variant is not None and variant not in {v.name for v in candidates}:
        names = ", ".join(v.name for v in candidates) or "none"
        raise UsageError(
            f"unknown variant '{variant}' of {problem.op} on target '{device.target}'", hint=f"known: {names}"
        )
    judged = [judge(problem, v, device, records, forced=v.name == variant) for v in candidates]
    accepted = [d for d in judged if isinstance(d.verdict, Accept)]
    rejected = [d for d in judged if isinstance(d.verdict, Reject)]
    if variant is not None:
        forced = next(d for d in judged if d.variant.name == variant)
        if isinstance(forced.verdict, Reject):
            raise RefusedError(f"variant '{variant}' cannot run {problem}: {forced.verdict.reason}")
        winner, reason = forced, "asked for by name"
    elif not accepted:
        reasons = "; ".join(f"{d.variant.name}: {d.verdict.reason}" for d in rejected if isinstance(d.verdict, Reject))
        none = NoKernelError(
            f"no kernel on target '{device.target}' can run {problem}", hint=reasons or "no variant is registered"
        )
        none.plugin_failed = any(d.failed for d in rejected)
        raise none
    else:
        winner, reason = _rank(accepted)
    if config is not None:
        space = winner.variant.config_space(problem, device)
        if (violation := space.violation(config)) is not None:
            raise UsageError(f"config {config_key(config)} is illegal for variant '{winner.variant.name}': {violation}")
        winner = Decision(winner.variant, winner.verdict, config, "given")
    chosen = Decision(winner.variant, winner.verdict, winner.config, winner.config_source, winner.measured, reason)
    others = [d for d in accepted if d.variant != chosen.variant]
    others.sort(key=lambda d: (_exact_median(d), -d.variant.priority, d.variant.name))
    explained = tuple(_explain_loser(d, chosen) for d in others)
    return Selection(problem, chosen, (chosen, *explained, *rejected))


def judge(
    problem: Problem,
    variant: KernelVariant,
    device: DeviceInfo,
    records: Lookup = NO_RECORDS,
    *,
    forced: bool = False,
) -> Decision:
    """One variant's verdict, with the config that it would run with. Asked for by name (`forced`), its failure raises
    PluginError; otherwise it is left out."""
    matches = records.matches(problem, variant, device)
    try:
        return _judge(problem, variant, device, matches)
    except Exception as error:
        if forced:
            raise failed(f"variant '{variant.key}'", variant.provenance, "fails", error) from error
        reason = leave_out(f"variant '{variant.key}'", variant.provenance, error)
        return Decision(variant, Reject(reason), reason=reason, failed=True)


def _judge(problem: Problem, variant: KernelVariant, device: DeviceInfo, matches: Iterable[RecordMatch]) -> Decision:
    verdict = variant.judge(problem, device)
    if isinstance(verdict, Reject):
        return Decision(variant, verdict, reason=verdict.reason)
    space = variant.config_space(problem, device)
    for match in matches:
        if match.config in space:
            return Decision(variant, verdict, match.config, "record" if match.exact else "nearest-record", match)
    return Decision(variant, verdict, variant.default_config(problem, device), "default")


def _exact_median(decision: Decision) -> float:
    match = decision.measured
    return match.median_s if match is not None and match.exact else float("inf")


def _rank(accepted: list[Decision]) -> tuple[Decision, str]:
    first = min(accepted, key=lambda d: (-d.variant.priority, d.variant.name))
    measured = [d for d in accepted if _exact_median(d) < float("inf")]
    if not measured:
        return first, "highest priority; nothing measured" if len(accepted) > 1 else "the only one that accepts"
    fastest = min(measured, key=_exact_median)
    if first not in measured and first.variant.priority > fastest.variant.priority:
        return first, f"not measured yet, but of higher priority than '{fastest.variant.name}'"
    return fastest, f"fastest measured: {_exact_median(fastest) * 1e6:.1f} us"


def _explain_loser(decision: Decision, chosen: Decision) -> Decision:
    median, best = _exact_median(decision), _exact_median(chosen)
    if median < float("inf") and best < float("inf"):
        reason = f"measured {median * 1e6:.1f} us, {median / best:.2f} x the chosen one's"
    elif best < float("inf"):
        reason = "not measured, and not of higher priority"
    else:
        reason = f"priority {decision.variant.priority}, the chosen one has {chosen.variant.priority}"
    return Decision(
        decision.variant, decision.verdict, decision.config, decision.config_source, decision.measured, reason
    )
