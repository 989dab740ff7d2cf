"""The times of steps within a run: their rows of a step table, with a reading of the clock before, between and after.

A reading is a kernel of one part, which the driver runs between two groups: steps that would share a group run one after
the other here, and nothing else changes. The times add up to the time of the run.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kernelforge_cpu.driver import BARRIER, BUFFERS, FUNCTION, PARTS, StepTable, driver


class _Clock(NamedTuple):
    function: int
    """Address of what reads it."""
    number: int
    """Which clock, where the system has several."""
    units: tuple[float, float]
    """Seconds of the two words of a reading."""


class StampedTable(StepTable):
    """Rows of another table, as they are now, for `Team.run`."""

    def __init__(self, table: StepTable, spans: Sequence[tuple[int, int]]) -> None:
        """`spans`: for each step in order, its rows [first, last), not empty."""
        clock = _clock()
        self.pointers, self.dim_values, self.keep = table.pointers, table.dim_values, table
        self._units = clock.units
        self._readings = np.zeros((len(spans) + 1, 2), np.int64)
        self._slots = np.zeros((len(spans) + 1, 3), np.uint64)
        self._slots[:, 0], self._slots[:, 1] = clock.function, clock.number
        self._slots[:, 2] = _places(self._readings)
        stamps = np.zeros((len(spans) + 1, 5), np.uint64)
        stamps[:, FUNCTION], stamps[:, BUFFERS] = driver().stamp, _places(self._slots)
        stamps[:, PARTS] = stamps[:, BARRIER] = 1
        pieces = [stamps[:1]]
        for i, (first, last) in enumerate(spans):
            rows = table.rows(first, last)
            rows[0, BARRIER] = 1
            pieces += [rows, stamps[i + 1 : i + 2]]
        self._steps = np.concatenate(pieces)
        self.address = self._steps.ctypes.data

    def seconds(self) -> list[float]:
        """Of each span, in the last run."""
        times = self._readings @ np.array(self._units)
        return [float(t) for t in np.maximum(np.diff(times), 0.0)]


def _places(rows: Any) -> Any:
    """Addresses of the rows of an array."""
    return rows.ctypes.data + rows.strides[0] * np.arange(len(rows), dtype=np.uint64)


@cache
def _clock() -> _Clock:
    library: Any = ctypes.CDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)
    if sys.platform == "win32":
        frequency = ctypes.c_int64()
        library.QueryPerformanceFrequency(ctypes.byref(frequency))
        return _Clock(_address(library.QueryPerformanceCounter), 0, (1.0 / frequency.value, 0.0))
    # macOS: its monotonic clock counts microseconds, this one nanoseconds.
    number = getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC)
    return _Clock(_address(library.clock_gettime), number, (1.0, 1e-9))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
