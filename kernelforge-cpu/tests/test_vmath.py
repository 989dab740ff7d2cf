"""The error bounds that vmath states, over a dense sweep of the f32 range, at each level of this machine."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernelforge_cpu import vmath
from kernelforge_cpu.emit import Builder, KernelBuilder, Value, module_text
from kernelforge_cpu.isa import CpuTarget, host_targets
from kernelforge_cpu.jit import KERNEL, Library, compile_object, load

Array = np.ndarray[Any, np.dtype[Any]]
Write = Callable[[Builder, Value], Value]


def within_turns(x: Array) -> Array:
    return np.where(np.abs(x) <= vmath.TURNS_LIMIT, x, np.nan)


SMALLEST_NORMAL = 2.0**-126
BOUNDS: dict[str, tuple[Write, Callable[[Array], Array], float]] = {
    "exp": (vmath.exp, np.exp, 2.0),
    "exp_decay": (lambda k, x: vmath.exp_decay(k, -k.abs(x)), lambda x: np.exp(-abs(x)), 2.0),
    "tanh": (vmath.tanh, np.tanh, 3.0),
    "sigmoid": (vmath.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3.0),
    "silu": (vmath.silu, lambda x: x / (1 + np.exp(-x)), 3.0),
    "erf": (vmath.erf, np.vectorize(math.erf), 2.0),
    "sin": (vmath.sin, lambda x: np.sin(within_turns(x)), 3.0),
    "cos": (vmath.cos, lambda x: np.cos(within_turns(x)), 3.0),
}


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def library(request: pytest.FixtureRequest) -> Library:
    """All functions as kernels of one object; the scalar forms are `<name>_scalar`."""
    target: CpuTarget = request.param
    kernels = []
    for name, (write, _, _) in BOUNDS.items():
        for suffix, lanes in (("", target.lanes), ("_scalar", 0)):
            k = KernelBuilder(name + suffix, target)
            x, y = k.buffer(0, "f32"), k.buffer(1, "f32")
            with k.for_(0, k.dim(0), lanes or 1) as loop:
                y.store(write(k, x.load(loop.i, lanes)), loop.i)
            kernels.append(k)
    return load([compile_object(module_text(*kernels), cpu=target)])


def call(library: Library, symbol: str, x: Array) -> Array:
    y = np.empty_like(x)
    buffers, dims = (ctypes.c_void_p * 2)(x.ctypes.data, y.ctypes.data), (ctypes.c_int64 * 1)(len(x))
    KERNEL(library.address(symbol))(ctypes.addressof(buffers), ctypes.addressof(dims), 0, 1)
    return y


@pytest.fixture(scope="module")
def sweep() -> Array:
    """Every 16411th bit pattern, and dense stretches where the functions have their features."""
    patterns = np.arange(0, 2**32, 16411, dtype=np.uint64).astype(np.uint32).view(np.float32)
    stretches = [np.linspace(a, b, 40_000, dtype=np.float32) for a, b in ((-105, 90), (-1.5, 1.5), (-6, 6), (-89, -86))]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 88.72283, 88.72284, -103.97, -103.98, -104, 89], np.float32)
    quarters = (np.arange(5217) * (np.pi / 2)).astype(np.float32)  # where sines and cosines are hardest: at their zeros
    around = [np.nextafter(quarters, np.float32(limit)) for limit in (-np.inf, np.inf)]
    limits = np.array([8192, np.nextafter(np.float32(8192), np.float32(np.inf))], np.float32)
    turns = np.concatenate([np.linspace(0, 8192, 60_000, dtype=np.float32), quarters, *around, limits])
    x = np.concatenate([patterns, *stretches, turns, -turns, special])
    return x[len(x) % 16 :]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("suffix", ["", "_scalar"])
def test_error_bound(library: Library, sweep: Array, name: str, suffix: str) -> None:
    _, reference, bound = BOUNDS[name]
    with np.errstate(all="ignore"):
        exact = reference(sweep.astype(np.float64))
        want = exact.astype(np.float32)
    got = call(library, name + suffix, sweep)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    normal = finite & (np.abs(exact) >= SMALLEST_NORMAL)
    if name == "silu":
        normal &= sweep > -88.7
        np.testing.assert_allclose(got[finite & ~normal], exact[finite & ~normal], rtol=0, atol=3e-37)
    elif name == "exp_decay":
        normal &= np.abs(sweep) <= 87
        assert not got[finite & ~normal].any()
    elif name == "exp":
        np.testing.assert_allclose(got[finite & ~normal], exact[finite & ~normal], rtol=0, atol=2.0**-149)
    ulps = np.abs(got[normal].astype(np.float64) - exact[normal]) / np.spacing(np.abs(want[normal])).astype(np.float64)
    worst = int(ulps.argmax())
    assert ulps[worst] <= bound, (
        f"{name}({sweep[normal][worst]!r}) = {got[normal][worst]!r}, exactly {exact[normal][worst]!r}"
    )


@pytest.mark.parametrize("name", ["tanh", "erf", "sin"])
def test_zeros_keep_their_sign(library: Library, name: str) -> None:
    got = call(library, name, np.array([0.0, -0.0] * 8, np.float32))
    assert np.signbit(got).tolist() == [False, True] * 8
