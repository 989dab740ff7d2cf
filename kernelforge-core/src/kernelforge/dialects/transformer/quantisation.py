"""Ops into and out of the quantised formats. Those of weights are computed when a module is compiled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.checks import DIALECT, Attrs, required, shape_text, traffic, want_float
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, TINY, TOKENS, f32, make, weight
from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, QUANTISED, WEIGHT_FORMATS
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays


def want_groups(name: str, x: TensorType) -> None:
    """Its rows can be cut into groups."""
    if not x.rank or isinstance(x.shape[-1], str) or x.shape[-1] % GROUP:
        raise OpError(
            f"operand '{name}' has shape {shape_text(x.shape)}, must have rows of a multiple of {GROUP} elements"
        )


def infer_quantize(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_float("x", x)
    want_groups("x", x)
    return (TensorType(x.shape, str(attrs["format"])),)


def quantize_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    from kernelforge.quant import quantize

    return (quantize(arrays[0], str(attrs["format"])),)


def conversion_cost(problem: Problem) -> Cost:
    return Cost(0, traffic(problem))


def quantize_samples(rng: random.Random) -> Iterator[Problem]:
    for dtype in ACTIVATIONS:
        for name in WEIGHT_FORMATS:
            yield make(QUANTIZE, weight(dtype, rng.randrange(2, 20), 32 * rng.randrange(1, 9)), format=name)
        x = TensorType((rng.randrange(2, 20), 32 * rng.randrange(1, 9)), dtype)
        yield make(QUANTIZE, x, format=ACTIVATION_FORMAT)
    for model in MODELS:
        for name in WEIGHT_FORMATS:
            yield make(QUANTIZE, weight("bf16", model.hidden, model.width), format=name)
        for tokens in TOKENS if model is TINY else TOKENS[:-1]:
            yield make(QUANTIZE, f32(tokens, model.width), format=ACTIVATION_FORMAT)


QUANTIZE = OpDef(
    name="quantize",
    summary="the same values in groups of 32 with a scale: 8 or 4 bits an element",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("format", "str", choices=tuple(QUANTISED)),),
    infer=infer_quantize,
    reference=quantize_reference,
    sample=quantize_samples,
    cost=conversion_cost,
    exact=True,
    dialect=DIALECT,
)


def infer_dequantize(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    if not x.quantised:
        raise OpError(f"operand 'x' must have a quantised type, got {x.dtype}")
    return (TensorType(x.shape, str(attrs["dtype"])),)


def dequantize_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """Exact in f32, rounded once to the others."""
    from kernelforge.quant import dequantize

    return (dequantize(arrays[0]),)


def dequantize_samples(rng: random.Random) -> Iterator[Problem]:
    for dtype in FLOATS:
        for name in WEIGHT_FORMATS:
            yield make(DEQUANTIZE, weight(name, rng.randrange(2, 20), 32 * rng.randrange(1, 9)), dtype=dtype)
    for model in MODELS:
        for name in WEIGHT_FORMATS:
            yield make(DEQUANTIZE, weight(name, model.hidden, model.width), dtype="f32")


DEQUANTIZE = OpDef(
    name="dequantize",
    summary="the numbers of a quantised tensor",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("dtype", "str", "f32", FLOATS, "of the result"),),
    infer=infer_dequantize,
    reference=dequantize_reference,
    sample=dequantize_samples,
    cost=conversion_cost,
    exact=True,
    dialect=DIALECT,
)
