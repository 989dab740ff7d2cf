"""Ctrl-C, where it must wait, and where it must be told from what only looks like it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kernelforge.errors import PluginError


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back Ctrl-C while the block runs; what came meanwhile takes its usual effect at the end.

    For native code that calls Python and cannot bear its exceptions. Only the main thread ever sees Ctrl-C: elsewhere,
    and where something other than Python handles it, nothing is done.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def own_interruptions() -> Iterator[None]:
    """Raises PluginError for a KeyboardInterrupt that code in the block raises itself. One that Ctrl-C causes passes."""
    usual, came = signal.getsignal(signal.SIGINT), list[int]()

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
        if came:
            raise
        raise PluginError("it raised KeyboardInterrupt itself") from error
    finally:
        if watching and signal.getsignal(signal.SIGINT) is note:  # not another that the code has set
            signal.signal(signal.SIGINT, usual)
