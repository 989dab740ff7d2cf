"""Compiled quantisation against that of numpy, which says what the formats are."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge import quant
from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge_cpu.folding import SOURCES, emit, quantize
from kernelforge_cpu.isa import LEVELS, CpuTarget, host_targets
from kernelforge_cpu.jit import KERNEL, compile_object, load

Array = np.ndarray[Any, np.dtype[Any]]


def groups() -> Array:
    """Rows of 32 that are normal, tiny, huge, tied, halfway between two numbers, zero; in f32."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((400, 32)).astype(np.float32)
    scaled = normal[:100] * np.float32(10) ** rng.integers(-44, 4, (100, 1)).astype(np.float32)
    ties = rng.integers(-3, 4, (200, 32)).astype(np.float32)
    halves = rng.integers(-254, 255, (200, 32)).astype(np.float32) / 2
    halves[:, 5] = 127
    eighths = rng.integers(-16, 17, (200, 32)).astype(np.float32) / 2
    eighths[:, 7] = rng.choice([-8, 8], 200)
    zeros = np.zeros((4, 32), np.float32)
    zeros[1] = -0.0
    zeros[2, 3] = np.float32(1e-45)
    return np.concatenate([normal, scaled, ties, halves, eighths, zeros])


@pytest.mark.parametrize("dtype", ["q8", "q4"])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", host_targets(), ids=lambda t: t.level)
def test_equals_numpy_bit_by_bit(target: CpuTarget, source: str, dtype: str) -> None:
    x = groups().astype(to_numpy(source))
    want = quant.quantize(x, dtype)
    made = np.zeros(want.shape, want.dtype)
    k = emit(source, dtype, target)
    library = load([compile_object(k.text(), cpu=target)])
    buffers = (ctypes.c_void_p * 2)(x.ctypes.data, made.ctypes.data)
    for part in (2, 0, 1):
        call = KERNEL(library.address(k.name))
        call(ctypes.addressof(buffers), ctypes.addressof(ctypes.c_int64(made.size)), part, 3)
    assert made.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["q8", "q4"])
@pytest.mark.parametrize("level", LEVELS)
def test_compiles_for_every_level(level: str, dtype: str) -> None:
    assert compile_object(emit("bf16", dtype, LEVELS[level]).text(), cpu=LEVELS[level])


@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_layouts_and_dtypes_of_arrays(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 4, 64)).astype(np.float32)
    for array in (x, x[::2], x.transpose(1, 0, 2), x.astype(np.float64), x[:0], x.astype(ml_dtypes.bfloat16)[0]):
        assert quantize(array, dtype).tobytes() == quant.quantize(array, dtype).tobytes()
        assert quantize(array, dtype).shape == (*array.shape[:-1], 2)


@pytest.mark.parametrize("dtype", ["q8", "q4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan, 3e38])
def test_what_cannot_be_quantised_is_refused(value: float, dtype: str) -> None:
    x = np.ones((4, 64), np.float32)
    x[2, 40] = value
    with pytest.raises(UsageError, match="cannot quantise"):
        quantize(x, dtype)
    with pytest.raises(UsageError, match="cannot quantise shape"):
        quantize(np.ones((4, 65), np.float32), dtype)
