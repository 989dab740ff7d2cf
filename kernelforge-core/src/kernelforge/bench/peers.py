"""Other implementations of a matrix product, timed beside ours: same sizes, same threads, in turn, in the same run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from kernelforge.backend import Timing
from kernelforge.bench.process import PeerProcess
from kernelforge.errors import KernelForgeWarning
from kernelforge.registry import lookup


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
    """`torch.matmul` in a process of its own; both operands are of `dtype`."""

    def __init__(self, m: int, n: int, k: int, dtype: str, threads: int) -> None:
        self.computes = dtype
        setup = {"m": m, "n": n, "k": k, "dtype": dtype, "threads": threads}
        self._process = PeerProcess("torch", _TORCH, setup, threads)
        self.version = str(self._process.greeting["version"])

    def run(self, repeats: int) -> Timing:
        return Timing(tuple(self._process.ask({"repeats": repeats})["samples"]), "host-clock")

    def close(self) -> None:
        self._process.close()


PEERS: dict[str, Callable[[int, int, int, str, int], Peer]] = {"numpy": NumpyPeer, "torch": TorchPeer}


def open_peer(name: str, m: int, n: int, k: int, dtype: str, threads: int) -> Peer:
    """A peer, warm; to be closed. Raises UsageError for an unknown name, AssetError when it cannot be had."""
    return lookup("peer", PEERS, name)(m, n, k, dtype, threads)
