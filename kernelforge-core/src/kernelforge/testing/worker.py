"""Cases run in a process of their own, so that native code that crashes or hangs ends a case and not the run.

Parent and worker exchange JSON, one document a line. The worker gets a `Setup` and runs the cases that it is sent by name; it
collects those of one kernel, pass ... when it is sent the first of them. What plugins print goes to stderr. It ends when its
parent does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from kernelforge.errors import PluginError
from kernelforge.inbox import open_inbox
from kernelforge.testing.case import Outcome
from kernelforge.testing.collect import Scope, collect, expectations

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.testing.case import Case

START_S = 180.0
"""Until a worker that does not get ready is given up, if a case has no more."""
SLICE_S = 1.0


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know to collect the cases."""

    scope: Scope
    threads: int = 2
    extra: tuple[str, ...] = ()
    """Plugins that are not installed, as "module:attr"."""

    def registry(self) -> Registry:
        from kernelforge.lazy import resolve
        from kernelforge.plugins import load_registry

        return load_registry(extra_plugins=[resolve(ref) for ref in self.extra])


class Worker:
    """A process that runs cases, started anew after one that did not come back."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: IO[str] | None = None

    def run(self, case: str, timeout_s: float) -> Outcome:
        """Raises PluginError when the process cannot even collect the cases."""
        if self._process is None:
            self._start(max(START_S, timeout_s))
        self._send({"case": case})
        note, patience = "", max(START_S, timeout_s)  # until it has begun
        while True:
            try:
                reply = self._reply(patience)
            except queue.Empty:
                self.close()
                return Outcome(case, "failed", "timed-out", f"no result within {patience:g} s{_trying(note)}")
            if reply is None:
                return Outcome(case, "failed", "crashed", f"{self._end()}{_trying(note)}")
            if "note" in reply:
                note, patience = str(reply["note"]), timeout_s
            elif "error" in reply:
                raise self._failed(reply["error"])
            else:
                return Outcome(**reply["outcome"])

    def _start(self, timeout_s: float) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # outlives this
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kernelforge.testing.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._replies = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._replies), daemon=True).start()
        self._send(asdict(self._setup))
        try:
            reply = self._reply(timeout_s)
        except queue.Empty:
            raise self._failed(f"a process for them is not ready within {timeout_s:g} s") from None
        if reply is None:
            raise self._failed(self._end())
        if "error" in reply:
            raise self._failed(reply["error"])

    def _reply(self, patience_s: float) -> dict[str, Any] | None:
        """What the process says next; None: nothing any more. Raises queue.Empty when it is silent for so long.

        Only time in which this process runs counts, in slices: a machine that is suspended must not cost a case.
        """
        while patience_s > 0:
            with suppress(queue.Empty):
                return self._replies.get(timeout=min(SLICE_S, patience_s))
            patience_s -= SLICE_S
        raise queue.Empty

    def _failed(self, reason: str) -> PluginError:
        self.close()
        return PluginError(f"the cases of '{self._setup.scope.plugin}' cannot be run: {reason}")

    def _send(self, document: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, OSError):  # it is gone: reading says how
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()

    def _end(self) -> str:
        """How the process that has ended came to its end."""
        assert self._process is not None
        assert self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        said = " ".join(self._errors.read().split())[-300:]
        self.close()
        how = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                how = signal.Signals(-code).name
        return f"the process ended with {how}" + (f": {said}" if said else "")

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def _trying(note: str) -> str:
    return f", running {note}" if note else ""


def _read(process: subprocess.Popen[str], replies: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass on what a process says; None when it has ended."""
    assert process.stdout is not None
    with suppress(ValueError, OSError):  # closed by the parent
        for line in process.stdout:
            replies.put(json.loads(line))
    replies.put(None)


def serve() -> None:
    """The worker's side."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def say(document: dict[str, Any]) -> None:
        own.write(json.dumps(document) + "\n")
        own.flush()

    inbox = open_inbox(lambda source: json.loads(source.readline()))
    given: dict[str, Any] = inbox.get()
    setup = Setup(Scope(**given["scope"]), given["threads"], tuple(given["extra"]))
    try:
        from kernelforge.testing.bench import Bench
        from kernelforge.testing.case import run_case

        factors = expectations(setup.scope.plugin).factors
        bench = Bench(setup.registry(), threads=setup.threads, factors=factors, note=lambda text: say({"note": text}))
        say({"ready": True})
        cases: dict[str, Case] = {}
        while True:
            name = inbox.get()["case"]
            if name not in cases:
                cases = {case.id: case for case in collect(bench, setup.scope.beside(name))}
            say({"note": ""})
            say({"outcome": asdict(run_case(cases[name], bench))})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
