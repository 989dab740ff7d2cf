"""What threads take turns with, also where one of them forks the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, TypeVar
from weakref import WeakSet

Made = TypeVar("Made")

_locks: WeakSet[ForkLock] = WeakSet()


class ForkLock:
    """A lock that may be taken again by its owner, and that a forked child never finds held by a thread it does not have:
    for what a child can begin anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """In a forked child: free it, unless this thread holds it."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


class Once(Generic[Made]):
    """A function without arguments that runs once in a process: threads that ask meanwhile wait for what it returns. With
    `functools.cache` each would make one of its own, and all but the last would go away with the callers."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make, self._made, self._lock = make, list[Made](), ForkLock()
        update_wrapper(self, make)

    def __call__(self) -> Made:
        made = self._made
        if not made:
            with self._lock:
                if not made:
                    made.append(self._make())
        return made[0]

    def cache_clear(self) -> None:
        """The next call makes another."""
        self._made = []


def _after_fork() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
