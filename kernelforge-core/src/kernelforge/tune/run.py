"""Tuning one problem: propose configs, verify, time in turn, keep every trial at once."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from kernelforge.distributions import version
from kernelforge.errors import PluginError, UsageError, WrongResultError
from kernelforge.lazy import resolve
from kernelforge.problem import Problem
from kernelforge.registry import lookup
from kernelforge.selection import judge
from kernelforge.tune.measure import Subject, measure_in_turn
from kernelforge.tune.record import Record, Status, kernel_hash
from kernelforge.tune.records import RecordStore
from kernelforge.tune.trial import ENDED, record_crashes, watched
from kernelforge.variant import Accept, Config, KernelVariant, Reject, config_key

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.backend import Buffer, Executable
    from kernelforge.session import Session
    from kernelforge.tune.tuner import Tuner
    from kernelforge.tune.verify import Workload

    Array = np.ndarray[Any, np.dtype[Any]]

TRIALS = 200
"""Configs of one variant that are tried at most."""

_BATCH = 6
_BATCH_BYTES = 1 << 29
"""Candidates that are alive together may each hold a packed copy of the constants."""
_FINALISTS = 4
_FINAL_MARGIN = 1.15
_CUTOFF = 1.5
_SAMPLES_KEPT = 40

Progress = Callable[[Record], None]
"""Called when a trial ends."""


@dataclass(frozen=True)
class TuneResult:
    problem: Problem
    records: tuple[Record, ...]
    """Of this run, in order; finalists that were measured again appear again."""
    known: int
    """Trials that were not repeated because their record exists."""
    complete: bool
    """Every config that the tuners wanted was tried; False when time ran out."""
    interrupted: bool
    best: Record | None
    """The fastest of this run and of the known ones."""


@dataclass
class _Search:
    """The search over one variant's configs."""

    variant: KernelVariant
    tuner: Tuner
    known: dict[str, Record]
    kernel_hash: str


@dataclass(eq=False)
class _Candidate:
    """A config whose kernel is built and was found right."""

    search: _Search
    config: Config
    executable: Executable
    inputs: Mapping[str, Array | Buffer]
    error: float
    subject: Subject = field(init=False)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget the samples."""
        self.subject = Subject(lambda repeats: self.executable.measure(self.inputs, repeats=repeats))


def tunable(session: Session, problem: Problem, names: Sequence[str] = ()) -> list[KernelVariant]:
    """The variants that accept `problem`, all or those of `names`. Raises UsageError for an unknown or refusing one."""
    problem = problem.canonical()
    there = session.registry.variants(problem.op, session.target)
    wanted = [session.registry.variant(session.target, problem.op, name) for name in names]
    info = session.device.info
    verdicts = [(v, judge(problem, v, info, forced=bool(names)).verdict) for v in wanted or there]
    for variant, verdict in verdicts:
        if names and isinstance(verdict, Reject):
            raise UsageError(f"variant '{variant.name}' cannot run {problem}: {verdict.reason}")
    accepted = [v for v, verdict in verdicts if isinstance(verdict, Accept)]
    if not accepted:
        reasons = "; ".join(f"{v.name}: {verdict.reason}" for v, verdict in verdicts if isinstance(verdict, Reject))
        raise UsageError(
            f"no kernel on target '{session.target}' can run {problem}", hint=reasons or "none is registered"
        )
    return accepted


def planned_trials(session: Session, problem: Problem, variants: Sequence[KernelVariant], trials: int = TRIALS) -> int:
    """At most how many trials tuning takes."""
    spaces = (v.config_space(problem.canonical(), session.device.info) for v in variants)
    return sum(min(trials, space.grid_size) for space in spaces)


def tune_problem(
    session: Session,
    problem: Problem,
    *,
    store: RecordStore,
    tuner: str = "grid",
    variants: Sequence[str] = (),
    budget_s: float = 30.0,
    trials: int = TRIALS,
    seed: int = 0,
    progress: Progress = lambda record: None,
) -> TuneResult:
    """Find the fastest correct variant and config for a static problem on the session's device, and record every
    trial.

    What has a current record is not tried again, nor what ended the process that tried it. `variants` limits the search by
    name, `budget_s` in seconds (trials that have begun are finished). KeyboardInterrupt ends it early: what was measured is
    recorded, and the result says so. Raises UsageError for an unknown op, tuner or variant, a problem that no variant accepts
    or that is not static.
    """
    from kernelforge.tune.verify import Workload

    problem = problem.canonical()
    make_tuner = resolve(lookup("tuner", session.registry.tuners, tuner).load)
    workload = Workload(session, problem)
    info = session.device.info
    record_crashes(store)
    searches = [
        _Search(
            v,
            make_tuner(v.config_space(problem, info), v.default_config(problem, info), trials=trials, seed=seed),
            store.current(problem, v, info),
            kernel_hash(v),
        )
        for v in tunable(session, problem, variants)
    ]
    return _Run(session, workload, store, searches, time.monotonic() + budget_s, progress).run()


class _Run:
    """The state of tuning one problem."""

    def __init__(
        self,
        session: Session,
        workload: Workload,
        store: RecordStore,
        searches: list[_Search],
        deadline: float,
        progress: Progress,
    ) -> None:
        self.session, self.workload, self.store = session, workload, store
        self.searches, self.deadline, self.progress = searches, deadline, progress
        self.open = list(searches)
        self.batch: list[_Candidate] = []
        self.best: list[_Candidate] = []
        self.records: list[Record] = []
        self.known: list[Record] = []
        self.inputs = workload.timing_inputs()

    def run(self) -> TuneResult:
        interrupted = False
        try:
            while self.open and (not self.records or time.monotonic() < self.deadline):
                self._fill_batch()
                self._measure_batch()
            self._measure_finalists()
        except KeyboardInterrupt:
            interrupted = True
            self._settle()
        latest = {r.subject: r for r in (*self.known, *self.records) if r.ok}
        best = min(latest.values(), key=lambda r: r.median_s, default=None)
        complete = not self.open and not interrupted
        return TuneResult(self.workload.problem, tuple(self.records), len(self.known), complete, interrupted, best)

    def _fill_batch(self) -> None:
        """Prepare the next candidates, one of each variant in turn."""
        problem = self.workload.problem
        nbytes = sum(t.nbytes() for t in (*problem.operands, *problem.results) if t is not None)
        size = min(max(_BATCH_BYTES // max(nbytes, 1), 1), _BATCH)
        while self.open and len(self.batch) < size:
            for search in tuple(self.open):
                if len(self.batch) >= size or (self.batch and time.monotonic() > self.deadline):
                    return
                config = search.tuner.ask()
                if config is None:
                    self.open.remove(search)
                elif (record := search.known.get(config_key(config))) is not None:
                    self.known.append(record)
                    search.tuner.tell(config, record.median_s if record.ok else None)
                    self.progress(record)
                elif (candidate := self._prepare(search, config)) is not None:
                    self.batch.append(candidate)

    def _prepare(self, search: _Search, config: Config) -> _Candidate | None:
        """Build and verify; a failure is recorded, and None."""
        try:
            with watched(self.store, self._record(search, config, "error", message=ENDED)):
                executable = self.session.compile_problem(
                    self.workload.problem, constants=self.workload.constants, variant=search.variant.name, config=config
                )
                error = self.workload.verify(executable).largest
        except WrongResultError as failure:
            self._fail(search, config, "wrong-result", str(failure))
            return None
        except Exception as failure:  # whatever a kernel's builder or a compiler raises
            cause = failure.__cause__ if isinstance(failure, PluginError) and failure.__cause__ else failure
            self._fail(search, config, "error", f"{type(cause).__name__}: {cause}")
            return None
        return _Candidate(search, config, executable, self.inputs, error)

    def _measure_batch(self) -> None:
        self._measure(self.batch, deadline=self.deadline)
        self._settle()

    def _measure(self, candidates: list[_Candidate], deadline: float) -> None:
        """Time candidates in turn; one that fails is recorded as failed and taken out, and the others start again."""
        while candidates:
            try:
                measure_in_turn([c.subject for c in candidates], cutoff=_CUTOFF, deadline=deadline)
                return
            except Exception as failure:  # whatever a kernel or a driver raises
                broken = next(c for c in candidates if c.subject.running)
                candidates.remove(broken)
                self._fail(broken.search, broken.config, "error", f"{type(failure).__name__}: {failure}")
                for candidate in candidates:
                    candidate.renew()

    def _settle(self) -> None:
        """Record the batch's candidates that have samples, and remember the best of all."""
        batch, self.batch = self.batch, []
        for candidate in batch:
            if not candidate.subject.samples:
                continue
            record = self._keep(candidate)
            candidate.search.tuner.tell(candidate.config, record.median_s)
            self.progress(record)
            self.best.append(candidate)
        self.best = sorted(self.best, key=lambda c: c.subject.median)[:_FINALISTS]

    def _measure_finalists(self) -> None:
        """Measure the best few again, together, so that the ranking is not the luck of one moment."""
        medians = [c.subject.median for c in self.best] + [r.median_s for r in self.known if r.ok]
        limit = _FINAL_MARGIN * min(medians, default=0.0)
        finalists = [c for c in self.best if c.subject.median <= limit]
        known = [r for r in self.known if r.ok and r.median_s <= limit] if finalists else []
        for record in sorted(known, key=lambda r: r.median_s)[:_FINALISTS]:
            search = next(s for s in self.searches if s.variant.name == record.variant)
            if (candidate := self._prepare(search, record.config)) is not None:
                finalists.append(candidate)
        if len(finalists) > 1:
            for candidate in finalists:
                candidate.renew()
            self._measure(finalists, deadline=math.inf)
            for candidate in finalists:
                self._keep(candidate)

    def _keep(self, candidate: _Candidate) -> Record:
        samples = candidate.subject.samples
        step = max(len(samples) / _SAMPLES_KEPT, 1)
        thinned = [samples[int(i * step)] for i in range(int(len(samples) / step))]
        return self._append(
            candidate.search,
            candidate.config,
            "ok",
            samples_s=tuple(_rounded(s) for s in thinned),
            median_s=_rounded(candidate.subject.median),
            error=_rounded(candidate.error),
            timing_source=candidate.subject.source,
        )

    def _fail(self, search: _Search, config: Config, status: Status, message: str) -> None:
        record = self._append(search, config, status, message=message)
        search.tuner.tell(config, None)
        self.progress(record)

    def _append(self, search: _Search, config: Config, status: Status, **measured: Any) -> Record:
        record = self._record(search, config, status, **measured)
        self.store.append(record)
        self.records.append(record)
        return record

    def _record(self, search: _Search, config: Config, status: Status, **measured: Any) -> Record:
        variant, info = search.variant, self.session.device.info
        return Record(
            problem=str(self.workload.problem),
            op=variant.op,
            target=variant.target,
            variant=variant.name,
            config=dict(config),
            device=info.name,
            fingerprint=info.fingerprint,
            threads=info.threads,
            plugin=variant.provenance.plugin,
            distribution=variant.provenance.distribution,
            variant_version=variant.version,
            kernel_hash=search.kernel_hash,
            status=status,
            versions=_versions(),
            unix_time=round(time.time(), 3),
            **measured,
        )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@cache
def _versions() -> dict[str, str]:
    """Of Python and the installed distributions that decide what code runs."""
    found = {"python": platform.python_version()}
    names = ("kernelforge-core", "numpy", "torch-mlir", "llvmlite", "numba", "wgpu")
    return found | {name: told for name in names if (told := version(name))}
