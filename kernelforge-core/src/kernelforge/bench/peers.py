"""Other implementations of a matrix product, timed beside ours: same sizes, same threads, in turn, in the same run."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any, Protocol

from kernelforge.backend import Timing
from kernelforge.errors import AssetError, KernelForgeWarning, UsageError
from kernelforge.registry import lookup

PEER_PYTHON = "KERNELFORGE_PEER_PYTHON"
"""Environment variable: the Python interpreter of an environment with the peers that are not ours to install."""

_START_S = 120.0
"""Importing a large library from a cold disk."""
_ANSWER_S = 600.0


class Peer(Protocol):
    """A matrix product of someone else's."""

    version: str
    computes: str
    """The dtype of its operands: a peer without mixed products takes both in one."""

    def run(self, repeats: int) -> Timing: ...

    def close(self) -> None: ...


class NumpyPeer:
    """`numpy.matmul` in this process, limited to `threads`; weights of smaller types are widened to f32 beforehand."""

    def __init__(self, m: int, n: int, k: int, dtype: str, threads: int) -> None:
        import numpy as np

        from kernelforge.dtype import to_numpy

        rng = np.random.default_rng(0)
        self.version = np.__version__
        self.computes = "f64" if dtype == "f64" else "f32"
        work = to_numpy(self.computes)
        self._operands = rng.standard_normal((m, k)).astype(work), rng.standard_normal((k, n)).astype(work)
        self._out = np.empty((m, n), work)
        self._limit = _thread_limit(threads)

    def run(self, repeats: int) -> Timing:
        import numpy as np

        samples = []
        with self._limit():
            for _ in range(repeats):
                start = time.perf_counter()
                np.matmul(*self._operands, out=self._out)
                samples.append(time.perf_counter() - start)
        return Timing(tuple(samples), "host-clock")

    def close(self) -> None:
        """Nothing is held."""


def _thread_limit(threads: int) -> Callable[[], AbstractContextManager[object]]:
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        message = "threadpoolctl is not installed: numpy uses as many threads as it likes (pip install threadpoolctl)"
        warnings.warn(message, KernelForgeWarning, stacklevel=3)
        return nullcontext

    def limit() -> AbstractContextManager[object]:
        entered: AbstractContextManager[object] = threadpool_limits(threads)
        return entered

    return limit


_TORCH = """
import json, sys, time

def reply(**values):
    print(json.dumps(values), flush=True)

try:
    import torch
except Exception as error:
    reply(error=f"{type(error).__name__}: {error}")
    sys.exit()
setup = json.loads(sys.argv[1])
torch.set_num_threads(setup["threads"])
dtype = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[setup["dtype"]]
with torch.no_grad():
    a = torch.randn(setup["m"], setup["k"]).to(dtype)
    b = torch.randn(setup["k"], setup["n"]).to(dtype)
    out = torch.empty(setup["m"], setup["n"], dtype=dtype)
    reply(version=torch.__version__)
    for line in sys.stdin:
        samples = []
        for _ in range(json.loads(line)["repeats"]):
            start = time.perf_counter()
            torch.matmul(a, b, out=out)
            samples.append(time.perf_counter() - start)
        reply(samples=samples)
"""


class TorchPeer:
    """`torch.matmul` in a process of the interpreter that KERNELFORGE_PEER_PYTHON names; both operands are of
    `dtype`.

    The process answers one JSON line `{"samples": [seconds, ...]}` to each line `{"repeats": n}`, and ends with its
    input.
    """

    def __init__(self, m: int, n: int, k: int, dtype: str, threads: int) -> None:
        python = os.environ.get(PEER_PYTHON)
        if not python:
            raise UsageError(
                f"the peer 'torch' needs {PEER_PYTHON}",
                hint=f"set {PEER_PYTHON} to the Python interpreter of an environment with torch",
            )
        self.computes = dtype
        self._python = python
        setup = json.dumps({"m": m, "n": n, "k": k, "dtype": dtype, "threads": threads})
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            self._process = subprocess.Popen(
                [python, "-c", _TORCH, setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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
        self.version = str(self._answer(_START_S)["version"])

    def run(self, repeats: int) -> Timing:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"repeats": repeats}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise AssetError(f"the peer 'torch' is gone: {error.strerror or error}") from None
        return Timing(tuple(self._answer(_ANSWER_S)["samples"]), "host-clock")

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
            hint = f"{PEER_PYTHON} names {self._python}; torch must be installed there"
            raise AssetError(f"the peer 'torch' failed: {answer['error']}", hint=hint)
        return answer


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


PEERS: dict[str, Callable[[int, int, int, str, int], Peer]] = {"numpy": NumpyPeer, "torch": TorchPeer}


def open_peer(name: str, m: int, n: int, k: int, dtype: str, threads: int) -> Peer:
    """A peer, warm; to be closed. Raises UsageError for an unknown name, AssetError when it cannot be had."""
    return lookup("peer", PEERS, name)(m, n, k, dtype, threads)
