"""Kernels that end the process which tries them, found out by the next tuning.

No process can catch that in itself. So before a kernel first runs, the record of its failure is written beside the records, and
taken away when the kernel returns or raises; one that its process left behind becomes a failed trial, which is not repeated.
"""

from __future__ import annotations

import contextlib
import glob
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from kernelforge import home
from kernelforge.errors import KernelForgeWarning
from kernelforge.tune.record import Record, RecordError, parse_record
from kernelforge.tune.records import RecordStore
from kernelforge.variant import config_key

ENDED = "the process ended while this kernel was built or first run: it crashed, or was killed"


@contextlib.contextmanager
def watched(store: RecordStore, failure: Record) -> Iterator[None]:
    """While a kernel is tried for the first time: `failure` is what is recorded should the process not live through it.
    Nothing is where the folder cannot be written."""
    trace = store.path.with_name(f"{store.path.name}.{os.getpid()}.trial")
    with contextlib.suppress(OSError):
        home.write_atomic(trace, failure.line())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            trace.unlink()


def record_crashes(store: RecordStore) -> None:
    """Record what processes that are no longer there have left behind, and warn of each."""
    for trace in sorted(store.path.parent.glob(f"{glob.escape(store.path.name)}.*.trial")):
        try:
            if _in_progress(trace):
                continue
            failure = parse_record(trace.read_text(encoding="utf-8", errors="replace"))
            store.append(failure)
            trace.unlink()
        except RecordError:
            trace.unlink(missing_ok=True)
        except OSError:
            continue
        else:
            kernel = f"kernel '{failure.variant}' of plugin {failure.plugin} with config {config_key(failure.config)}"
            remedy = "`kernelforge records prune --failed` has it tried again"
            told = f"a process crashed or was killed while it tried {kernel}, which counts as failed"
            told += f" on {failure.problem}; {remedy}"
            warnings.warn(KernelForgeWarning(told), stacklevel=3)


def _in_progress(trace: Path) -> bool:
    """Whether the process that left a trace is there: another one of its number began later."""
    import psutil

    number = trace.suffixes[-2][1:]
    if not number.isdecimal():
        return False
    try:
        return bool(psutil.Process(int(number)).create_time() <= trace.stat().st_mtime)
    except psutil.Error:
        return False
