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

HOST = "cpu"
"""The device of peers that compute on the processor."""

_TRIALS = 5
"""Runs in which a peer finds out the quickest of the forms that its operands can have."""


class Peer(Protocol):
    """A matrix product of someone else's. A peer may be loaded with one problem after the other."""

    version: str
    device: str
    """What computes, as the peer calls it: "cpu", "cuda"."""

    def load(self, m: int, n: int, k: int, dtype: str) -> str:
        """Make operands for [m,k] @ dtype[k,n]. Returns the dtype it computes in: a peer without mixed products takes both
        operands in one."""
        ...

    def run(self, repeats: int) -> Timing: ...

    def close(self) -> None: ...


class NumpyPeer:
    """`numpy.matmul` in this process, limited to `threads`; weights of smaller types are widened to f32 beforehand, and stored
    by rows or by columns, whichever is quicker."""

    device = HOST

    def __init__(self, threads: int) -> None:
        import numpy as np

        self.version = np.__version__
        self._limit = _thread_limit(threads)

    def load(self, m: int, n: int, k: int, dtype: str) -> str:
        import numpy as np

        from kernelforge.dtype import to_numpy

        rng = np.random.default_rng(0)
        computes = "f64" if dtype == "f64" else "f32"
        work = to_numpy(computes)
        self._lhs, rhs = rng.standard_normal((m, k)).astype(work), rng.standard_normal((k, n)).astype(work)
        self._out = np.empty((m, n), work)
        times = {}
        for order, stored in (("C", rhs), ("F", np.asfortranarray(rhs))):
            self._rhs = stored
            times[order] = min(self.run(_TRIALS).samples), stored
        self._rhs = min(times.values(), key=lambda found: found[0])[1]
        return computes

    def run(self, repeats: int) -> Timing:
        import numpy as np

        samples = []
        with self._limit():
            for _ in range(repeats):
                start = time.perf_counter()
                np.matmul(self._lhs, self._rhs, out=self._out)
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
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEVICE = setup["device"]
if DEVICE == "cuda" and not torch.cuda.is_available():
    reply(error="torch sees no CUDA device")
    sys.exit()

def forms(m, n, k, dtype):
    place = {} if DEVICE == "cpu" else {"device": DEVICE}
    a, b = torch.randn(m, k, **place).to(DTYPES[dtype]), torch.randn(k, n, **place).to(DTYPES[dtype])
    out = torch.empty(m, n, dtype=DTYPES[dtype], **place)
    yield lambda: torch.matmul(a, b, out=out)
    w = b.t().contiguous()
    yield lambda: torch.nn.functional.linear(a, w)
    if DEVICE == "cpu" and torch.backends.mkldnn.is_available() and dtype != "f64":
        packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
        yield lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")

def timed(product, repeats):
    if DEVICE == "cuda":
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            start.record()
            product()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        samples.append(time.perf_counter() - start)
    return samples

reply(version=torch.__version__)
with torch.inference_mode():
    for line in sys.stdin:
        asked = json.loads(line)
        if "repeats" in asked:
            reply(samples=timed(product, asked["repeats"]))
            continue
        best = None
        for form in forms(**asked):
            try:
                seconds = min(timed(form, setup["trials"]))
            except RuntimeError:
                continue
            if best is None or seconds < best:
                best, product = seconds, form
        reply()
"""


class TorchPeer:
    """`torch` in a process of its own, both operands in one dtype: `matmul`, `linear`, or oneDNN with packed weights,
    whichever is quickest."""

    device = HOST
    source = "host-clock"

    def __init__(self, threads: int) -> None:
        setup = {"threads": threads, "trials": _TRIALS, "device": self.device}
        self._process = PeerProcess("torch", _TORCH, setup, threads)
        self.version = str(self._process.greeting["version"])

    def load(self, m: int, n: int, k: int, dtype: str) -> str:
        self._process.ask({"m": m, "n": n, "k": k, "dtype": dtype})
        return dtype

    def run(self, repeats: int) -> Timing:
        return Timing(tuple(self._process.ask({"repeats": repeats})["samples"]), self.source)

    def close(self) -> None:
        self._process.close()


class TorchCudaPeer(TorchPeer):
    """The same on the first CUDA device, by cuBLAS without TF32, timed by CUDA's events."""

    device = "cuda"
    source = "cuda-event"


PEERS: dict[str, Callable[[int], Peer]] = {"numpy": NumpyPeer, "torch": TorchPeer, "torch-cuda": TorchCudaPeer}


def open_peer(name: str, threads: int) -> Peer:
    """A peer, to be loaded and closed. Raises UsageError for an unknown name, AssetError when it cannot be had."""
    return lookup("peer", PEERS, name)(threads)
