"""The error model, and the comparison that follows it."""

from __future__ import annotations

import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge.plugins import core_registry
from kernelforge.problem import Problem, TensorType, parse_tensor_type
from kernelforge.quant import quantize, widened
from kernelforge.tolerance import Mismatch, compare, condition, expect, roundings

Array = np.ndarray[Any, np.dtype[Any]]
OPS = core_registry().ops
BF16 = np.dtype(ml_dtypes.bfloat16)


def matmul(m: int, n: int, k: int, dtype: str = "f32") -> Problem:
    return OPS["transformer.matmul"].problem([TensorType((m, k), dtype), TensorType((k, n), dtype)], {})


def test_the_condition_of_a_product_is_the_sum_of_the_magnitudes() -> None:
    problem, op = matmul(20, 30, 200), OPS["transformer.matmul"]
    arrays = op.make_inputs(problem, np.random.default_rng(1))
    lhs, rhs = arrays[:2]
    assert lhs is not None
    assert rhs is not None
    (found,) = condition(problem, op, arrays, op.compute(problem, arrays))
    true = 2 * np.abs(lhs).astype(np.float64) @ np.abs(rhs)  # both operands are changed
    assert 0.7 < np.median(found / true) < 1.6
    assert np.mean(found < true / 30) < 1e-3


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("k", [1, 64, 4096])
def test_f32_sums_are_right_and_narrower_ones_are_not(dtype: str, k: int) -> None:
    problem, op = matmul(8, 9, k, dtype), OPS["transformer.matmul"]
    arrays = op.make_inputs(problem, np.random.default_rng(k))
    lhs, rhs = (np.asarray(a).astype(np.float32) for a in arrays[:2])
    (want,) = expect(problem, op, arrays)
    kind = np.asarray(arrays[0]).dtype
    assert compare((lhs @ rhs).astype(kind), want.exact, want.allowed, dtype, "x") >= 0
    if k < 64:
        return
    narrow = np.zeros((8, 9), np.float16)
    for i in range(k):
        narrow += (lhs[:, i, None] * rhs[None, i]).astype(np.float16)
    with pytest.raises(Mismatch, match="tolerated"):
        compare(narrow.astype(kind), want.exact, want.allowed, dtype, "x")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_subnormal_operands_count_as_zeros_where_a_target_says_so(dtype: str) -> None:
    problem, op = matmul(8, 9, 33, dtype), OPS["transformer.matmul"]
    lhs, rhs, *rest = op.make_inputs(problem, np.random.default_rng(0))
    assert lhs is not None
    tiny = (lhs.astype(np.float64) * 2.0**-128).astype(lhs.dtype)
    (strict,), (loose,) = (expect(problem, op, [tiny, rhs, *rest], flushes=f) for f in (False, True))
    flushed = np.zeros((8, 9), lhs.dtype)
    assert compare(flushed, loose.exact, loose.allowed, dtype, "x") > 0
    assert compare(loose.exact.astype(lhs.dtype), loose.exact, loose.allowed, dtype, "x") >= 0
    with pytest.raises(Mismatch, match="tolerated"):
        compare(flushed, strict.exact, strict.allowed, dtype, "x")
    with pytest.raises(Mismatch, match="tolerated"):
        compare((8 * loose.exact).astype(lhs.dtype), loose.exact, loose.allowed, dtype, "x")
    (normal,), (same,) = (expect(problem, op, [lhs, rhs, *rest], flushes=f) for f in (False, True))
    assert np.array_equal(normal.allowed, same.allowed)


def test_every_reference_is_within_its_own_tolerance() -> None:
    for op in OPS.values():
        for problem in op.samples(random.Random(0)):
            sizes = [t.size() for t in (*problem.operands, *problem.results) if t is not None]
            if sum(sizes) > 20_000:
                continue
            arrays = op.make_inputs(problem, np.random.default_rng(2))
            pairs = zip(op.evaluate(problem, arrays), expect(problem, op, arrays), problem.results, strict=True)
            for got, want, t in pairs:
                compare(got, want.exact, want.allowed, t.dtype, str(problem))


def test_moved_values_must_be_the_same_bits() -> None:
    op = OPS["transformer.cast"]
    problem = op.problem([TensorType((2,), "f32")], {"dtype": "f32"})
    assert roundings(problem, op, 0).result == 0.0
    zeros = np.array([0.0, -0.0], np.float32)
    (want,) = expect(problem, op, [zeros])
    compare(zeros, want.exact, want.allowed, "f32", "x")
    with pytest.raises(Mismatch, match=r"x has 0 at \[1\] where the reference has -0"):
        compare(np.abs(zeros), want.exact, want.allowed, "f32", "x")


def test_numbers_of_a_quantised_result_are_within_half_a_step() -> None:
    """Of values that are computed and then quantised; what is only quantised must have the reference's bits."""
    op = OPS["transformer.rope_cache_update"]
    problem = next(p for p in op.samples(random.Random(0)) if p.results[1].dtype == "q8")
    arrays = op.make_inputs(problem, np.random.default_rng(2))
    want = expect(problem, op, arrays)[1]
    right = op.evaluate(problem, arrays)[1]
    shape = want.exact.shape
    compare(right, want.exact, want.allowed, "q8", "x")
    groups = want.exact.reshape(-1, 32)
    scale = np.abs(groups).max(axis=1) / 127
    cut = right.copy()
    cut["values"] = np.trunc(groups / np.where(scale, scale, 1)[:, None]).reshape(*right.shape, 32)
    other = right.copy()
    other["scale"] *= np.float16(1.01)
    for wrong in (cut, other):
        with pytest.raises(Mismatch, match="tolerated"):
            compare(wrong, want.exact, want.allowed, "q8", "x")
    with pytest.raises(Mismatch, match="the reference gives q8"):
        compare(right[..., :1], want.exact.reshape(shape), want.allowed, "q8", "x")


def test_nan_comes_first() -> None:
    exact = np.array([np.nan, 1.0, np.inf])
    compare(np.array([np.nan, 1.0, np.inf], np.float32), exact, 0.5, "f32", "x")
    for wrong in ([1.0, 1.0, np.inf], [np.nan, np.nan, np.inf], [np.nan, 1.0, -np.inf], [np.nan, 1.0, 3e38]):
        with pytest.raises(Mismatch) as raised:
            compare(np.array(wrong, np.float32), exact, 0.5, "f32", "x")
        assert raised.value.kind == "wrong-values"


@pytest.mark.parametrize(("exact", "got"), [(65519.0, np.inf), (65530.0, 65504.0), (-65519.0, -np.inf)])
def test_what_may_overflow_may_be_infinite_or_not(exact: float, got: float) -> None:
    compare(np.array([got], np.float16), np.array([exact]), 40.0, "f16", "x")
    with pytest.raises(Mismatch, match="where the reference has"):
        compare(np.array([-got], np.float16), np.array([exact]), 40.0, "f16", "x")


def test_subnormal_results_may_be_flushed_except_in_f16() -> None:
    op = OPS["transformer.mul"]
    for dtype, small, flushed in (("f32", 1e-39, True), ("bf16", 1e-39, True), ("f16", 1e-6, False)):
        t = TensorType((1,), dtype)
        problem = op.problem([t, t], {})
        kind = {"f32": np.dtype(np.float32), "bf16": BF16, "f16": np.dtype(np.float16)}[dtype]
        arrays = [np.array([small]).astype(kind), np.array([1.0]).astype(kind)]
        (want,) = expect(problem, op, arrays)
        zero = np.zeros(1, kind)
        if flushed:
            compare(zero, want.exact, want.allowed, dtype, "x")
        else:
            with pytest.raises(Mismatch):
                compare(zero, want.exact, want.allowed, dtype, "x")


def test_a_shape_and_a_dtype_have_kinds_of_their_own() -> None:
    exact = np.ones(2)
    with pytest.raises(Mismatch, match=r"x is float32\[3\], the reference gives float32\[2\]") as raised:
        compare(np.ones(3, np.float32), exact, 1.0, "f32", "x")
    assert raised.value.kind == "wrong-shape"
    with pytest.raises(Mismatch, match=r"x is float64\[2\], the reference gives float32\[2\]") as raised:
        compare(np.ones(2), exact, 1.0, "f32", "x")
    assert raised.value.kind == "wrong-dtype"


def test_a_factor_widens_the_tolerance() -> None:
    problem, op = matmul(2, 2, 8), OPS["transformer.matmul"]
    arrays = op.make_inputs(problem, np.random.default_rng(0))
    (one,), (four,) = (expect(problem, op, arrays, factor=factor) for factor in (1.0, 4.0))
    np.testing.assert_allclose(four.allowed, 4 * one.allowed, rtol=1e-6)


def test_gelu_may_be_a_difference() -> None:
    """x/2 + x/2 erf has no relative precision far below 0."""
    op = OPS["transformer.gelu"]
    problem = op.problem([TensorType((1,), "f32")], {})
    arrays = [np.array([-5.0], np.float32)]
    (want,) = expect(problem, op, arrays)
    assert want.allowed[0] > 5 * 2.0**-24
    assert op.magnitudes(problem, arrays) is not None
    assert OPS["transformer.add"].magnitudes(problem, arrays) is None


def normed_in_f32(x: Array, gain: Array) -> Array:
    """With sums in another order than the reference's, and a root that is some roundings off."""
    mean = np.cumsum(x * x, axis=-1, dtype=np.float32)[..., -1:] / np.float32(x.shape[-1])
    return np.asarray(x * (np.float32(1 - 2.0**-22) / np.sqrt(mean + np.float32(1e-5))) * gain)


@pytest.mark.parametrize("gated", [False, True])
def test_numbers_between_two_steps_of_8_bits_may_become_either(gated: bool) -> None:
    op = OPS["transformer.rms_norm_quantize_glu_matmul" if gated else "transformer.rms_norm_quantize_matmul"]
    product = OPS["transformer.glu_matmul" if gated else "transformer.matmul"]
    moved = 0
    for seed in range(4):
        types = ["f32[40,64]", "f32[64]", "q4[33,64]", *["q4[33,64]"] * gated]
        problem = op.problem([parse_tensor_type(t) for t in types], {} if gated else {"epilogue": "gelu"})
        arrays = op.make_inputs(problem, np.random.default_rng(seed))
        x, gain, *weights = arrays
        assert x is not None
        assert gain is not None
        x[...], gain[...] = np.random.default_rng(seed).integers(-4, 5, x.shape), 1.1  # many become 63.5
        codes = quantize(normed_in_f32(x, gain), "q8a")
        exact = widened(x) / np.sqrt(np.mean(widened(x) ** 2, axis=-1, keepdims=True) + 1e-5) * widened(gain)
        moved += int((codes["values"] != quantize(exact, "q8a")["values"]).sum())
        inner = product.problem([parse_tensor_type("q8a[40,64]"), *problem.operands[2:]], attrs_of(problem))
        (got,) = product.evaluate(inner, [codes, *weights])
        (want,) = expect(problem, op, arrays)
        compare(got, want.exact, want.allowed, "f32", "y")
    assert moved


def attrs_of(problem: Problem) -> dict[str, Any]:
    return {name: value for name, value in problem.attrs if name != "eps"}


def test_other_numbers_may_not() -> None:
    op, product = (OPS[f"transformer.{name}"] for name in ("rms_norm_quantize_matmul", "matmul"))
    types = ["f32[5,64]", "f32[64]", "q8[33,64]"]
    problem = op.problem([parse_tensor_type(t) for t in types], {})
    arrays = op.make_inputs(problem, np.random.default_rng(0))
    x, gain, rhs, *others = arrays
    assert x is not None
    assert gain is not None
    codes = quantize(normed_in_f32(x, gain), "q8a")
    inner = product.problem([parse_tensor_type("q8a[5,64]"), *problem.operands[2:]], attrs_of(problem))
    (want,) = expect(problem, op, arrays)
    (got,) = product.evaluate(inner, [codes, rhs, *others])
    compare(got, want.exact, want.allowed, "f32", "y")
    codes["values"][3, 1, 7] -= 1
    (got,) = product.evaluate(inner, [codes, rhs, *others])
    with pytest.raises(Mismatch, match="tolerated"):
        compare(got, want.exact, want.allowed, "f32", "y")


def test_a_group_that_is_spoilt_spoils_its_row_alone() -> None:
    op = OPS["transformer.rms_norm_quantize_matmul"]
    problem = op.problem([parse_tensor_type(t) for t in ("f32[5,64]", "f32[64]", "q8[33,64]")], {})
    arrays = op.make_inputs(problem, np.random.default_rng(0))
    x = arrays[0]
    assert x is not None
    x[1, 3], x[2, 4] = np.nan, np.inf
    (want,) = expect(problem, op, arrays)
    (got,) = op.evaluate(problem, arrays)
    assert np.isnan(got).all(axis=1).tolist() == [False, True, True, False, False]
    compare(got, want.exact, want.allowed, "f32", "y")
