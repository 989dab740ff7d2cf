"""Persistent teams of threads that run step tables; one per process and thread count.

The calling thread is one of the team. Workers are Python threads that live in native code: they spin for a while for
the next run (a decoder's steps follow each other closely), then park in Python on a semaphore, where they cost
nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import warnings
from functools import partial
from typing import Any

import numpy as np

from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.interruption import held_back
from kernelforge.locks import ForkLock
from kernelforge.machine import probe
from kernelforge_cpu.driver import StepTable, driver
from kernelforge_cpu.stack import Stack, call_with_room, start_with_room

IDLE_SPIN_S = 5e-4
"""How long a worker spins for the next run before it parks."""
BUSY_SPIN_S = 2e-5
"""How long a thread spins for the others within a run before it starts giving its core away."""
MAX_THREADS = 1024
WORD = 8
BEGUN, YIELD, IDLE, BUSY, WORKERS, STOP = 85, 80, 81, 82, 83, 84
STATES, STATE_WORDS = 96, 16
"""Places in the team's memory, in words: see `%team` in driver.ll."""
TO_BE_WOKEN = 2


class Team:
    """See `get_team`."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        raw = np.zeros(STATES + STATE_WORDS * threads + 16, np.int64)
        start = -raw.ctypes.data // WORD % 16  # a line of its own for each word that threads fight for
        self._words = raw[start:]
        self._address = self._words.ctypes.data
        self._reset()

    def _reset(self) -> None:
        """No workers; the next run starts them."""
        self._words[:] = 0
        self._lock = threading.Lock()
        self._members: set[int] = set()  # threads that are inside a run: theirs is not to wait for the lock
        self._wake = [threading.Semaphore(0) for _ in range(self.threads - 1)]
        self._workers: list[threading.Thread] = []
        self._started = False

    def _start(self) -> None:
        spins = 1000
        start = time.perf_counter()
        driver().spin(spins)
        per_second = spins / (time.perf_counter() - start)
        crowded = self.threads > probe().logical
        self._words[IDLE] = 0 if crowded else int(IDLE_SPIN_S * per_second)
        self._words[BUSY] = 0 if crowded else int(BUSY_SPIN_S * per_second)
        self._words[YIELD] = _yield_address()
        with held_back():  # a worker that runs is one that is waited for
            for i in range(len(self._workers), self.threads - 1):  # a start that failed goes on where it was
                worker = threading.Thread(target=self._work, args=(i,), name=f"kernelforge-{i + 1}", daemon=True)
                try:
                    start_with_room(worker)
                except RuntimeError as error:  # nobody waits for a worker that is not there
                    self._started = True
                    told = f"{i + 1} of {self.threads} threads work: {error}"
                    warnings.warn(told, KernelForgeWarning, stacklevel=3)
                    break
                self._workers.append(worker)
                self._words[WORKERS] = i + 1
        self._started = True

    def run(self, table: StepTable, first: int = 0, last: int | None = None, *, repeats: int = 1) -> None:
        """Run steps [first, last) of the table in order, `repeats` times, and return when all is done.

        A call from another thread waits for its turn. A call from within a kernel of a run (a Python callback) is run
        by its thread alone. Another thread takes the caller's place where the caller's stack is too small for kernels. Raises
        UsageError for a range that the table does not have.
        """
        last = len(table) if last is None else last
        if not 0 <= first <= last <= len(table):
            raise UsageError(f"steps {first} to {last} of a table of {len(table)}")
        if first == last or repeats < 1:
            return
        # `known` alone where it can: it is a tenth of a microsecond sooner.
        if not (_stack.known or _stack.has_room()):
            call_with_room(partial(self.run, table, first, last, repeats=repeats))
            return
        native, me = driver(), threading.get_ident()
        if self.threads == 1 or me in self._members:
            native.serial(table.address, first, last, repeats)
            return
        with self._lock:
            if not self._started:
                self._start()
            self._members.add(me)
            try:
                if native.run(self._address, table.address, first, last, repeats):
                    self._wake_parked()
            finally:  # also when Ctrl-C comes in between: a job that has begun must end
                if self._words[BEGUN]:
                    native.finish(self._address)
                self._members.discard(me)

    def _wake_parked(self) -> None:
        for i, semaphore in enumerate(self._wake):
            if self._words[STATES + STATE_WORDS * i] == TO_BE_WOKEN:
                semaphore.release()

    def _work(self, index: int) -> None:
        _stack.has_room()  # for what that does on Windows
        self._members.add(threading.get_ident())
        native, wake = driver(), self._wake[index]  # native stays loaded as long as this thread is in its code
        while native.work(self._address, index):
            wake.acquire()

    def close(self) -> None:
        """End the workers; a later run starts new ones."""
        with self._lock:
            self._words[STOP] = 1
            for semaphore in self._wake:
                semaphore.release()
            for worker in self._workers:
                worker.join(timeout=1.0)
            if not any(worker.is_alive() for worker in self._workers):
                self._reset()


def _yield_address() -> int:
    """The system's function that gives the core to another thread."""
    library: Any = ctypes.CDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_stack = Stack()
_teams: dict[int, Team] = {}
_teams_lock = ForkLock()


def get_team(threads: int | None = None) -> Team:
    """The process's team of so many threads (default: `default_threads()`), the caller included; made on first use.

    Raises UsageError for less than 1 or more than 1024 threads.
    """
    count = default_threads() if threads is None else threads
    if not 1 <= count <= MAX_THREADS:
        raise UsageError(
            f"{count} threads are not possible", hint=f"give 1 to {MAX_THREADS} (--threads, KERNELFORGE_NUM_THREADS)"
        )
    with _teams_lock:
        if count not in _teams:
            _teams[count] = Team(count)
        return _teams[count]


def default_threads() -> int:
    """KERNELFORGE_NUM_THREADS, else the physical cores that the process may use. Raises UsageError when it is no
    number.
    """
    told = os.environ.get("KERNELFORGE_NUM_THREADS", "").strip()
    if not told:
        return probe().cores
    if not told.isdecimal() or not 1 <= int(told) <= MAX_THREADS:
        raise UsageError(f"KERNELFORGE_NUM_THREADS is {told!r}", hint=f"give a whole number from 1 to {MAX_THREADS}")
    return int(told)


def _after_fork() -> None:
    """In a forked child, which has none of the workers: every team, also those that executables hold, starts anew."""
    for team in _teams.values():
        team._reset()


def _close_all() -> None:
    for team in _teams.values():
        team.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_close_all)
