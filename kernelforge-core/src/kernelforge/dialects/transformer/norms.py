"""Normalisations over the last axis, and softmax."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    axis_of,
    float_attr,
    merged,
    optional,
    required,
    traffic,
    want_float,
    want_shape,
)
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, TOKENS, f32, make, ragged, weight
from kernelforge.dialects.transformer.quantisation import want_groups
from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, Part
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays

EPS = Attribute("eps", "float", 1e-5, doc="added to the mean square or variance")


def _check_rows(name: str, x: TensorType, attrs: Attrs) -> None:
    """`x` has rows to be normalised, and eps is one to do it with."""
    want_float(name, x)
    if x.rank == 0:
        raise OpError(f"operand '{name}' must have rank 1 or more, got a scalar")
    if not float_attr(attrs, "eps") >= 0.0:
        raise OpError(f"attribute 'eps' is {attrs['eps']}, must not be negative")


def _check_weight(name: str, weight: TensorType, x: TensorType, of: str = "x") -> None:
    want_float(name, weight)
    want_shape(name, weight, x.shape[-1:], f"the last dimension of operand '{of}'")


def check_norm(name: str, x: TensorType, weight_name: str, weight: TensorType, attrs: Attrs) -> None:
    """`x` can be normalised, and `weight` scales its columns."""
    _check_rows(name, x, attrs)
    _check_weight(weight_name, weight, x, name)


def infer_rms_norm(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, weight = required(operands, 0), required(operands, 1)
    check_norm("x", x, "weight", weight, attrs)
    return (TensorType(x.shape, x.dtype),)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Over the last axis."""
    import numpy as np

    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


def rms_norm_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""
    x, weight = arrays
    return (rms_norm(x, weight, float_attr(attrs, "eps")),)


def rms_norm_cost(problem: Problem) -> Cost:
    return Cost(4 * problem.operand(0).size(), traffic(problem))


def rms_norm_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM, f32(1, 1), f32(1))
    yield make(RMS_NORM, f32(5), f32(5), eps=1e-6)
    yield make(RMS_NORM, TensorType((2, 3, 7), "bf16"), weight("bf16", 7))
    for dtype in ACTIVATIONS:
        n = ragged(rng, 3, 90)
        yield make(RMS_NORM, TensorType((4, n), dtype), weight(dtype, n))
    for model in MODELS:
        for tokens in TOKENS:
            yield make(RMS_NORM, f32(tokens, model.width), weight("bf16", model.width))
        yield make(RMS_NORM, f32(7, model.heads, model.head_dim), weight("f32", model.head_dim), eps=1e-6)


RMS_NORM = OpDef(
    name="rms_norm",
    summary="x / sqrt(mean(x^2) + eps) * weight over the last axis",
    operands=(Operand("x"), Operand("weight")),
    results=("out",),
    attributes=(EPS,),
    infer=infer_rms_norm,
    reference=rms_norm_reference,
    sample=rms_norm_samples,
    cost=rms_norm_cost,
    dialect=DIALECT,
)


def infer_rms_norm_quantize(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    (out,) = infer_rms_norm(operands, attrs)
    want_groups("x", out)
    return (TensorType(out.shape, ACTIVATION_FORMAT),)


def rms_norm_quantize_parts(problem: Problem) -> tuple[Part, ...]:
    return (
        Part("transformer.rms_norm", ("x", "weight"), ("norm",), dict(problem.attrs)),
        Part("transformer.quantize", ("norm",), ("out",), {"format": ACTIVATION_FORMAT}),
    )


def rms_norm_quantize_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM_QUANTIZE, f32(1, 32), f32(32), eps=1e-6)
    yield make(RMS_NORM_QUANTIZE, TensorType((2, 3, 64), "bf16"), weight("bf16", 64))
    for dtype in ACTIVATIONS:
        n = 32 * rng.randrange(1, 9)
        yield make(RMS_NORM_QUANTIZE, TensorType((4, n), dtype), weight(dtype, n))
    for model in MODELS:
        for tokens in TOKENS:
            yield make(RMS_NORM_QUANTIZE, f32(tokens, model.width), weight("bf16", model.width))


RMS_NORM_QUANTIZE = OpDef(
    name="rms_norm_quantize",
    summary="rms_norm in 8-bit groups (q8a), as quantize makes them",
    operands=(Operand("x"), Operand("weight")),
    results=("out",),
    attributes=(EPS,),
    infer=infer_rms_norm_quantize,
    reference=rms_norm_reference,
    sample=rms_norm_quantize_samples,
    cost=rms_norm_cost,
    parts=rms_norm_quantize_parts,
    dialect=DIALECT,
)


def infer_layer_norm(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, weight = required(operands, 0), required(operands, 1)
    _check_rows("x", x, attrs)
    _check_weight("weight", weight, x)
    if (bias := optional(operands, 2)) is not None:
        _check_weight("bias", bias, x)
    return (TensorType(x.shape, x.dtype),)


def layer_norm_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """(x - mean) / sqrt(var + eps) * weight + bias, with the variance of the population (Ba et al. 2016)."""
    import numpy as np

    x, weight, bias = arrays
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    out = centred / np.sqrt(variance + float_attr(attrs, "eps")) * weight
    return (out if bias is None else out + bias,)


def layer_norm_cost(problem: Problem) -> Cost:
    return Cost(7 * problem.operand(0).size(), traffic(problem))


def layer_norm_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(LAYER_NORM, f32(1, 1), f32(1))
    yield make(LAYER_NORM, f32(3, 4, 5), f32(5), f32(5))
    for dtype in ACTIVATIONS:
        n = ragged(rng, 3, 90)
        yield make(LAYER_NORM, TensorType((4, n), dtype), weight(dtype, n), weight(dtype, n))
    for model in MODELS:
        for tokens in TOKENS:
            w = weight("f32", model.width)
            yield make(LAYER_NORM, f32(tokens, model.width), w, w)


LAYER_NORM = OpDef(
    name="layer_norm",
    summary="(x - mean) / sqrt(var + eps) * weight + bias over the last axis",
    operands=(Operand("x"), Operand("weight"), Operand("bias", optional=True)),
    results=("out",),
    attributes=(EPS,),
    infer=infer_layer_norm,
    reference=layer_norm_reference,
    sample=layer_norm_samples,
    cost=layer_norm_cost,
    dialect=DIALECT,
)


def infer_add_rms_norm(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, residual, weight = (required(operands, i) for i in range(3))
    _check_rows("x", x, attrs)
    want_float("residual", residual)
    want_shape("residual", residual, x.shape, "the shape of operand 'x'")
    _check_weight("weight", weight, x)
    out = TensorType(merged(x.shape, residual.shape), x.dtype)
    return (out, out)


def add_rms_norm_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    x, residual, weight = arrays
    total = x + residual
    return (total, rms_norm(total, weight, float_attr(attrs, "eps")))


def add_rms_norm_cost(problem: Problem) -> Cost:
    return Cost(5 * problem.operand(0).size(), traffic(problem))


def add_rms_norm_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(ADD_RMS_NORM, f32(1, 1), f32(1, 1), f32(1))
    for dtype in ACTIVATIONS:
        n = ragged(rng, 3, 90)
        x = TensorType((2, 3, n), dtype)
        yield make(ADD_RMS_NORM, x, x, weight(dtype, n), eps=1e-6)
    for model in MODELS:
        for tokens in TOKENS:
            x = f32(tokens, model.width)
            yield make(ADD_RMS_NORM, x, x, weight("bf16", model.width))


ADD_RMS_NORM = OpDef(
    name="add_rms_norm",
    summary="sum = x + residual; norm = rms_norm(sum, weight)",
    operands=(Operand("x"), Operand("residual"), Operand("weight")),
    results=("sum", "norm"),
    attributes=(EPS,),
    infer=infer_add_rms_norm,
    reference=add_rms_norm_reference,
    sample=add_rms_norm_samples,
    cost=add_rms_norm_cost,
    dialect=DIALECT,
)


def infer_softmax(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_float("x", x)
    axis_of("axis", attrs["axis"], x.rank)
    return (TensorType(x.shape, x.dtype),)


def softmax_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """exp(x - max) / sum(exp(x - max)) along the axis; a row of -inf alone gives NaN, as in numpy."""
    import numpy as np

    (x,) = arrays
    axis = attrs["axis"]
    assert isinstance(axis, int)
    if x.size == 0:
        return (x,)
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return (e / np.sum(e, axis=axis, keepdims=True),)


def softmax_cost(problem: Problem) -> Cost:
    return Cost(7 * problem.operand(0).size(), traffic(problem))


def softmax_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(SOFTMAX, f32(1))
    yield make(SOFTMAX, f32(3, 4, 5), axis=1)
    yield make(SOFTMAX, f32(7, 4), axis=0)
    for dtype in ACTIVATIONS:
        yield make(SOFTMAX, TensorType((5, ragged(rng, 3, 90)), dtype))
    for model in MODELS:
        for length in (64, ragged(rng, 65, 512)):
            yield make(SOFTMAX, f32(model.heads, 7, length))
        yield make(SOFTMAX, f32(1, model.vocabulary))


SOFTMAX = OpDef(
    name="softmax",
    summary="exp(x) / sum(exp(x)) along an axis",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("axis", "int", -1, doc="may be negative"),),
    infer=infer_softmax,
    reference=softmax_reference,
    sample=softmax_samples,
    cost=softmax_cost,
    dialect=DIALECT,
)
