"""`canonicalize`: MLIR's own canonicalization, which removes dead code, and normal forms of our ops.

A layout op or cast that does nothing is removed, two in a row become one, an embedding casts its rows itself, rows are picked
before they are normalised, a transposed weight becomes a matmul's attribute, and the operand of a sum or product that is
broadcast or constant comes second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.op import OpError
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import Body, Op, run_upstream, tensor_type

EMBEDDING, MATMUL = "transformer.embedding", "transformer.matmul"
CAST, CONCAT, RESHAPE = "transformer.cast", "transformer.concat", "transformer.reshape"
SLICE, SPLIT, TRANSPOSE = "transformer.slice", "transformer.split", "transformer.transpose"
ADD, MUL, RMS_NORM = "transformer.add", "transformer.mul", "transformer.rms_norm"

WIDER = {
    "i8": {"i32", "i64", "bf16", "f16", "f32", "f64"},
    "i32": {"i64", "f64"},
    "f16": {"f32", "f64"},
    "bf16": {"f32", "f64"},
    "f32": {"f64"},
}
"""For each dtype, the others that have every one of its values."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    name: ClassVar[str] = "canonicalize"

    def run(self, module: Module) -> None:
        changed = True
        while changed:
            # Dead users would hide that a value is used once only.
            run_upstream(module, "canonicalize")
            changed = _simplify(Body(module))


def _simplify(body: Body) -> bool:
    changed = False
    for op in body.walk(*RULES):
        for rule in RULES[op.name]:
            try:
                value = rule(body, op)
            except OpError:
                continue  # refused: a type in between states more than inference knows
            if value is not None:
                body.replace(op, [value])
                changed = True
                break
    return changed


def _first(op: Op) -> ir.Value:
    value = op.operands[0]
    assert value is not None
    return value


def _ints(op: Op, attribute: str) -> tuple[int, ...]:
    value = op.attrs[attribute]
    assert isinstance(value, tuple)
    return value


def _same_type(body: Body, op: Op) -> ir.Value | None:
    """A cast, slice, split or concat that yields its operand: nothing changes if the type stays."""
    x = _first(op)
    return x if len(op.operands) == 1 and len(op.operation.results) == 1 and x.type == op.result.type else None


def _idle_reshape(body: Body, op: Op) -> ir.Value | None:
    x, shape = _first(op), _ints(op, "shape")
    pairs = zip(tensor_type(x).shape, shape, strict=False)
    return x if x.type == op.result.type and all(d == new or new == -1 for d, new in pairs) else None


def _reshape_of_reshape(body: Body, op: Op) -> ir.Value | None:
    inner = body.producer(_first(op), RESHAPE)
    if inner is None:
        return None
    return body.create(RESHAPE, [_first(inner)], op.attrs, before=op, of=[inner, op])[0]


def _idle_transpose(body: Body, op: Op) -> ir.Value | None:
    x, perm = _first(op), _ints(op, "perm")
    return x if x.type == op.result.type and perm == tuple(range(len(perm))) else None


def _transpose_of_transpose(body: Body, op: Op) -> ir.Value | None:
    inner = body.producer(_first(op), TRANSPOSE)
    if inner is None:
        return None
    axes = _ints(inner, "perm")
    perm = tuple(axes[i] for i in _ints(op, "perm"))
    return body.create(TRANSPOSE, [_first(inner)], {"perm": perm}, before=op, of=[inner, op])[0]


def _cast_of_cast(body: Body, op: Op) -> ir.Value | None:
    inner = body.producer(_first(op), CAST)
    if inner is None or not _lossless(_first(inner), _first(op)):
        return None
    return body.create(CAST, [_first(inner)], op.attrs, before=op, of=[inner, op])[0]


def _cast_of_embedding(body: Body, op: Op) -> ir.Value | None:
    rows = body.feeder(_first(op), EMBEDDING)
    if rows is None or not _lossless(_first(rows), _first(op)):
        return None
    return body.create(EMBEDDING, rows.operands, op.attrs, before=op, of=[rows, op])[0]


def _embedding_of_norm(body: Body, op: Op) -> ir.Value | None:
    """Of a prompt's states only the rows whose logits are wanted are normalised."""
    table, ids = op.operands
    norm = body.feeder(table, RMS_NORM)
    if norm is None or body.is_constant(norm.result) or tensor_type(norm.result).dtype != tensor_type(op.result).dtype:
        return None
    x, weight = norm.operands
    (rows,) = body.create(EMBEDDING, [x, ids], op.attrs, before=op, of=[op])
    return body.create(RMS_NORM, [rows, weight], norm.attrs, before=op, of=[norm, op])[0]


def _lossless(source: ir.Value, target: ir.Value) -> bool:
    """Whether the dtype of `target` has every value of the dtype of `source`."""
    have, want = tensor_type(source).dtype, tensor_type(target).dtype
    return have == want or want in WIDER.get(have, ())


def _matmul_of_transpose(body: Body, op: Op) -> ir.Value | None:
    lhs, rhs, bias, residual = op.operands
    inner = body.producer(rhs, TRANSPOSE)
    if inner is None:
        return None
    *batch, rows, columns = _ints(inner, "perm")
    rank = len(batch) + 2
    if (*batch, columns, rows) != tuple(range(rank)):
        return None
    attrs = {**op.attrs, "transpose_rhs": not op.attrs["transpose_rhs"]}
    return body.create(MATMUL, [lhs, _first(inner), bias, residual], attrs, before=op, of=[op])[0]


def _broadcast_second(body: Body, op: Op) -> ir.Value | None:
    a, b = op.operands
    if a is None or b is None or b.type != op.result.type:  # the result has the dtype of a, so b has it too
        return None
    if a.type == b.type and not (body.is_constant(a) and not body.is_constant(b)):
        return None
    return body.create(op.name, [b, a], {}, before=op, of=[op])[0]


RULES: dict[str, tuple[Callable[[Body, Op], ir.Value | None], ...]] = {
    ADD: (_broadcast_second,),
    CAST: (_same_type, _cast_of_cast, _cast_of_embedding),
    CONCAT: (_same_type,),
    EMBEDDING: (_embedding_of_norm,),
    MATMUL: (_matmul_of_transpose,),
    MUL: (_broadcast_second,),
    RESHAPE: (_idle_reshape, _reshape_of_reshape),
    SLICE: (_same_type,),
    SPLIT: (_same_type,),
    TRANSPOSE: (_idle_transpose, _transpose_of_transpose),
}
"""By op, in the order they are tried: each gives a value to put in the op's place, or None when it does not apply."""
