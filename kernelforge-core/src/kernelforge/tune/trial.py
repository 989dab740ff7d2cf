"""Kernels that end the process which tries them, found out by the next tuning.

No process can catch that in itself. So before a kernel first runs, the record of its failure is written beside the records, and
taken away when the kernel returns or raises. Signals that code itself causes, such as SIGSEGV, add what they are to one that is
left behind (`faulthandler`): it becomes a failed trial, which is not repeated. Without a word its process was killed, as by
Ctrl-\\ or for want of memory, or ended in a way that leaves no trace: that kernel is tried once more before it counts as failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import glob
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from kernelforge import home
from kernelforge.errors import KernelForgeWarning
from kernelforge.tune.record import Record, RecordError, parse_record
from kernelforge.tune.records import RecordStore
from kernelforge.variant import config_key

ENDED = "the process ended while this kernel was built or first run"


@contextlib.contextmanager
def watched(store: RecordStore, failure: Record) -> Iterator[None]:
    """While a kernel is tried for the first time: `failure` is what is recorded should the process not live through it.
    Nothing is where the folder cannot be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_trace(store, failure))
        yield


@contextlib.contextmanager
def _trace(store: RecordStore, failure: Record) -> Iterator[None]:
    """A file that is locked as long as its process lives. Raises OSError."""
    store.path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=store.path.parent, prefix=f"{store.path.name}.", suffix=".trial")
    enabled = faulthandler.is_enabled()
    try:
        home.lock_now(handle)
        os.write(handle, f"{failure.line()}\n".encode())
        faulthandler.enable(handle)
        yield
    finally:
        faulthandler.enable(2) if enabled else faulthandler.disable()
        os.close(handle)
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)
            _killed_before(store, failure).unlink(missing_ok=True)


def record_crashes(store: RecordStore) -> None:
    """Record what processes that are no longer there have left behind, and warn of each."""
    for trace in sorted(store.path.parent.glob(f"{glob.escape(store.path.name)}.*.trial")):
        with contextlib.suppress(OSError):
            with trace.open("r+b") as file:
                if not home.lock_now(file.fileno()):
                    continue
                line, _, fault = file.read().decode(errors="replace").partition("\n")
            try:
                told = _settled(store, parse_record(line), fault)
            except RecordError:
                told = None
            trace.unlink()
            if told is not None:
                warnings.warn(KernelForgeWarning(told), stacklevel=3)


def _settled(store: RecordStore, failure: Record, fault: str) -> str:
    """Record that a process ended in a trial, or note that one was killed. Returns what to tell of it. Raises OSError."""
    before = _killed_before(store, failure)
    kernel = f"kernel '{failure.variant}' of plugin {failure.plugin} with config {config_key(failure.config)}"
    if not (fault or before.exists()):
        before.touch()
        return (
            f"a process was killed while it tried {kernel} on {failure.problem}; it is tried again, "
            "and counts as failed should that happen once more"
        )
    how = fault.partition("\n")[0].partition(": ")[2] or "it crashed, or was killed each time"
    store.append(replace(failure, message=f"{failure.message}: {how}"))
    before.unlink(missing_ok=True)
    return (
        f"a process ended ({how}) while it tried {kernel}, which counts as failed on {failure.problem}; "
        "`kernelforge records prune --failed` has it tried again"
    )


def _killed_before(store: RecordStore, failure: Record) -> Path:
    """The file that is there when a process was killed in this trial."""
    subject = sha256(repr(failure.subject).encode()).hexdigest()[:16]
    return store.path.with_name(f"{store.path.name}.{subject}.killed")
