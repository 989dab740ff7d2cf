"""What a process costs: CPU time, which other work on the machine changes least."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping


def child_seconds(environment: Mapping[str, str], *arguments: str) -> float:
    """CPU time of Python with these arguments, which must succeed; the time that passed where the system does not tell."""
    start = _spent()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, env=environment)
    return _spent() - start


def _spent() -> float:
    if sys.platform == "win32":
        return time.perf_counter()
    from resource import RUSAGE_CHILDREN, getrusage

    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
