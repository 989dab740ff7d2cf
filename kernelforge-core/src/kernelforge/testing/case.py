"""What a conformance case is, and how it ends."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kernelforge.errors import KernelForgeWarning

if TYPE_CHECKING:
    from kernelforge.testing.bench import Bench

Kind = Literal[
    "wrong-shape",
    "wrong-dtype",
    "wrong-values",
    "out-of-bounds",
    "input-mutated",
    "not-written",
    "not-deterministic",
    "leaked",
    "crashed",
    "timed-out",
    "error",
    "not-refused",
    "round-trip",
    "not-idempotent",
    "illegal-config",
    "repeated-config",
    "over-budget",
    "optimum-missed",
    "unexpected-pass",
]
"""How a case fails. `not-refused`: something wrong was accepted; `unexpected-pass`: a failure was announced and did not
come."""

Status = Literal["passed", "failed", "expected-failure", "not-claimed"]

LEVELS = {
    1: "smoke",
    2: "values",
    3: "layout",
    4: "edge values",
    5: "property-based",
    6: "concurrency and memory",
}
DEFAULT_LEVEL = 6

THREADS = 2
"""Of a session unless a case asks for another number."""


class Failure(Exception):  # it is no error of the program
    """What a case raises when its subject is wrong."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


class NotClaimed(Exception):
    """What a case raises when its subject does not claim what the case would test."""


@dataclass(frozen=True)
class Case:
    """One thing that is checked, by a name that stays the same as long as the case does."""

    id: str
    level: int
    subject: str
    """Whose case it is: an op's full name, "pass", "tuner", "dialect", "backend", "command" or "importer"."""
    name: str
    """Of the variant, pass, tuner ... that is tested."""
    check: Callable[[Bench], None]
    """Returns when all is right; raises Failure or NotClaimed, or whatever the subject raises."""
    dtype: str = ""
    """Of a kernel: its operands' types, for the support matrix."""
    not_claimed: str = ""
    """The reason why the variant refuses the problem; such a case is counted, not run."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    case: str
    status: Status
    kind: Kind | None = None
    """Of a failure, expected or not."""
    message: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status != "failed"


def reproduce(plugin: str, case: str, threads: int = THREADS) -> str:
    """The command that runs one case alone."""
    more = "" if threads == THREADS else f" --threads {threads}"
    return f"kernelforge conformance run {shlex.quote(plugin)} --case {shlex.quote(case)}{more}"


def run_case(case: Case, bench: Bench) -> Outcome:
    """Run one case in this process. Interruptions pass through."""
    import numpy as np

    if case.not_claimed:
        return Outcome(case.id, "not-claimed", message=case.not_claimed)
    start = time.perf_counter()
    try:
        # Infinities and NaN are what many cases are about: numpy need not warn of them.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", KernelForgeWarning)
            case.check(bench)
        outcome = Outcome(case.id, "passed")
    except NotClaimed as reason:
        outcome = Outcome(case.id, "not-claimed", message=str(reason))
    except Failure as failure:
        outcome = Outcome(case.id, "failed", failure.kind, str(failure))
    except Exception as error:
        outcome = Outcome(case.id, "failed", "error", f"{type(error).__name__}: {error}")
    return Outcome(outcome.case, outcome.status, outcome.kind, outcome.message, time.perf_counter() - start)
