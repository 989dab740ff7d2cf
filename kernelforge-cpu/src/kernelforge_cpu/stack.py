"""Room on the stack for kernels, which keep widened panels, scores and sums there."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from kernelforge.interruption import held_back
from kernelforge.locks import ForkLock
from kernelforge.machine import stack_bytes

KERNEL_BYTES = 640 * 1024
"""Of stack, at most, for what a kernel keeps there."""
LEAST_BYTES = 960 * 1024
"""Stack of a thread that runs kernels: of 1 MiB, which is little, systems tell some less."""
OWN_BYTES = 8 << 20
"""Stack of threads that are started here: as much as Linux gives a thread. It is memory only where it is touched."""


class Stack(threading.local):
    """Each thread's own."""

    known: bool | None = None
    """What `has_room` has found."""

    def has_room(self) -> bool:
        """Whether it is large enough for kernels. The system is asked once a thread; on Windows, what kernels may use is then
        made memory."""
        if self.known is None:
            size = stack_bytes()
            self.known = size is None or size >= LEAST_BYTES
            if self.known and sys.platform == "win32":
                from kernelforge_cpu.driver import driver

                driver().touch(KERNEL_BYTES)
        return self.known


_starting = ForkLock()


def start_with_room(thread: threading.Thread) -> None:
    """Start a thread with a large stack, whatever `threading.stack_size` says."""
    with _starting:
        before = threading.stack_size(OWN_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


def call_with_room(call: Callable[[], None]) -> None:
    """Call on a thread with room and wait for its end; what the call raises is raised here. Ctrl-C waits, too: the caller's
    memory is in use until then."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # of any kind: without it the caller would go on as if all was done
            raised.append(error)

    thread = threading.Thread(target=work, name="kernelforge-caller", daemon=True)
    with held_back():
        start_with_room(thread)
        thread.join()
    if raised:
        raise raised[0]
