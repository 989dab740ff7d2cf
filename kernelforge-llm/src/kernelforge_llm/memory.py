"""Peak memory of this process, without the pages of mapped files: what the machine must really spare."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL_S = 0.05
"""Seldom enough to leave what is measured meanwhile alone."""


def anonymous_bytes() -> int:
    """Resident memory that is not backed by a file; on systems that do not tell, all resident memory."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


class PeakMemory:
    """Samples `anonymous_bytes` from a thread while the block runs; `nbytes` is the largest sample so far."""

    def __init__(self) -> None:
        self.nbytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="kernelforge-memory", daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self.nbytes = max(self.nbytes, anonymous_bytes())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, anonymous_bytes())
