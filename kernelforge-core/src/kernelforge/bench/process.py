"""A peer in a process of another Python environment, asked through JSON lines, so that it can be timed in turn with ours."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping
from typing import IO, Any

from kernelforge.errors import AssetError, UsageError

PEER_PYTHON = "KERNELFORGE_PEER_PYTHON"
"""Environment variable: the Python interpreter of an environment with the peers that are not ours to install."""

_START_S = 300.0
"""Importing a large library from a cold disk."""
_ANSWER_S = 600.0


class PeerProcess:
    """A script run by the interpreter that KERNELFORGE_PEER_PYTHON names, with `setup` as its JSON argument.

    It prints one JSON object when it is ready and one for each line it reads, `{"error": ...}` when it fails, and ends with
    its input. Raises UsageError when the variable is not set, AssetError when the process cannot be started or fails.
    """

    def __init__(self, name: str, script: str, setup: Mapping[str, Any], threads: int) -> None:
        python = os.environ.get(PEER_PYTHON)
        if not python:
            raise UsageError(
                f"the peer '{name}' needs {PEER_PYTHON}",
                hint=f"set {PEER_PYTHON} to the Python interpreter of an environment with {name}",
            )
        self._name, self._python = name, python
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            self._process = subprocess.Popen(
                [python, "-c", script, json.dumps(dict(setup))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            reason = error.strerror or error
            raise AssetError(
                f"{PEER_PYTHON}={python} cannot be started: {reason}", hint="name a Python interpreter"
            ) from None
        self._lines: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
        self._reader.start()
        self.greeting = self._answer(_START_S)
        """What it printed when it was ready."""

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises AssetError when there is none, or it is an error."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(question)) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise AssetError(f"the peer '{self._name}' is gone: {error.strerror or error}") from None
        return self._answer(_ANSWER_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
            answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended with {self._process.wait()}"}
        except queue.Empty:
            answer = {"error": f"no answer within {timeout:g} s"}
        except ValueError:
            answer = {"error": f"answered {line!r}"}
        if "error" in answer:
            self.close()
            hint = f"{PEER_PYTHON} names {self._python}; {self._name} must be installed there"
            raise AssetError(f"the peer '{self._name}' failed: {answer['error']}", hint=hint)
        return answer


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")
