from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernelforge.dialects.transformer.elementwise import ADD, CAST, GELU, MUL, SILU
from kernelforge.dtype import from_numpy, to_numpy
from kernelforge.op import UNKNOWN, OpDef
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]

VALUES = np.concatenate([np.linspace(-12, 12, 97), [-1e3, -40.0, -1e-9, 0.0, 1e-9, 40.0, 1e3]])


def run(op: OpDef, *arrays: Array, **attrs: Attr) -> Array:
    problem = op.problem([TensorType(a.shape, from_numpy(a.dtype)) for a in arrays], attrs)
    (out,) = op.evaluate(problem, arrays)
    assert (out.shape, from_numpy(out.dtype)) == (problem.results[0].shape, problem.results[0].dtype)
    return out


def test_silu() -> None:
    want = [x / (1 + math.exp(-x)) if x > -700 else 0.0 for x in VALUES]
    np.testing.assert_allclose(run(SILU, VALUES), want, rtol=1e-14, atol=1e-300)


def test_gelu_is_exact() -> None:
    want = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in VALUES]
    np.testing.assert_allclose(run(GELU, VALUES), want, rtol=1e-14, atol=1e-14)
    tail = np.array([-8.0, -20.0, -37.0])
    np.testing.assert_allclose(run(GELU, tail), [0.5 * x * math.erfc(-x / math.sqrt(2)) for x in tail], rtol=1e-13)


def test_gelu_by_tanh() -> None:
    want = [0.5 * x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) for x in VALUES]
    np.testing.assert_allclose(run(GELU, VALUES, approximate="tanh"), want, rtol=1e-14, atol=1e-14)
    assert 1e-4 < np.abs(run(GELU, VALUES) - run(GELU, VALUES, approximate="tanh")).max() < 1e-3


@pytest.mark.parametrize("op", [SILU, GELU])
def test_activations_keep_nan_and_shape(op: OpDef) -> None:
    assert np.isnan(run(op, np.array(np.nan)))
    assert run(op, np.zeros((2, 0, 3), np.float32)).shape == (2, 0, 3)


@pytest.mark.parametrize(("op", "ufunc"), [(ADD, np.add), (MUL, np.multiply)])
@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((2, 1, 5), (3, 1)), ((), (2, 2)), ((2, 2), ()), ((1,), (0,))],
)
def test_broadcasting_is_numpys(op: OpDef, ufunc: np.ufunc, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(a), rng.standard_normal(b)
    np.testing.assert_array_equal(run(op, x, y), ufunc(x, y))


def test_the_result_has_the_type_of_a() -> None:
    a, b = np.ones(3, ml_dtypes.bfloat16), np.full(3, 0.001, np.float32)
    assert run(ADD, a, b).dtype == a.dtype
    np.testing.assert_array_equal(run(ADD, b, a), np.full(3, 1.001, np.float32))


def test_broadcasting_of_dynamic_dimensions() -> None:
    def shape(a: tuple[int | str, ...], b: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return ADD.problem([TensorType(a, "f32"), TensorType(b, "f32")], {}).results[0].shape

    assert shape(("tokens", 8), (8,)) == ("tokens", 8)
    assert shape((1, 8), ("tokens", 8)) == ("tokens", 8)
    assert shape((UNKNOWN, 8), (4, 8)) == (4, 8)
    assert shape((UNKNOWN, 8), (1, 8)) == (UNKNOWN, 8)


@pytest.mark.parametrize("source", ["f32", "bf16", "f16", "f64", "i32"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64", "i32"])
def test_cast(source: str, dtype: str) -> None:
    x = (np.arange(-8, 9) * (0.0 if source == "i32" else 1.3) + np.arange(17)).astype(to_numpy(source))
    np.testing.assert_array_equal(run(CAST, x, dtype=dtype), x.astype(to_numpy(dtype)))


def test_cast_rounds_to_nearest_even() -> None:
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 65520.0, -np.inf, np.nan], np.float32)
    out = run(CAST, x, dtype="bf16").astype(np.float32)
    np.testing.assert_array_equal(out, np.array([1.0, 1 + 2**-6, 65536.0, -np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(run(CAST, np.array([2.7, -2.7], np.float32), dtype="i32"), [2, -2])


def test_costs() -> None:
    x, row = TensorType((3, 8), "f32"), TensorType((8,), "f32")
    add = ADD.problem_cost(ADD.problem([x, row], {}))
    assert (add.flops, add.bytes) == (24, 96 + 32 + 96)
    cast = CAST.problem_cost(CAST.problem([x], {"dtype": "bf16"}))
    assert (cast.flops, cast.bytes) == (0, 96 + 48)
    exact, tanh = (GELU.problem_cost(GELU.problem([x], {"approximate": a})) for a in ("none", "tanh"))
    assert exact.flops != tanh.flops
    assert SILU.problem_cost(SILU.problem([x], {})).bytes == 192
