from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kernelforge.problem import Problem, TensorType
from kernelforge.registry import default_registry
from kernelforge.variant import Accept, DeviceInfo, KernelVariant, Reject

DEVICE = DeviceInfo("cpu", "any", "any")


@pytest.fixture
def variant() -> KernelVariant:
    return default_registry().variant("cpu", "transformer.silu", "blockwise")


def silu(*shape: int | str, dtype: str = "f32") -> Problem:
    return Problem("transformer.silu", (TensorType(shape, dtype),), (TensorType(shape, dtype),))


def test_where_it_comes_from(variant: KernelVariant) -> None:
    assert str(variant.provenance) == "blockwise (kernelforge-example-blockwise 0.1.0)"


def test_what_it_takes(variant: KernelVariant) -> None:
    assert variant.judge(silu(3, 5), DEVICE) == Accept()
    assert variant.judge(silu("tokens", 5), DEVICE) == Reject("wants packed static f32, not f32[tokens,5]")
    assert variant.judge(silu(3, 5, dtype="f16"), DEVICE) == Reject("wants packed static f32, not f16[3,5]")


@pytest.mark.parametrize("size", [1, 4095, 4097, 40000])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_part_does_its_share(variant: KernelVariant, size: int, parts: int) -> None:
    problem = silu(size)
    for config in variant.config_space(problem, DEVICE):
        kernel = variant.build_kernel(problem, config, DEVICE)
        x = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 20
        out = np.full(size, np.nan, np.float32)
        buffers = (ctypes.c_void_p * 2)(x.ctypes.data, out.ctypes.data)
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        for part in range(parts):
            call(kernel.phases[0].function)(ctypes.addressof(buffers), None, part, parts)
        wide = x.astype(np.float64)
        np.testing.assert_allclose(out, wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-30)
