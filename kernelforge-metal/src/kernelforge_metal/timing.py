"""How long the GPU takes: timestamps where they can be trusted, else the slope of the host's clock over n and 2n runs.

A timestamp counts only if it is what it claims to be: positive, in order, and not longer than the wall clock saw. Drivers that
return zeros or garbage are common enough; a wrong number is worse than a slower way to a right one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.backend import Timing
from kernelforge.errors import DeviceError
from kernelforge_metal.native import MAX_QUERIES

if TYPE_CHECKING:
    from kernelforge_metal.native import Gpu
    from kernelforge_metal.recorder import Command

    Array = np.ndarray[Any, np.dtype[Any]]

BATCH_S = 0.05
"""Seconds of work aimed at between two readings of the clock."""

IDLE_S = 1.0
"""A GPU that was not at work for so long may have lowered its clock: an H200 has after 1.5 s, not yet after 1.25 s. Short runs
meanwhile, even ten a second, do not keep it up."""

LEAST_WARM_S, MOST_WARM_S, WARM_BATCH_S = 0.5, 1.0, 0.02
"""What warming up takes, and its batches, which are also the least work that keeps a GPU warm. An H100 that was idle for six
seconds stays at 345 MHz for 0.3 to 0.4 s of work, then goes to 1980 at once: that runs take the same time says nothing before."""


def plausible(pairs: Array, wall: float) -> bool:
    """Whether start and end times [n, 2], in seconds, are those of passes that ran one after the other within `wall` seconds."""
    flat = pairs.reshape(-1)
    return bool(
        np.isfinite(flat).all()
        and (pairs[:, 1] > pairs[:, 0]).all()
        and (np.diff(flat) >= 0).all()
        and flat[-1] - flat[0] <= wall
    )


def measure(gpu: Gpu, commands: Sequence[Command], uniforms: Any, repeats: int) -> Timing:
    """Times of `repeats` runs of these dispatches, after one that does not count, of a GPU that is warm."""
    with _warm(gpu, commands, uniforms):
        return _measure(gpu, commands, uniforms, repeats)


@contextmanager
def _warm(gpu: Gpu, commands: Sequence[Command], uniforms: Any) -> Iterator[None]:
    """For timing these dispatches: the clock of an idle GPU has risen. A software GPU has no clock of its own, and where there
    are no dispatches the host does it all."""
    if gpu.software or not commands:
        yield
        return
    if time.perf_counter() - gpu.warm_at >= IDLE_S:
        _warm_up(gpu, commands, uniforms)
        gpu.warm_at = time.perf_counter()
    start = time.perf_counter()
    yield
    end = time.perf_counter()
    if end - start >= WARM_BATCH_S:
        gpu.warm_at = end


def _warm_up(gpu: Gpu, commands: Sequence[Command], uniforms: Any) -> None:
    """Run them until the clock has risen, which it does only while the GPU works: for a while, then as long as runs still get
    faster."""
    now = start = time.perf_counter()
    n, best, settled = 1, math.inf, 0
    while now - start < LEAST_WARM_S or (settled < 3 and now - start < MOST_WARM_S):
        spent = seconds(partial(_batch, gpu, list(commands) * n, uniforms))
        settled = settled + 1 if spent / n > 0.98 * best else 0
        best = min(best, spent / n)
        if spent < WARM_BATCH_S and n < 1024:
            n *= 2
        now = time.perf_counter()


def _batch(gpu: Gpu, commands: Sequence[Command], uniforms: Any) -> None:
    """One compute pass, and waiting for it."""
    encoder = gpu.queue.encoder()
    gpu.encode(encoder, commands, uniforms)
    gpu.queue.submit(gpu.finish(encoder))
    gpu.queue.wait()


def _measure(gpu: Gpu, commands: Sequence[Command], uniforms: Any, repeats: int) -> Timing:
    if gpu.has_timestamps:
        samples: list[float] = []
        while len(samples) < repeats:
            count = min(repeats - len(samples), MAX_QUERIES // 2 - 1)
            pairs, wall = stamped(gpu, [commands] * (count + 1), uniforms)
            if not plausible(pairs, wall):
                break
            samples += [float(end - start) for start, end in pairs[1:]]
        else:
            return Timing(tuple(samples), "timestamp-query")

    def batch(n: int) -> None:
        encoder = gpu.queue.encoder()
        for _ in range(n):
            gpu.encode(encoder, commands, uniforms)
        gpu.queue.submit(gpu.finish(encoder))
        gpu.queue.wait()

    return slope(batch, repeats)


def stamped(gpu: Gpu, passes: Sequence[Sequence[Command]], uniforms: Any) -> tuple[Array, float]:
    """Run compute passes one after the other: their start and end times in seconds [n, 2], and the wall clock's seconds."""
    encoder = gpu.queue.encoder()
    for i, commands in enumerate(passes):
        gpu.encode(encoder, commands, uniforms, (2 * i, 2 * i + 1))
    gpu.resolve(encoder, 2 * len(passes))
    start = time.perf_counter()
    gpu.queue.submit(gpu.finish(encoder))
    gpu.queue.wait()
    wall = time.perf_counter() - start
    return gpu.timestamps(2 * len(passes)).reshape(-1, 2), wall


def slope(batch: Callable[[int], None], repeats: int) -> Timing:
    """Seconds a run from the difference between batches of 2n and n: what a batch costs in itself cancels out.

    Raises DeviceError when no difference can be told from noise.
    """
    batch(1)
    n, best = 1, 0.0
    while (best := seconds(partial(batch, n))) < BATCH_S and n < 1024:
        n *= 2
    samples: list[float] = []
    for _ in range(8 * repeats):
        once, twice = seconds(partial(batch, n)), seconds(partial(batch, 2 * n))
        if twice > once:
            samples.append((twice - once) / n)
        if len(samples) == repeats:
            return Timing(tuple(samples), "host-slope")
    raise DeviceError(
        f"the GPU's time cannot be measured: {n} and {2 * n} runs take {best:.2g} s alike",
        hint="give it more work a run",
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_on_host(
    gpu: Gpu, run: Callable[[], None], commands: Sequence[Command], uniforms: Any, repeats: int
) -> Timing:
    """By the host's clock: runs of which the host does a part, and the GPU these dispatches."""

    def whole() -> None:
        run()
        gpu.queue.wait()

    with _warm(gpu, commands, uniforms):
        return Timing(tuple([seconds(whole) for _ in range(repeats + 1)][1:]), "host-clock")


def step_seconds(
    gpu: Gpu, steps: Sequence[Sequence[Command] | Callable[[], None]], uniforms: Any, repeats: int
) -> list[float]:
    """The median time of each step within whole runs, after one that does not count, of a GPU that is warm; a callable runs on
    the host."""
    times: list[list[float]] = [[] for _ in steps]
    with _warm(gpu, [command for step in steps if not callable(step) for command in step], uniforms):
        for _ in range(repeats + 1):
            for i, found in enumerate(_step_times(gpu, steps, uniforms)):
                times[i].append(found)
    return [median(found[1:]) for found in times]


def _step_times(gpu: Gpu, steps: Sequence[Sequence[Command] | Callable[[], None]], uniforms: Any) -> list[float]:
    times: list[float] = []
    pending: list[Sequence[Command]] = []

    def flush() -> None:
        while pending:
            passes, pending[:] = pending[: MAX_QUERIES // 2], pending[MAX_QUERIES // 2 :]
            pairs, wall = stamped(gpu, passes, uniforms) if gpu.has_timestamps else (np.zeros((1, 2)), 0.0)
            if plausible(pairs, wall):
                times.extend(float(end - start) for start, end in pairs)
            else:
                times.extend(_measure(gpu, p, uniforms, 1).samples[0] for p in passes)

    for step in steps:
        if callable(step):
            flush()
            times.append(seconds(step))
        else:
            pending.append(step)
    flush()
    return times
