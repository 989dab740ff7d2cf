"""Ops that treat every element alone: activations, sums, products, casts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.activation import FLOPS, gelu, gelu_tanh, silu
from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    required,
    shape_text,
    traffic,
    want_float,
    want_plain,
)
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, TOKENS, f32, make, ragged
from kernelforge.dtype import ITEMSIZE
from kernelforge.op import UNKNOWN, Attribute, Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Dim, Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays


def infer_unary(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_float("x", x)
    return (TensorType(x.shape, x.dtype),)


def silu_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return (silu(arrays[0]),)


def gelu_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return ((gelu_tanh if attrs["approximate"] == "tanh" else gelu)(arrays[0]),)


def unary_magnitude(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """Both activations are x times a number from 0 to 1, which may be computed as (1 + erf or tanh) / 2."""
    return (abs(arrays[0]),)


def unary_cost(problem: Problem) -> Cost:
    name = problem.op.partition(".")[2]
    if name == "gelu" and problem.attr("approximate") == "tanh":
        name = "gelu_tanh"
    return Cost(FLOPS[name] * problem.operand(0).size(), traffic(problem))


def _unary_shapes(rng: random.Random) -> Iterator[TensorType]:
    yield f32(1)
    yield f32(2, 3, 5)
    for dtype in ACTIVATIONS:
        yield TensorType((3, ragged(rng, 3, 200)), dtype)
    for model in MODELS:
        for tokens in TOKENS:
            yield f32(tokens, model.hidden)


def silu_samples(rng: random.Random) -> Iterator[Problem]:
    for t in _unary_shapes(rng):
        yield make(SILU, t)


def gelu_samples(rng: random.Random) -> Iterator[Problem]:
    for t in _unary_shapes(rng):
        for approximate in ("none", "tanh"):
            yield make(GELU, t, approximate=approximate)


SILU = OpDef(
    name="silu",
    summary="x * sigmoid(x)",
    operands=(Operand("x"),),
    results=("out",),
    infer=infer_unary,
    reference=silu_reference,
    sample=silu_samples,
    cost=unary_cost,
    magnitude=unary_magnitude,
    dialect=DIALECT,
)

GELU = OpDef(
    name="gelu",
    summary="x * Phi(x), exact or by its tanh approximation",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("approximate", "str", "none", ("none", "tanh")),),
    infer=infer_unary,
    reference=gelu_reference,
    sample=gelu_samples,
    cost=unary_cost,
    magnitude=unary_magnitude,
    dialect=DIALECT,
)


def broadcast_dim(a: Dim, b: Dim) -> Dim | None:
    """The common size of two dimensions under numpy's rule, None when there is none. An unknown one may be any size."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if UNKNOWN in (a, b):
        return b if a == UNKNOWN else a
    return None


def infer_binary(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    a, b = required(operands, 0), required(operands, 1)
    want_float("a", a)
    want_float("b", b)
    rank = max(a.rank, b.rank)
    left = (1,) * (rank - a.rank) + a.shape
    right = (1,) * (rank - b.rank) + b.shape
    shape = [broadcast_dim(x, y) for x, y in zip(left, right, strict=True)]
    if None in shape:
        raise OpError(
            f"operand 'b' has shape {shape_text(b.shape)}, which does not broadcast with 'a' {shape_text(a.shape)}"
        )
    return (TensorType(tuple(d for d in shape if d is not None), a.dtype),)


def add_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0] + arrays[1],)


def mul_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0] * arrays[1],)


def binary_cost(problem: Problem) -> Cost:
    return Cost(problem.results[0].size(), traffic(problem))


def _binary_samples(op: OpDef, rng: random.Random) -> Iterator[Problem]:
    yield make(op, f32(1), f32(1))
    yield make(op, f32(3, 4), f32(4))
    yield make(op, f32(4), f32(3, 4))
    yield make(op, f32(2, 1, 5), f32(3, 1))
    yield make(op, f32(3, 4), f32())
    for dtype in ACTIVATIONS:
        t = TensorType((3, ragged(rng, 3, 200)), dtype)
        yield make(op, t, t)
    yield make(op, f32(5, 6), TensorType((5, 6), "bf16"))
    for model in MODELS:
        for tokens in TOKENS:
            yield make(op, f32(tokens, model.width), f32(tokens, model.width))


def add_samples(rng: random.Random) -> Iterator[Problem]:
    yield from _binary_samples(ADD, rng)


def mul_samples(rng: random.Random) -> Iterator[Problem]:
    yield from _binary_samples(MUL, rng)


def _binary(
    name: str,
    summary: str,
    reference: Callable[[Arrays, Attrs], tuple[Array, ...]],
    sample: Callable[[random.Random], Iterator[Problem]],
) -> OpDef:
    return OpDef(
        name=name,
        summary=summary,
        operands=(Operand("a"), Operand("b")),
        results=("out",),
        infer=infer_binary,
        reference=reference,
        sample=sample,
        cost=binary_cost,
        dialect=DIALECT,
    )


ADD = _binary("add", "a + b with numpy's broadcasting, in the type of a", add_reference, add_samples)
MUL = _binary("mul", "a * b with numpy's broadcasting, in the type of a", mul_reference, mul_samples)


def infer_cast(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_plain("x", x)
    return (TensorType(x.shape, str(attrs["dtype"])),)


def cast_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """Round to nearest even between floats; towards zero from floats to integers."""
    return (arrays[0],)


def cast_cost(problem: Problem) -> Cost:
    return Cost(0, traffic(problem))


def cast_samples(rng: random.Random) -> Iterator[Problem]:
    for source in ACTIVATIONS:
        for dtype in ACTIVATIONS:
            yield make(CAST, TensorType((3, ragged(rng, 3, 200)), source), dtype=dtype)
    for model in MODELS:
        for tokens in TOKENS:
            yield make(CAST, f32(tokens, model.width), dtype="bf16")
            yield make(CAST, TensorType((tokens, model.width), "bf16"), dtype="f32")


CAST = OpDef(
    name="cast",
    summary="the same values in another element type",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("dtype", "str", choices=tuple(ITEMSIZE), doc="of the result"),),
    infer=infer_cast,
    reference=cast_reference,
    sample=cast_samples,
    cost=cast_cost,
    exact=True,
    dialect=DIALECT,
)
