"""What threads make once, and locks that forks leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelforge.locks import ForkLock, Once

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
warns_of_threads = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def in_child(check: Callable[[], bool]) -> bool:
    """What `check` finds in a forked child; False when it hangs."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            status = 0 if check() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_that_ask_together_get_one() -> None:
    made: list[object] = []
    start = threading.Barrier(4, timeout=60)

    @Once
    def slow() -> object:
        """One."""
        time.sleep(0.05)
        return object()

    def ask() -> None:
        start.wait()
        made.append(slow())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 4
    assert len(set(map(id, made))) == 1
    assert slow.__doc__ == "One."
    slow.cache_clear()
    assert slow() is not made[0]


def test_what_failed_is_tried_again() -> None:
    tries: list[int] = []

    @Once
    def second() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not yet")
        return len(tries)

    with pytest.raises(OSError, match="not yet"):
        second()
    assert second() == second() == 2


@needs_fork
@warns_of_threads
def test_a_child_finds_a_lock_of_another_thread_free_and_its_own_held() -> None:
    mine, other = ForkLock(), ForkLock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with other:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)

    def both() -> bool:
        with other, mine:
            return True

    with mine:
        assert in_child(both)
    done.set()
    holder.join(60)


AT_ONCE = """
import threading, warnings
from kernelforge.registry import default_registry
warnings.simplefilter("error")
start, found = threading.Barrier(4, timeout=60), []

def ask():
    start.wait()
    found.append(default_registry())

threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert len(found) == 4 and len(set(map(id, found))) == 1, found
assert not [p for p in found[0].plugins.values() if p.state == "quarantined"]
"""


def test_plugins_are_imported_by_one_of_the_threads_that_ask(tmp_path: Path) -> None:
    """Several at once took each other's markers for traces of an import that never ended."""
    env = {**os.environ, "KERNELFORGE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", AT_ONCE], check=True, timeout=120, env=env)
