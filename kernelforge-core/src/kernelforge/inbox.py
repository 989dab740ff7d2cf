"""What a child process is told, and its end with the process that tells it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import BinaryIO, TypeVar

Message = TypeVar("Message")


def open_inbox(read: Callable[[BinaryIO], Message]) -> queue.SimpleQueue[Message]:
    """The messages that come on standard input; `read` reads one, and raises where the last one was.

    There this process ends, whatever it is doing: the one that wrote has closed its end or is dead, and nobody waits for
    what is compiled or run here. Native code that keeps the GIL has its way until it returns it.
    """
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    # Not sys.stdin: a thread that waits in it keeps a lock that the interpreter's exit wants, which is then a crash.
    source = open(0, "rb", closefd=False)  # noqa: SIM115  # as long as the process lives

    def receive() -> None:
        try:
            while True:
                messages.put(read(source))
        finally:
            os._exit(0)

    threading.Thread(target=receive, name="kernelforge-inbox", daemon=True).start()
    return messages
