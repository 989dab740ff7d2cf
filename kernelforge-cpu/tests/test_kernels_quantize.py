"""`quantize` of activations: the reference's bits, for every kind of number, width and layout."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import DEFS, Kernels, problem, verdict

from kernelforge.dtype import to_numpy
from kernelforge.quant import Array, dequantize, quantize
from kernelforge.variant import Reject
from kernelforge_cpu.isa import host_targets

FORMAT = "q8a"


def numbers(shape: tuple[int, ...]) -> Array:
    """Groups of every scale, with halves to round, zeros, subnormals, infinities and NaN."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.float32(2.0) ** rng.integers(-140, 120, (*shape[:-1], 1)).astype(np.float32)
    flat = x.reshape(-1, 32)
    flat[0] = np.arange(32) * 0.5
    flat[0, 31] = 127.0
    flat[1 % len(flat)] = 0.0
    flat[2 % len(flat), 7] = np.inf
    flat[3 % len(flat), 31] = np.nan
    flat[4 % len(flat), 0] = -np.inf
    flat[5 % len(flat)] = np.float32(1e-40)
    flat[6 % len(flat)] = -np.float32(3e38)
    return x


@pytest.mark.parametrize("target", host_targets(), ids=lambda t: t.level)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_bits_of_the_reference(target, dtype: str) -> None:  # type: ignore[no-untyped-def]
    p = problem("quantize", f"{dtype}[n,96]", format=FORMAT)
    kernels = Kernels([p], target)
    for n in (0, 1, 5, 33):
        with np.errstate(all="ignore"):
            x = numbers((n, 96)).astype(to_numpy(dtype)) if n else np.zeros((0, 96), to_numpy(dtype))
        for parts in (1, 3):
            (got,) = kernels.run(p, [x], {"n": n}, parts)
            assert got.tobytes() == quantize(x, FORMAT).tobytes()


def test_strided_rows_and_batches() -> None:
    p = problem("quantize", "f32[3,5,64]:[999,100,1]", format=FORMAT)
    Kernels([p]).check(p)


@pytest.mark.parametrize("target", host_targets(), ids=lambda t: t.level)
@pytest.mark.parametrize("x", ["f32[n,96]", "f32[n,3,32]:[200,64,1]", "bf16[n,64]"])
def test_a_norm_in_8_bits_has_the_bits_of_the_norm_quantised(target, x: str) -> None:  # type: ignore[no-untyped-def]
    width = x.partition("]")[0].rpartition(",")[2]
    whole = problem("rms_norm_quantize", x, f"f32[{width}]")
    norm = problem("rms_norm", x.replace("bf16", "f32"), f"f32[{width}]")
    kernels = Kernels([whole, norm], target)
    for n in (0, 1, 33):
        static = whole.with_dims({"n": n})
        arrays = DEFS["rms_norm_quantize"].make_inputs(static, np.random.default_rng(n))
        if n == 33 and arrays[0] is not None:
            arrays[0][5].flat[3], arrays[0][7].flat[2] = np.nan, np.inf
        wide = [np.asarray(arrays[0]).astype(np.float32), arrays[1]]  # in bf16 the norm would be rounded on the way
        for parts in (1, 2, 7):
            with np.errstate(all="ignore"):
                (normed,) = kernels.run(norm, wide, {"n": n}, parts)
                want = quantize(normed, FORMAT)
            assert kernels.run(whole, arrays, {"n": n}, parts)[0].tobytes() == want.tobytes()


def test_the_rule() -> None:
    """Halves to even, one scale a group, NaN throughout a group with one, sums of the values."""
    x = np.zeros((1, 96), np.float32)
    x[0, :4] = 127.0, 0.5, 1.5, -2.5
    x[0, 40] = np.nan
    x[0, 64:] = 1e-40
    groups = quantize(x, FORMAT)
    assert groups["scale"][0, 0] == 1.0
    assert groups["values"][0, 0, :4].tolist() == [127, 0, 2, -2]
    assert groups["zeros"][0, 0].tolist() == [8 * 127, 0]
    back = dequantize(groups)
    assert np.isnan(back[0, 32:64]).all()
    assert (back[0, 64:] == 0).all()


def test_formats_of_weights_are_not_computed_by_kernels() -> None:
    found = verdict(problem("quantize", "f32[3,64]", format="q4"))
    assert found == Reject("makes q8a; q4 is computed when a module is compiled")
