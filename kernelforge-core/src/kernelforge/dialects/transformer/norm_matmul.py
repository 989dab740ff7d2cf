"""Matrix products of rows that are RMS-normalised first: `rms_norm_matmul`, and the gated pair `rms_norm_glu_matmul`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.activation import EPILOGUES, GATES
from kernelforge.dialects.transformer.checks import DIALECT, Attrs, float_attr, required, traffic
from kernelforge.dialects.transformer.matmul import (
    GLU_MATMUL,
    MATMUL,
    glu_magnitude,
    glu_reference,
    infer_glu,
    infer_matmul,
    matmul_magnitude,
    matmul_reference,
)
from kernelforge.dialects.transformer.models import MODELS, f32, make, ragged, weight
from kernelforge.dialects.transformer.norms import EPS, check_norm, rms_norm
from kernelforge.dtype import WEIGHT_FORMATS
from kernelforge.op import Cost, OpDef, Operand, OperandTypes, Part
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays

EARLY = (1, 7)
"""Tokens of the samples: with more, a norm of its own costs nothing beside the product."""


def _product_attrs(attrs: Attrs) -> dict[str, Attr]:
    return {name: value for name, value in attrs.items() if name != "eps"}


def _matmul_attrs(attrs: Attrs) -> dict[str, Attr]:
    return {**_product_attrs(attrs), "transpose_lhs": False}


def infer_rms_norm_matmul(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    lhs, gain = required(operands, 0), required(operands, 1)
    check_norm("lhs", lhs, "gain", gain, attrs)
    return infer_matmul((lhs, *operands[2:]), _matmul_attrs(attrs))


def rms_norm_matmul_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """act(rms_norm(lhs, gain) @ rhs + bias) + residual."""
    return _of_normed(matmul_reference, arrays, attrs, _matmul_attrs(attrs))


def rms_norm_matmul_magnitude(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """As of `matmul`."""
    return _of_normed(matmul_magnitude, arrays, attrs, _matmul_attrs(attrs))


def _of_normed(
    product: Callable[[Arrays, Attrs], tuple[Array, ...]], arrays: Arrays, attrs: Attrs, product_attrs: Attrs
) -> tuple[Array, ...]:
    x, gain, *others = arrays
    return product([rms_norm(x, gain, float_attr(attrs, "eps")), *others], product_attrs)


def _parts(problem: Problem, op: OpDef, attrs: Attrs) -> tuple[Part, ...]:
    x, *others = (o.name for o in op.operands)
    return (
        Part("transformer.rms_norm", (x, "gain"), ("norm",), {"eps": float_attr(dict(problem.attrs), "eps")}),
        Part(op.full_name, ("norm", *others), op.results, attrs),
    )


def rms_norm_matmul_parts(problem: Problem) -> tuple[Part, ...]:
    return _parts(problem, MATMUL, _matmul_attrs(dict(problem.attrs)))


def _cost(problem: Problem, op: OpDef, attrs: Attrs) -> Cost:
    """Four operations for each element that is normalised, then those of the product."""
    x, _, *others = problem.operands
    product = op.problem_cost(op.problem((x, *others), attrs))
    return Cost(4 * problem.operand(0).size() + product.flops, traffic(problem))


def rms_norm_matmul_cost(problem: Problem) -> Cost:
    return _cost(problem, MATMUL, _matmul_attrs(dict(problem.attrs)))


def rms_norm_matmul_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM_MATMUL, f32(1, 1), f32(1), f32(1, 1))
    yield make(RMS_NORM_MATMUL, f32(3, 5), f32(5), f32(5, 2))
    yield make(RMS_NORM_MATMUL, f32(2, 3, 5), weight("bf16", 5), weight("f32", 5, 2), eps=1e-6)
    for epilogue in EPILOGUES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        operands = (f32(m, k), weight("f32", k), weight("f32", n, k), weight("f32", n), f32(m, n))
        yield make(RMS_NORM_MATMUL, *operands, transpose_rhs=True, epilogue=epilogue)
    for dtype in ("bf16", "f16"):
        m, n, k = (ragged(rng, 2, 70) for _ in range(3))
        yield make(RMS_NORM_MATMUL, f32(m, k), weight(dtype, k), weight(dtype, n, k), transpose_rhs=True)
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        operands = (f32(m, k), weight("f32", k), weight(name, n, k), weight("f32", n), f32(m, n))
        yield make(RMS_NORM_MATMUL, *operands, transpose_rhs=True)
    for model in MODELS:
        n = (model.heads + 2 * model.kv_heads) * model.head_dim
        for tokens in EARLY:
            for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                x, gain = f32(tokens, model.width), weight("f32", model.width)
                yield make(RMS_NORM_MATMUL, x, gain, weight(dtype, n, model.width), transpose_rhs=True)


RMS_NORM_MATMUL = OpDef(
    name="rms_norm_matmul",
    summary="act(rms_norm(lhs, gain) @ rhs + bias) + residual",
    operands=(Operand("lhs"), Operand("gain"), *MATMUL.operands[1:]),
    results=("out",),
    attributes=(EPS, *(a for a in MATMUL.attributes if a.name != "transpose_lhs")),
    infer=infer_rms_norm_matmul,
    reference=rms_norm_matmul_reference,
    sample=rms_norm_matmul_samples,
    cost=rms_norm_matmul_cost,
    magnitude=rms_norm_matmul_magnitude,
    parts=rms_norm_matmul_parts,
    dialect=DIALECT,
)


def infer_rms_norm_glu(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, gain = required(operands, 0), required(operands, 1)
    check_norm("x", x, "gain", gain, attrs)
    return infer_glu((x, *operands[2:]), _product_attrs(attrs))


def rms_norm_glu_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """act(y @ gate) * (y @ up) of y = rms_norm(x, gain)."""
    return _of_normed(glu_reference, arrays, attrs, _product_attrs(attrs))


def rms_norm_glu_magnitude(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """As of `glu_matmul`."""
    return _of_normed(glu_magnitude, arrays, attrs, _product_attrs(attrs))


def rms_norm_glu_parts(problem: Problem) -> tuple[Part, ...]:
    return _parts(problem, GLU_MATMUL, _product_attrs(dict(problem.attrs)))


def rms_norm_glu_cost(problem: Problem) -> Cost:
    return _cost(problem, GLU_MATMUL, _product_attrs(dict(problem.attrs)))


def rms_norm_glu_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM_GLU_MATMUL, f32(1, 1), f32(1), f32(1, 1), f32(1, 1))
    yield make(RMS_NORM_GLU_MATMUL, f32(2, 3, 5), f32(5), f32(5, 2), f32(5, 2))
    for activation in GATES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        w = weight("f32", k, n)
        yield make(RMS_NORM_GLU_MATMUL, f32(m, k), weight("f32", k), w, w, activation=activation, eps=1e-6)
    w = weight("f16", 5, 8)
    yield make(RMS_NORM_GLU_MATMUL, f32(2, 3, 8), weight("f32", 8), w, w, transpose_rhs=True)
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        w = weight(name, n, k)
        yield make(RMS_NORM_GLU_MATMUL, f32(m, k), weight("f32", k), w, w, transpose_rhs=True)
    for model in MODELS:
        for tokens in EARLY:
            for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                x, gain, w = (
                    f32(tokens, model.width),
                    weight("f32", model.width),
                    weight(dtype, model.hidden, model.width),
                )
                yield make(RMS_NORM_GLU_MATMUL, x, gain, w, w, transpose_rhs=True)


RMS_NORM_GLU_MATMUL = OpDef(
    name="rms_norm_glu_matmul",
    summary="act(y @ gate) * (y @ up) of y = rms_norm(x, gain)",
    operands=(Operand("x"), Operand("gain"), *GLU_MATMUL.operands[1:]),
    results=("out",),
    attributes=(EPS, *GLU_MATMUL.attributes),
    infer=infer_rms_norm_glu,
    reference=rms_norm_glu_reference,
    sample=rms_norm_glu_samples,
    cost=rms_norm_glu_cost,
    magnitude=rms_norm_glu_magnitude,
    parts=rms_norm_glu_parts,
    dialect=DIALECT,
)
