"""Fair timing: everything that is compared runs in turn, round after round, so that a slow moment hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from kernelforge.backend import Timing

ROUNDS = 4
MINIMUM_SAMPLES = 5
_MAXIMUM_REPEATS = 250


@dataclass
class Subject:
    """One of several things that are timed together."""

    run: Callable[[int], Timing]
    """Runs as often as it is told, each run timed."""
    samples: list[float] = field(default_factory=list)
    source: str = ""
    """The timings' source."""
    running: bool = False
    """It is being run; still set after an exception from it."""

    @property
    def median(self) -> float:
        return median(self.samples)

    def measure(self, repeats: int) -> None:
        self.samples.extend(self.time(repeats))

    def time(self, repeats: int) -> tuple[float, ...]:
        """Samples that are not kept."""
        self.running = True
        timing = self.run(repeats)
        self.running = False
        self.source = timing.source
        return timing.samples


def measure_in_turn(
    subjects: Sequence[Subject],
    *,
    seconds: float = 0.2,
    rounds: int = ROUNDS,
    minimum: int = MINIMUM_SAMPLES,
    cutoff: float = math.inf,
    deadline: float = math.inf,
    pause: float = 0.0,
    warm: float = 0.0,
) -> None:
    """Fill the subjects' samples: about `seconds` of runs for each, at least `minimum`, spread evenly over `rounds`.

    Each turn begins with runs that do not count: one, or as many as `warm` seconds take, after which caches and the clock's
    frequency are those of a busy process. After a round, a subject whose best sample is above `cutoff`
    times the best median is left as it is. After `deadline` (of `time.monotonic`) the round in progress ends and no
    other begins. `pause` seconds pass before each turn, for threads of the one before that may still be spinning.
    """
    alive = list(subjects)
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            return
        for subject in alive:
            time.sleep(pause)
            start = time.monotonic()
            once = min(subject.time(1))
            while time.monotonic() - start < warm:
                subject.time(1)
            wanted = int(seconds / rounds / (subject.median if subject.samples else once))
            subject.measure(min(max(wanted, math.ceil(minimum / rounds)), _MAXIMUM_REPEATS))
        best = min(subject.median for subject in subjects if subject.samples)
        alive = [subject for subject in alive if min(subject.samples) <= cutoff * best]
