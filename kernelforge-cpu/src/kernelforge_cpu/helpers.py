"""Compiling in several processes: MLIR and LLVM compile one kernel at a time in each.

The calling process compiles, and beside it helpers: Python processes that read texts from a pipe and answer with object
code. All take the next text of one list, the longest first. What a helper does not deliver, because it could not be
started, died or hangs, is compiled here: helpers change when a kernel is ready, never whether or what it is.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from kernelforge.inbox import open_inbox
from kernelforge.machine import probe
from kernelforge_cpu import jit
from kernelforge_cpu.isa import CpuTarget

TEXT_PER_PROCESS = 100_000
"""Characters of MLIR text that make another process worth its start of 0.4 s of CPU time: at 5 us each they take 0.5 s."""
MOST_HELPERS = 3
"""Each takes up to 200 MB of memory, and a model's longest kernel is a quarter of the work."""
IDLE_S = 5.0
"""How long a helper waits for a text before it ends."""
PATIENCE_S = 60.0
"""How long after all else is done a helper may take before it counts as hanging."""

BOOT = "import sys; sys.path[:] = sys.argv[1:]; from kernelforge_cpu.helpers import serve; serve()"
"""What a helper runs: this file, found on this process's path."""


def helper_count(texts: Collection[str], threads: int) -> int:
    """How many helpers these texts are worth for a user of that many threads, on this machine."""
    if not sys.executable or getattr(sys, "frozen", False):  # `sys.executable` is then not a Python
        return 0
    wanted = min(len(texts), sum(map(len, texts)) // TEXT_PER_PROCESS)
    return max(0, min(MOST_HELPERS, min(threads, probe().cores) - 1, wanted - 1))


def compile_each(
    texts: Collection[str], target: CpuTarget, keep: Callable[[str, bytes], None], *, threads: int = 1
) -> None:
    """Compile all `texts` and hand each with its object code to `keep`, on the calling thread, in any order.

    Raises UsageError with the diagnostics of a text that does not compile; what `keep` got until then is good.
    """
    todo = deque(sorted(texts, key=len, reverse=True))
    done: deque[tuple[str, bytes]] = deque()
    left = set(texts)

    def keep_one(text: str, code: bytes) -> None:
        left.discard(text)
        keep(text, code)

    helpers: list[Helper] = []
    try:
        with contextlib.suppress(RuntimeError):  # the system gives no more threads
            for _ in range(helper_count(texts, threads)):
                helpers.append(Helper(todo, done, target))  # noqa: PERF401  # each is stopped also when the next is interrupted
        while (text := _next(todo)) is not None:
            keep_one(text, jit.compile_object(text, cpu=target))
            while done:
                keep_one(*done.popleft())
        deadline = time.monotonic() + PATIENCE_S
        for helper in helpers:
            helper.thread.join(max(0.0, deadline - time.monotonic()))
    finally:
        for helper in helpers:
            helper.stop()
    while done:
        keep_one(*done.popleft())
    for text in sorted(left):
        keep_one(text, jit.compile_object(text, cpu=target))


def _next(todo: deque[str]) -> str | None:
    """Take the first text, unless there is none. Safe in several threads at once."""
    try:
        return todo.popleft()
    except IndexError:
        return None


class Helper:
    """A process that compiles texts of `todo` and appends them to `done` until there are none or it fails."""

    def __init__(self, todo: deque[str], done: deque[tuple[str, bytes]], target: CpuTarget) -> None:
        self._todo, self._done, self._target = todo, done, target
        self._process = _spare_one() or _start()
        self._failed = True
        self.thread = threading.Thread(target=self._feed, name="kernelforge-compile", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:
            if self._process is not None:
                _end(self._process)
            raise

    def _feed(self) -> None:
        if self._process is None:
            return
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        with contextlib.suppress(Exception):  # it died, or something printed into its answers
            while (text := _next(self._todo)) is not None:
                pickle.dump((text, self._target), requests)
                requests.flush()
                code = pickle.load(answers)
                if code is not None:
                    self._done.append((text, code))
            self._failed = False

    def stop(self) -> None:
        """Keep the process for the next texts if it is well and idle, and end it otherwise."""
        if self._process is None:
            return
        busy = self.thread.is_alive()
        if busy:
            self._process.kill()
        self.thread.join()
        if busy or self._failed:
            _end(self._process)
        else:
            _spare.append(self._process)


_spare: list[subprocess.Popen[bytes]] = []
"""Idle helpers: a model has two programs to compile, one after the other. Each ends itself after `IDLE_S`."""


def _spare_one() -> subprocess.Popen[bytes] | None:
    """An idle helper that has not ended, if there is one."""
    while _spare:
        process = _spare.pop()
        if process.poll() is None:
            return process
        _end(process)
    return None


def _start() -> subprocess.Popen[bytes] | None:
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW
    try:
        return subprocess.Popen(
            [sys.executable, "-c", BOOT, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a text that kills LLVM will say so here
            creationflags=flags,
        )
    except OSError:  # no memory for it, or not allowed
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what was not flushed has no reader
        process.communicate()


@atexit.register
def _end_spare() -> None:
    while _spare:
        _end(_spare.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_spare.clear)  # they are the parent's


def serve() -> None:
    """A helper's life: object code for each text, None for one that does not compile, until none comes any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that is being helped, which ends this one
    requests: queue.SimpleQueue[tuple[str, CpuTarget]] = open_inbox(pickle.load)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    with contextlib.suppress(queue.Empty, BrokenPipeError):
        while True:
            text, target = requests.get(timeout=IDLE_S)
            try:
                code = jit.compile_object(text, cpu=target)
            except Exception:  # it will be said by who compiles it again
                code = None
            pickle.dump(code, answers)
            answers.flush()
