"""All cases of a plugin, run and accounted for."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from kernelforge.errors import UsageError
from kernelforge.registry import Registry
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import LEVELS, THREADS, Case, Outcome, Status, reproduce, run_case
from kernelforge.testing.collect import Scope, collect, expectations, plugin_status
from kernelforge.testing.expectations import Expectations
from kernelforge.testing.worker import Setup, Worker

TIMEOUT_S = 60.0
"""Of a case, between two signs of life."""
CHUNK = 40
"""Cases that a worker takes at a time: those of one kernel share what is compiled."""
MOST_JOBS = 4

Progress = Callable[[Outcome], None]


@dataclass(frozen=True)
class Request(Scope):
    """Which cases are run, and how."""

    threads: int = THREADS
    jobs: int | None = None
    """Processes; None: one a core, `MOST_JOBS` at most."""
    isolate: bool = True
    """Run in processes of their own."""
    timeout_s: float = TIMEOUT_S
    extra: tuple[str, ...] = ()
    """Plugins that are not installed, as "module:attr"."""

    @property
    def scope(self) -> Scope:
        return Scope(self.plugin, self.level, self.target, self.op, self.variant, self.case)


@dataclass(frozen=True)
class Report:
    """What became of the cases."""

    plugin: str
    distribution: str
    version: str
    level: int
    threads: int
    cases: tuple[Case, ...]
    outcomes: tuple[Outcome, ...]
    """One for each case, in the same order."""
    expectations: Expectations
    unused: tuple[str, ...]
    """Announced failures that are of no case."""
    seconds: float

    @cached_property
    def totals(self) -> dict[Status, int]:
        found = Counter(outcome.status for outcome in self.outcomes)
        statuses: tuple[Status, ...] = ("passed", "failed", "expected-failure", "not-claimed")
        return {status: found[status] for status in statuses}

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    def reproduce(self, case: str) -> str:
        """The command that runs one case alone."""
        return reproduce(self.plugin, case, self.threads)

    @property
    def ran(self) -> int:
        """Cases that say something."""
        return len(self.outcomes) - self.totals["not-claimed"]

    @property
    def ok(self) -> bool:
        """Nothing failed, and something was tested."""
        return self.ran > 0 and not self.failures


def run_plugin(registry: Registry, request: Request, progress: Progress = lambda outcome: None) -> Report:
    """Run the cases that are asked for.

    Raises UsageError for an unknown plugin or level and for options that no case has, PluginError for a plugin that is not
    loaded, whose cases cannot be collected or whose file of expectations is wrong.
    """
    if request.level not in LEVELS:
        raise UsageError(f"there is no level {request.level}", hint=f"from {min(LEVELS)} to {max(LEVELS)}")
    start = time.monotonic()
    status = plugin_status(registry, request.plugin)
    announced = expectations(request.plugin)
    with Bench(registry, threads=request.threads, factors=announced.factors) as bench:
        cases = collect(bench, request)
        if not cases and (asked := request.narrowing):
            raise UsageError(
                f"plugin '{request.plugin}' has no case with {asked}",
                hint=f"kernelforge conformance list {request.plugin} --level {request.level}",
            )

        def done(outcome: Outcome) -> Outcome:
            judged = announced.judge(outcome)
            progress(judged)
            return judged

        if request.isolate:
            setup = Setup(request.scope, request.threads, request.extra)
            outcomes = _run_apart(cases, setup, request, done)
        else:
            outcomes = {case.id: done(run_case(case, bench)) for case in cases}
    everything = not request.narrowing and request.level == max(LEVELS)
    unused = announced.unused([case.id for case in cases]) if everything else []
    return Report(
        status.name,
        status.distribution,
        status.version,
        request.level,
        request.threads,
        tuple(cases),
        tuple(outcomes[case.id] for case in cases),
        announced,
        tuple(unused),
        time.monotonic() - start,
    )


def _run_apart(
    cases: Sequence[Case], setup: Setup, request: Request, done: Callable[[Outcome], Outcome]
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    claimed: list[Case] = []
    for case in cases:
        if case.not_claimed:
            outcomes[case.id] = done(Outcome(case.id, "not-claimed", message=case.not_claimed))
        else:
            claimed.append(case)
    chunks = list(_chunks(claimed))
    chunks.reverse()
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    workers: list[Worker] = []

    def work() -> None:
        worker = Worker(setup)
        workers.append(worker)
        try:
            while not stop.is_set():
                with lock:
                    chunk = chunks.pop() if chunks else None
                if chunk is None:
                    return
                for case in chunk:
                    if stop.is_set():
                        return
                    outcome = worker.run(case.id, request.timeout_s)
                    with lock:
                        outcomes[case.id] = done(outcome)
        except BaseException as error:
            errors.append(error)
            stop.set()
        finally:
            worker.close()

    jobs = request.jobs or min(os.cpu_count() or 1, MOST_JOBS)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(chunks)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)
    except KeyboardInterrupt:
        stop.set()
        for worker in workers:
            worker.close()
        raise
    if errors:
        raise errors[0]
    return outcomes


def _chunks(cases: Iterable[Case]) -> Iterable[list[Case]]:
    for _, group in groupby(cases, key=lambda case: (case.subject, case.name)):
        found = list(group)
        for i in range(0, len(found), CHUNK):
            yield found[i : i + CHUNK]
