"""No time is reported that was not measured: what timestamps must be, and what is done when they are not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import DeviceError
from kernelforge.problem import parse_problem
from kernelforge.session import Session
from kernelforge_metal import timing

Array = np.ndarray[Any, np.dtype[Any]]


class Clock:
    """A clock that stands still but for what is spent."""

    def __init__(self) -> None:
        self.now = 5.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


class FakeGpu:
    """Runs of 2 ms, 0.3 ms for each wait, and whatever timestamps a test wants."""

    def __init__(self, clock: Clock, ticks: Sequence[float] | None) -> None:
        self.clock, self.ticks, self.runs = clock, ticks, 0
        self.has_timestamps = ticks is not None
        self.warm_at, self.software = -math.inf, False
        self.queue = self

    def encoder(self) -> None: ...

    def encode(self, encoder: object, commands: Sequence[object], uniforms: object, stamps: object = None) -> None:
        self.runs += max(1, len(commands))

    def resolve(self, encoder: object, count: int) -> None: ...

    def finish(self, encoder: object) -> None: ...

    def submit(self, encoder: object) -> None: ...

    def wait(self) -> None:
        self.clock.now += 0.002 * self.runs + 0.0003
        self.runs = 0

    def timestamps(self, count: int) -> Array:
        assert self.ticks is not None
        return np.array((list(self.ticks) * count)[:count])


@pytest.mark.parametrize(
    "ticks",
    [
        [0.0],
        [3.0, 3.0],
        [0.0, -1e-3],
        [0.0, 10.0],
        [0.0, float("nan")],
        None,
    ],
    ids=["zeros", "equal", "backwards", "longer than the clock", "nan", "none"],
)
def test_bad_timestamps_are_replaced_by_the_slope_of_the_clock(clock: Clock, ticks: Sequence[float] | None) -> None:
    found = timing.measure(FakeGpu(clock, ticks), [], None, 3)  # type: ignore[arg-type]  # as much of one as is used
    assert found.source == "host-slope"
    assert found.samples == pytest.approx((0.002,) * 3)
    steps = timing.step_seconds(FakeGpu(clock, ticks), [[], []], None, 1)  # type: ignore[arg-type]
    assert steps == pytest.approx([0.002, 0.002])


@pytest.mark.parametrize(
    ("pairs", "wall", "plausible"),
    [
        ([[0, 1], [2, 3]], 3.0, True),
        ([[0, 1], [1, 2]], 2.0, True),
        ([[0, 2], [1, 3]], 3.0, False),  # the second begins before the first ends
        ([[0, 1], [2, 3]], 2.9, False),  # longer than the clock saw
        ([[0, 0], [1, 2]], 3.0, False),
        ([[0, 1], [math.nan, 3]], 3.0, False),
        ([[0, 1], [2, math.inf]], math.inf, False),
    ],
)
def test_times_are_plausible_only_if_all_of_it_is(pairs: list[list[float]], wall: float, plausible: bool) -> None:
    assert timing.plausible(np.array(pairs, np.float64), wall) is plausible


def test_good_timestamps_are_taken(clock: Clock) -> None:
    class Good(FakeGpu):
        def timestamps(self, count: int) -> Array:
            return np.arange(count) * 1e-4

    found = timing.measure(Good(clock, []), [], None, 5)  # type: ignore[arg-type]
    assert found.source == "timestamp-query"
    assert found.samples == pytest.approx((1e-4,) * 5)


class Rising(FakeGpu):
    """Its clock is low at first: runs of 2 ms become runs of 0.2 ms after `rise` seconds of work."""

    def __init__(self, clock: Clock, rise: float) -> None:
        super().__init__(clock, [])
        self.rise, self.worked = rise, 0.0

    def wait(self) -> None:
        for _ in range(self.runs):
            spent = 0.002 if self.worked < self.rise else 0.0002
            self.worked += spent
            self.clock.now += spent
        self.runs = 0

    def timestamps(self, count: int) -> Array:
        return np.arange(count) * 1e-6


@pytest.mark.parametrize("rise", [0.0, 0.4, 0.55, 5.0])
def test_a_cold_device_is_warmed_up_and_a_warm_one_is_not(clock: Clock, rise: float) -> None:
    gpu = Rising(clock, rise)
    command: Any = None
    timing.measure(gpu, [command], None, 1)  # type: ignore[arg-type]
    assert timing.LEAST_WARM_S <= gpu.worked <= timing.MOST_WARM_S + 0.1
    before = gpu.worked
    timing.measure(gpu, [command], None, 1)  # type: ignore[arg-type]
    assert gpu.worked - before < 0.01
    for _ in range(3):  # short runs do not keep it warm
        assert gpu.worked - before < 0.1
        clock.now += 0.4 * timing.IDLE_S
        timing.step_seconds(gpu, [[command]], None, 1)  # type: ignore[arg-type]
    assert gpu.worked - before > timing.LEAST_WARM_S


def test_long_runs_keep_a_device_warm(clock: Clock) -> None:
    gpu = Rising(clock, 0.4)
    command: Any = None
    timing.measure(gpu, [command], None, 1)  # type: ignore[arg-type]
    for _ in range(3):
        clock.now += 0.9 * timing.IDLE_S
        before = gpu.worked
        timing.measure(gpu, [command] * 100, None, 1)  # type: ignore[arg-type]
        assert gpu.worked - before < 0.1


def test_a_software_device_is_not_warmed_up(clock: Clock) -> None:
    gpu = Rising(clock, 0.4)
    gpu.software = True
    command: Any = None
    timing.measure(gpu, [command], None, 1)  # type: ignore[arg-type]
    assert gpu.worked < 0.01


def test_what_the_host_does_alone_warms_nothing_up(clock: Clock) -> None:
    gpu = Rising(clock, 0.4)
    command: Any = None

    def host() -> None:
        clock.now += 0.001

    assert timing.step_seconds(gpu, [host, host], None, 1) == pytest.approx([0.001, 0.001])  # type: ignore[arg-type]
    timing.measure_on_host(gpu, host, [], None, 1)  # type: ignore[arg-type]
    assert gpu.worked == 0
    found = timing.measure_on_host(gpu, host, [command], None, 2)  # type: ignore[arg-type]
    assert found.samples == pytest.approx((0.001,) * 2)
    assert gpu.worked > timing.LEAST_WARM_S


def test_what_cannot_be_told_from_noise_is_an_error(clock: Clock) -> None:
    def batch(n: int) -> None:
        clock.now += 0.001

    with pytest.raises(DeviceError, match="cannot be measured"):
        timing.slope(batch, 1)


@pytest.mark.parametrize("name", ["gpu", "plain_gpu"])
def test_a_real_device_is_measured(request: pytest.FixtureRequest, name: str) -> None:
    session: Session = request.getfixturevalue(name)
    problem = parse_problem("transformer.softmax(f32[64,512]) -> (f32[64,512]) {axis=-1}")
    executable = session.compile_problem(problem)
    inputs = {"x": np.ones((64, 512), np.float32)}
    executable.run(inputs)
    start = time.perf_counter()
    found = executable.measure(inputs, repeats=3)
    wall = time.perf_counter() - start
    assert found.source == ("timestamp-query" if name == "gpu" else "host-slope")
    assert all(0 < s < wall for s in found.samples)
    explanation = executable.explain(inputs, repeats=1)
    assert explanation.seconds is not None
    assert 0 < explanation.seconds < 1
