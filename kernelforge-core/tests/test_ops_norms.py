from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer.norms import ADD_RMS_NORM, LAYER_NORM, RMS_NORM, RMS_NORM_QUANTIZE, SOFTMAX
from kernelforge.dialects.transformer.quantisation import QUANTIZE
from kernelforge.dtype import from_numpy
from kernelforge.op import OpDef
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]


def run(op: OpDef, *arrays: Array | None, **attrs: Attr) -> tuple[Array, ...]:
    types = [None if a is None else TensorType(a.shape, from_numpy(a.dtype)) for a in arrays]
    problem = op.problem(types, attrs)
    return op.evaluate(problem, [*arrays, *([None] * (len(problem.operands) - len(arrays)))])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def rms_row(row: Array, weight: Array, eps: float) -> list[float]:
    root = math.sqrt(math.fsum(v * v for v in row) / len(row) + eps)
    return [v / root * w for v, w in zip(row, weight, strict=True)]


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_rms_norm(shape: tuple[int, ...], eps: float) -> None:
    x, weight = normal(*shape), normal(7, seed=1)
    (out,) = run(RMS_NORM, x, weight, eps=eps)
    want = [rms_row(row, weight, eps) for row in x.reshape(-1, 7)]
    np.testing.assert_allclose(out.reshape(-1, 7), want, rtol=1e-13)


def test_rms_norm_of_zeros_is_zero() -> None:
    np.testing.assert_array_equal(run(RMS_NORM, np.zeros((2, 4)), np.ones(4))[0], 0.0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_layer_norm(with_bias: bool) -> None:
    x, weight, bias = 3 + 2 * normal(4, 9), normal(9, seed=1), normal(9, seed=2)
    (out,) = run(LAYER_NORM, x, weight, bias if with_bias else None, eps=1e-3)
    for row, got in zip(x, out, strict=True):
        mean = math.fsum(row) / 9
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / 9 + 1e-3)
        want = [(v - mean) / deviation * w + (b if with_bias else 0) for v, w, b in zip(row, weight, bias, strict=True)]
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_add_rms_norm_returns_the_sum_and_its_norm() -> None:
    x, residual, weight = normal(2, 3, 5), normal(2, 3, 5, seed=1), normal(5, seed=2)
    total, norm = run(ADD_RMS_NORM, x, residual, weight, eps=1e-6)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_array_equal(norm, run(RMS_NORM, x + residual, weight, eps=1e-6)[0])


@pytest.mark.parametrize("axis", [-1, 0, 1, 2, -2])
def test_softmax_along_an_axis(axis: int) -> None:
    x = 5 * normal(3, 4, 6)
    (out,) = run(SOFTMAX, x, axis=axis)
    rows, got = np.moveaxis(x, axis, -1), np.moveaxis(out, axis, -1)
    for index in np.ndindex(rows.shape[:-1]):
        exponentials = [math.exp(v) for v in rows[index]]
        want = [e / math.fsum(exponentials) for e in exponentials]
        np.testing.assert_allclose(got[index], want, rtol=1e-12)


def test_softmax_of_extreme_values() -> None:
    (out,) = run(SOFTMAX, np.array([[1e30, -1e30, 1e30], [-np.inf, 0.0, 0.0]]))
    np.testing.assert_array_equal(out, [[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]])
    assert np.isnan(run(SOFTMAX, np.array([-np.inf, -np.inf]))[0]).all()


def test_softmax_of_nothing() -> None:
    assert run(SOFTMAX, np.zeros((2, 0)))[0].shape == (2, 0)


def test_results_have_the_type_of_x() -> None:
    x, weight = normal(2, 4).astype(np.float16), np.ones(4, np.float32)
    assert run(RMS_NORM, x, weight)[0].dtype == np.float16
    assert run(LAYER_NORM, x, weight)[0].dtype == np.float16
    assert [a.dtype for a in run(ADD_RMS_NORM, x, x.astype(np.float32), weight)] == [np.float16] * 2
    assert run(SOFTMAX, x)[0].dtype == np.float16


@pytest.mark.parametrize("op", [RMS_NORM, LAYER_NORM, ADD_RMS_NORM, SOFTMAX])
def test_costs_count_every_operand_and_result_once(op: OpDef) -> None:
    x, weight = TensorType((3, 8), "f32"), TensorType((8,), "bf16")
    operands = {1: [x], 2: [x, weight], 3: [x, weight] if op is LAYER_NORM else [x, x, weight]}[len(op.operands)]
    cost = op.problem_cost(op.problem(operands, {}))
    assert cost.bytes == sum(t.nbytes() for t in operands) + 96 * len(op.results)
    assert 24 < cost.flops < 24 * 10


@pytest.mark.parametrize("odd", [0.0, np.nan, np.inf])
def test_rms_norm_in_8_bits_has_the_bits_of_the_norm_quantised(odd: float) -> None:
    x, weight = normal(40, 96).astype(np.float32), normal(96, seed=1).astype(np.float32)
    x[3, 70] = odd
    (norm,) = run(RMS_NORM, x, weight)
    (want,) = run(QUANTIZE, norm, format="q8a")
    (got,) = run(RMS_NORM_QUANTIZE, x, weight)
    assert got.tobytes() == want.tobytes()
