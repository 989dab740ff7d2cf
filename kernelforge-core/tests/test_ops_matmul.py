from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer.matmul import GLU_MATMUL, MATMUL
from kernelforge.dtype import from_numpy, to_numpy
from kernelforge.op import OpDef
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]


def run(op: OpDef, *arrays: Array | None, **attrs: Attr) -> Array:
    types = [None if a is None else TensorType(a.shape, from_numpy(a.dtype)) for a in arrays]
    problem = op.problem(types, attrs)
    padded = [*arrays, *([None] * (len(problem.operands) - len(arrays)))]
    (out,) = op.evaluate(problem, padded)
    assert out.shape == problem.results[0].static_shape()
    assert from_numpy(out.dtype) == problem.results[0].dtype
    return out


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def product(lhs: Array, rhs: Array) -> Array:
    """A matrix product, one scalar at a time."""
    out = np.zeros((lhs.shape[0], rhs.shape[1]))
    for i in range(lhs.shape[0]):
        for j in range(rhs.shape[1]):
            out[i, j] = math.fsum(lhs[i, k] * rhs[k, j] for k in range(lhs.shape[1]))
    return out


def act(name: str, x: float) -> float:
    if name == "silu":
        return x / (1 + math.exp(-x))
    if name == "gelu":
        return x * 0.5 * math.erfc(-x / math.sqrt(2))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return x


@pytest.mark.parametrize("transpose_lhs", [False, True])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_product_with_transposed_operands(transpose_lhs: bool, transpose_rhs: bool) -> None:
    lhs, rhs = normal(3, 5), normal(5, 2, seed=1)
    given = (lhs.T if transpose_lhs else lhs, rhs.T if transpose_rhs else rhs)
    out = run(MATMUL, *given, transpose_lhs=transpose_lhs, transpose_rhs=transpose_rhs)
    np.testing.assert_allclose(out, product(lhs, rhs), rtol=1e-14)


@pytest.mark.parametrize("epilogue", ["none", "silu", "gelu", "gelu_tanh"])
def test_epilogue_comes_after_the_bias_and_before_the_residual(epilogue: str) -> None:
    lhs, rhs, bias, residual = normal(3, 4), normal(4, 2, seed=1), normal(2, seed=2), normal(3, 2, seed=3)
    out = run(MATMUL, lhs, rhs, bias, residual, epilogue=epilogue)
    before = product(lhs, rhs) + bias
    want = np.array([[act(epilogue, x) for x in row] for row in before]) + residual
    np.testing.assert_allclose(out, want, rtol=1e-13)


def test_residual_without_bias() -> None:
    lhs, rhs, residual = normal(3, 4), normal(4, 2, seed=1), normal(3, 2, seed=3)
    np.testing.assert_allclose(run(MATMUL, lhs, rhs, None, residual), product(lhs, rhs) + residual, rtol=1e-13)


def test_batches_have_their_own_or_share_the_right_operand() -> None:
    lhs, own, shared = normal(2, 3, 4, 5), normal(2, 3, 5, 2, seed=1), normal(5, 2, seed=2)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(run(MATMUL, lhs, own)[i, j], product(lhs[i, j], own[i, j]), rtol=1e-12)
        np.testing.assert_allclose(run(MATMUL, lhs, shared)[i, j], product(lhs[i, j], shared), rtol=1e-12)


def test_an_empty_inner_dimension_gives_zeros() -> None:
    np.testing.assert_array_equal(run(MATMUL, normal(2, 0), normal(0, 3)), np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_result_is_rounded_once_to_the_type_of_lhs(dtype: str) -> None:
    lhs = normal(3, 300).astype(to_numpy(dtype))
    rhs = normal(300, 2, seed=1).astype(np.float32)
    out = run(MATMUL, lhs, rhs)
    assert out.dtype == to_numpy(dtype)
    np.testing.assert_array_equal(out, product(lhs.astype(np.float64), rhs.astype(np.float64)).astype(out.dtype))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_gated_pair(activation: str, transpose_rhs: bool) -> None:
    x, gate, up = normal(3, 4), normal(4, 5, seed=1), normal(4, 5, seed=2)
    weights = (gate.T, up.T) if transpose_rhs else (gate, up)
    out = run(GLU_MATMUL, x, *weights, activation=activation, transpose_rhs=transpose_rhs)
    gates = np.array([[act(activation, g) for g in row] for row in product(x, gate)])
    np.testing.assert_allclose(out, gates * product(x, up), rtol=1e-12)


def test_gated_pair_in_batches() -> None:
    x, gate, up = normal(2, 3, 4), normal(4, 5, seed=1), normal(4, 5, seed=2)
    whole = run(GLU_MATMUL, x, gate, up)
    for i in range(2):
        np.testing.assert_array_equal(whole[i], run(GLU_MATMUL, x[i], gate, up))


def test_costs() -> None:
    f32 = [TensorType(s, "f32") for s in ((3, 5), (7, 5), (7,), (3, 7))]
    plain = MATMUL.problem_cost(MATMUL.problem(f32[:2], {"transpose_rhs": True}))
    assert (plain.flops, plain.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    full = MATMUL.problem_cost(MATMUL.problem(f32, {"transpose_rhs": True}))
    assert (full.flops, full.bytes) == (2 * 3 * 5 * 7 + 2 * 21, 4 * (15 + 35 + 7 + 21 + 21))
    glu = GLU_MATMUL.problem_cost(GLU_MATMUL.problem([f32[0], f32[1], f32[1]], {"transpose_rhs": True}))
    assert glu.bytes == 4 * (15 + 35 + 35 + 21)
    assert 4 * 3 * 5 * 7 < glu.flops < 4 * 3 * 5 * 7 + 10 * 21
