"""`quantize`: constant weights of matmuls, and tables of embeddings, in 8 or 4 bits, and what the weights multiply in 8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import GLU_MATMUL, MATMUL, QUANTIZE, RMS_NORM_GLU_MATMUL, RMS_NORM_MATMUL
from kernelforge.passes.rewriting import Body, Op, tensor_type
from kernelforge.quant import warn_not_quantised

EMBEDDING = "transformer.embedding"
TRANSPOSE = "transformer.transpose"

WEIGHTS: Mapping[str, tuple[int, ...]] = {
    EMBEDDING: (0,),
    GLU_MATMUL: (1, 2),
    MATMUL: (1,),
    RMS_NORM_GLU_MATMUL: (2, 3),
    RMS_NORM_MATMUL: (2,),
}
"""By op: its operands that are weights."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights whose rows are no multiple of 32 elements stay as they are, and a warning names them."""

    name: ClassVar[str] = "quantize"
    format: Literal["q8", "q4"]
    embeddings: Literal["same", "q8", "q4", "none"] = "same"
    """Format of tables that an embedding reads, also where a matmul multiplies by them."""
    skip: str = ""
    """A regular expression: weights in whose name it is found stay as they are."""
    activations: Literal["f32", "q8"] = "f32"
    """What f32 activations become before they are multiplied by quantised weights."""

    def run(self, module: Module) -> None:
        try:
            skip = re.compile(self.skip) if self.skip else None
        except re.error as error:
            raise UsageError(f"option 'skip' is not a regular expression: {error}") from None
        body = Body(module)
        names = _names(module)
        tables = {op.operands[0] for op in body.walk(EMBEDDING)}
        made: dict[tuple[ir.Value, bool], ir.Value] = {}
        left: dict[str, None] = {}
        for op in body.walk(*WEIGHTS):
            weights = [v for i in WEIGHTS[op.name] if (v := op.operands[i]) is not None]
            transposed = op.name == EMBEDDING or bool(op.attrs["transpose_rhs"])
            if not all(_is_weight(body, v) for v in weights):
                continue
            formats = {self._format(v in tables) for v in weights}
            if len(formats) > 1 or formats == {"none"} or any(skip and skip.search(_name(v, names)) for v in weights):
                continue
            if odd := [v for v in weights if tensor_type(v).shape[-1 if transposed else 0] % GROUP]:
                left |= dict.fromkeys(_name(v, names) for v in odd)
                continue
            for v in weights:
                if (v, transposed) not in made:
                    made[v, transposed] = _quantized(body, v, formats.copy().pop(), transposed, before=op)
            _replace(body, op, [made[v, transposed] for v in weights])
        if left:
            warn_not_quantised(list(left))
        if self.activations == "q8":
            _quantize_activations(Body(module))

    def _format(self, table: bool) -> str:
        return self.format if not table or self.embeddings == "same" else self.embeddings


def _quantize_activations(body: Body) -> None:
    """Each tensor once, for all of its products."""
    made: dict[ir.Value, ir.Value] = {}
    for op in body.walk(MATMUL, GLU_MATMUL):
        x, weight = op.operands[0], op.operands[1]
        if x is None or weight is None or tensor_type(weight).dtype not in WEIGHT_FORMATS:
            continue
        if tensor_type(x).dtype != "f32" or body.is_constant(x) or op.attrs.get("transpose_lhs"):
            continue
        if x not in made:
            (made[x],) = body.create(QUANTIZE, [x], {"format": ACTIVATION_FORMAT}, before=op, of=[op])
        operands = [made[x], *op.operands[1:]]
        body.replace(op, body.create(op.name, operands, op.attrs, before=op, of=[op]))


def _is_weight(body: Body, value: ir.Value) -> bool:
    t = tensor_type(value)
    return body.is_constant(value) and t.rank == 2 and t.dtype in FLOATS


def _quantized(body: Body, weight: ir.Value, dtype: str, transposed: bool, *, before: Op) -> ir.Value:
    if not transposed:
        (weight,) = body.create(TRANSPOSE, [weight], {"perm": (1, 0)}, before=before, of=[before])
    return body.create(QUANTIZE, [weight], {"format": dtype}, before=before, of=[before])[0]


def _replace(body: Body, op: Op, weights: list[ir.Value]) -> None:
    operands, attrs = list(op.operands), dict(op.attrs)
    if op.name == EMBEDDING:
        attrs["dtype"] = tensor_type(op.result).dtype
    else:
        attrs["transpose_rhs"] = True
    for i, weight in zip(WEIGHTS[op.name], weights, strict=True):
        operands[i] = weight
    body.replace(op, body.create(op.name, operands, attrs, before=op, of=[op]))


def _names(module: Module) -> dict[ir.Value, str]:
    """Of the function's arguments."""
    block = module.main.regions[0].blocks[0]
    return {value: arg.name for value, arg in zip(block.arguments, module.function().args, strict=True)}


def _name(value: ir.Value, names: Mapping[ir.Value, str]) -> str:
    """The names of the arguments that a constant is computed from."""
    if isinstance(value, ir.BlockArgument):
        return names[value]
    return "+".join(_name(v, names) for v in value.owner.operation.operands)
