"""Matrix products: `matmul` with its epilogue, and the gated pair `glu_matmul`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.activation import EPILOGUES, FLOPS, GATES, activate
from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    merged,
    optional,
    required,
    shape_text,
    traffic,
    want_float,
    want_rank,
    want_shape,
    want_weight,
)
from kernelforge.dialects.transformer.models import MODELS, TINY, TOKENS, activations, f32, make, ragged, weight
from kernelforge.dtype import ACTIVATION_FORMAT, WEIGHT_FORMATS
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, same_dim, same_shape
from kernelforge.problem import Dim, Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays


def _matrix(name: str, t: TensorType, transposed: bool) -> tuple[Dim, Dim]:
    """Rows and columns of the matrix that is multiplied."""
    if t.rank < 2:
        raise OpError(f"operand '{name}' must have rank 2 or more, got shape {shape_text(t.shape)}")
    rows, columns = t.shape[-2:]
    return (columns, rows) if transposed else (rows, columns)


def _want_rhs(name: str, t: TensorType, transposed: bool) -> None:
    """A weight; the groups of a quantised one lie along the inner dimension."""
    want_weight(name, t)
    if t.quantised and not transposed:
        raise OpError(f"operand '{name}' is quantised ({t.dtype}) and must be [N, K] with transpose_rhs = true")


def _want_lhs(name: str, t: TensorType, rhs_name: str, rhs: TensorType) -> str:
    """Floats, or quantised activations beside a quantised weight. Returns the type of the result."""
    if t.dtype != ACTIVATION_FORMAT:
        want_float(name, t)
        return t.dtype
    if not rhs.quantised:
        raise OpError(f"operand '{name}' is {t.dtype}, so operand '{rhs_name}' must be quantised, got {rhs.dtype}")
    return "f32"


def _check_inner(
    lhs_name: str, rhs_name: str, lhs: Dim, rhs: Dim, transpose_lhs: bool = False, transpose_rhs: bool = False
) -> None:
    if not same_dim(lhs, rhs):
        rows = "columns (transposed: rows)" if transpose_rhs else "rows"
        columns = "rows (transposed: columns)" if transpose_lhs else "columns"
        raise OpError(f"operand '{rhs_name}' has {rhs} {rows} but operand '{lhs_name}' has {lhs} {columns}")


def infer_matmul(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    lhs, rhs = required(operands, 0), required(operands, 1)
    transpose_lhs, transpose_rhs = bool(attrs["transpose_lhs"]), bool(attrs["transpose_rhs"])
    dtype = _want_lhs("lhs", lhs, "rhs", rhs)
    if lhs.quantised and transpose_lhs:
        raise OpError(f"operand 'lhs' is quantised ({lhs.dtype}) and cannot be transposed")
    _want_rhs("rhs", rhs, transpose_rhs)
    m, k = _matrix("lhs", lhs, transpose_lhs)
    inner, n = _matrix("rhs", rhs, transpose_rhs)
    _check_inner("lhs", "rhs", k, inner, transpose_lhs, transpose_rhs)
    batch = lhs.shape[:-2]
    if rhs.rank > 2:
        if not same_shape(batch, rhs.shape[:-2]):
            have, want = shape_text(rhs.shape[:-2]), shape_text(batch)
            raise OpError(f"operand 'rhs' has batch dimensions {have} but operand 'lhs' has {want}")
        batch = merged(batch, rhs.shape[:-2])
    shape = (*batch, m, n)
    if (bias := optional(operands, 2)) is not None:
        want_float("bias", bias)
        want_shape("bias", bias, (n,), "one for each column of the result")
    if (residual := optional(operands, 3)) is not None:
        want_float("residual", residual)
        want_shape("residual", residual, shape, "the shape of the result")
        shape = merged(shape, residual.shape)
    return (TensorType(shape, dtype),)


def matmul_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """act(lhs @ rhs + bias) + residual."""
    lhs, rhs, bias, residual = arrays
    lhs = lhs.swapaxes(-1, -2) if attrs["transpose_lhs"] else lhs
    rhs = rhs.swapaxes(-1, -2) if attrs["transpose_rhs"] else rhs
    out = lhs @ rhs
    out = out if bias is None else out + bias
    out = activate(attrs["epilogue"], out)
    return (out if residual is None else out + residual,)


def matmul_magnitude(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """What the activation is applied to: see `elementwise.unary_magnitude`."""
    return matmul_reference([*arrays[:3], None], {**attrs, "epilogue": "none"})


def matmul_cost(problem: Problem) -> Cost:
    """2 M N K for the product, the epilogue's operations per element of the result."""
    lhs, out = problem.operand(0), problem.results[0]
    k = lhs.static_shape()[-2 if problem.attr("transpose_lhs") else -1]
    extra = FLOPS[str(problem.attr("epilogue"))] + sum(t is not None for t in problem.operands[2:])
    return Cost(out.size() * (2 * k + extra), traffic(problem))


def matmul_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(MATMUL, f32(1, 1), f32(1, 1))
    yield make(MATMUL, f32(3, 5), f32(5, 2))
    yield make(MATMUL, f32(5, 3), f32(2, 5), transpose_lhs=True, transpose_rhs=True)
    yield make(MATMUL, f32(2, 3, 7, 5), f32(2, 3, 5, 9))
    yield make(MATMUL, f32(4, 3, 8), weight("f32", 6, 8), transpose_rhs=True)
    for epilogue in EPILOGUES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        operands = (f32(m, k), weight("f32", n, k), weight("f32", n), f32(m, n))
        yield make(MATMUL, *operands, transpose_rhs=True, epilogue=epilogue)
    for dtype in ("bf16", "f16"):
        m, n, k = (ragged(rng, 2, 70) for _ in range(3))
        yield make(MATMUL, f32(m, k), weight(dtype, n, k), transpose_rhs=True)
        yield make(MATMUL, TensorType((m, k), dtype), weight(dtype, k, n), weight(dtype, n))
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 40), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        yield make(MATMUL, f32(m, k), weight(name, n, k), weight("f32", n), f32(m, n), transpose_rhs=True)
        yield make(MATMUL, TensorType((m, k), "bf16"), weight(name, n, k), transpose_rhs=True)
        yield make(MATMUL, activations(m, k), weight(name, n, k), weight("f32", n), f32(m, n), transpose_rhs=True)
    for model in MODELS:
        for tokens in TOKENS if model is TINY else TOKENS[:-1]:
            qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
            for n, k in ((qkv, model.width), (model.hidden, model.width), (model.width, model.hidden)):
                for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                    yield make(MATMUL, f32(tokens, k), weight(dtype, n, k), transpose_rhs=True)
                for dtype in WEIGHT_FORMATS:
                    yield make(MATMUL, activations(tokens, k), weight(dtype, n, k), transpose_rhs=True)
        yield make(MATMUL, f32(1, model.width), weight("bf16", model.vocabulary, model.width), transpose_rhs=True)


MATMUL = OpDef(
    name="matmul",
    summary="act(lhs @ rhs + bias) + residual; rhs of rank 2 is shared by all batches of lhs",
    operands=(Operand("lhs"), Operand("rhs"), Operand("bias", optional=True), Operand("residual", optional=True)),
    results=("out",),
    attributes=(
        Attribute("transpose_lhs", "bool", False, doc="swap the last two axes of lhs"),
        Attribute("transpose_rhs", "bool", False, doc="swap the last two axes of rhs: weights stored as [N, K]"),
        Attribute("epilogue", "str", "none", EPILOGUES, "applied after the bias, before the residual"),
    ),
    infer=infer_matmul,
    reference=matmul_reference,
    sample=matmul_samples,
    cost=matmul_cost,
    magnitude=matmul_magnitude,
    dialect=DIALECT,
)


def infer_glu(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, gate, up = (required(operands, i) for i in range(3))
    dtype = _want_lhs("x", x, "gate", gate)
    m, k = _matrix("x", x, False)
    for name, t in (("gate", gate), ("up", up)):
        _want_rhs(name, t, bool(attrs["transpose_rhs"]))
        want_rank(name, t, 2)
        inner, _ = _matrix(name, t, bool(attrs["transpose_rhs"]))
        _check_inner("x", name, k, inner, False, bool(attrs["transpose_rhs"]))
    want_shape("up", up, gate.shape, "the shape of operand 'gate'")
    if up.dtype != gate.dtype:
        raise OpError(f"operand 'up' has type {up.dtype} but operand 'gate' has {gate.dtype}")
    n = merged(gate.shape, up.shape)[0 if attrs["transpose_rhs"] else 1]
    return (TensorType((*x.shape[:-2], m, n), dtype),)


def glu_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """act(x @ gate) * (x @ up) (Shazeer 2020, "GLU Variants Improve Transformer")."""
    x, gate, up = arrays
    if attrs["transpose_rhs"]:
        gate, up = gate.T, up.T
    return (activate(attrs["activation"], x @ gate) * (x @ up),)


def glu_magnitude(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """The product without the activation: see `elementwise.unary_magnitude`."""
    return glu_reference(arrays, {**attrs, "activation": "none"})


def glu_cost(problem: Problem) -> Cost:
    out = problem.results[0]
    k = problem.operand(0).static_shape()[-1]
    return Cost(out.size() * (4 * k + 1 + FLOPS[str(problem.attr("activation"))]), traffic(problem))


def glu_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(GLU_MATMUL, f32(1, 1), f32(1, 1), f32(1, 1))
    for activation in GATES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        yield make(GLU_MATMUL, f32(m, k), weight("f32", k, n), weight("f32", k, n), activation=activation)
    yield make(GLU_MATMUL, f32(2, 3, 8), weight("f16", 5, 8), weight("f16", 5, 8), transpose_rhs=True)
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 40), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        yield make(GLU_MATMUL, f32(m, k), weight(name, n, k), weight(name, n, k), transpose_rhs=True)
        yield make(GLU_MATMUL, activations(m, k), weight(name, n, k), weight(name, n, k), transpose_rhs=True)
    for model in MODELS:
        for tokens in TOKENS[:-1]:
            for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                w = weight(dtype, model.hidden, model.width)
                yield make(GLU_MATMUL, f32(tokens, model.width), w, w, transpose_rhs=True)
                if dtype in WEIGHT_FORMATS:
                    yield make(GLU_MATMUL, activations(tokens, model.width), w, w, transpose_rhs=True)


GLU_MATMUL = OpDef(
    name="glu_matmul",
    summary="act(x @ gate) * (x @ up)",
    operands=(Operand("x"), Operand("gate"), Operand("up")),
    results=("out",),
    attributes=(
        Attribute("transpose_rhs", "bool", False, doc="gate and up are stored as [N, K]"),
        Attribute("activation", "str", "silu", GATES, "of the gate"),
    ),
    infer=infer_glu,
    reference=glu_reference,
    sample=glu_samples,
    cost=glu_cost,
    magnitude=glu_magnitude,
    dialect=DIALECT,
)
