"""Ctrl-C, and SIGTERM as another; where they must wait, and where they must be told from what only looks like them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kernelforge.errors import PluginError

REPEAT_S = 1.0
"""What `timeout` ends is sent SIGTERM by itself and with its group: the second must not end the clean-up after the first."""
PATIENCE_S = 10.0
"""How long SIGTERM may wait for the main thread, which may be in native code that never returns."""

_terminated: float | None = None
"""When SIGTERM came last, on the monotonic clock."""
_holding: list[int] | None = None
"""Signals that came while they are held back."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. After a KeyboardInterrupt itself that left an `exec`, as in `dataclass`, `python -m` ends by SIGINT."""


def interrupt_on_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as Ctrl-C does, unless it is ignored: children end, no half files stay.
    Where that is not possible for `PATIENCE_S` it ends the process as it does by default.

    For a process that is all ours, on its main thread.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform != "win32":  # where no other process can send it
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(told,), name="kernelforge-sigterm", daemon=True).start()
        os.register_at_fork(after_in_child=_as_usual)


def _as_usual() -> None:
    """In a forked child: SIGTERM ends it, and is not told to the parent's thread."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(told: int) -> None:
    while os.read(told, 1) != bytes([signal.SIGTERM]):
        pass
    time.sleep(PATIENCE_S)
    if _terminated is None:
        os._exit(143)


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    if _holding is not None:
        _holding.append(number)
        return
    before, _terminated = _terminated, time.monotonic()
    if before is None or _terminated >= before + REPEAT_S:
        raise Terminated


def ending() -> tuple[str, int]:
    """What to call the end that a KeyboardInterrupt is, and its exit code."""
    return ("interrupted", 130) if _terminated is None else ("terminated", 143)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back Ctrl-C while the block runs, and SIGTERM where it raises the same; what came meanwhile takes its usual effect
    at the end.

    For native code that calls Python and cannot bear its exceptions. Only the main thread ever sees Ctrl-C: elsewhere,
    and where something other than Python handles it, nothing is done.
    """
    global _holding
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return
    came: list[int] = []
    before = _holding
    try:
        _holding = came
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
        yield
    finally:
        _holding = before
        signal.signal(signal.SIGINT, usual)
    for number in came:
        signal.raise_signal(number)


@contextmanager
def own_interruptions() -> Iterator[None]:
    """Raises PluginError for a KeyboardInterrupt that code in the block raises itself. One that a signal causes passes."""
    usual, came, terminated = signal.getsignal(signal.SIGINT), list[int](), _terminated

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(usual):
            usual(number, frame)

    watching = threading.current_thread() is threading.main_thread() and callable(usual)
    if watching:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except KeyboardInterrupt as error:
        if came or _terminated != terminated:
            raise
        raise PluginError("it raised KeyboardInterrupt itself") from error
    finally:
        if watching and signal.getsignal(signal.SIGINT) is note:  # not another that the code has set
            signal.signal(signal.SIGINT, usual)
