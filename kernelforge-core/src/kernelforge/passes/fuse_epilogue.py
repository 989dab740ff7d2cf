"""`fuse-epilogue`: what follows a matmul element by element moves into it: act(lhs @ rhs + bias) + residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import GELU, MATMUL, SILU, activation_of
from kernelforge.passes.rewriting import Body, Op, tensor_type

ADD = "transformer.add"


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    name: ClassVar[str] = "fuse-epilogue"
    residual: bool = True
    """Whether sums with a tensor of the result's shape move in too; without it they are left to fuse-add-norm."""

    def run(self, module: Module) -> None:
        body = Body(module)
        for op in body.walk(ADD, GELU, SILU):
            if op.name == ADD:
                self._fuse_sum(body, op)
            else:
                self._fuse_activation(body, op)

    def _fuse_sum(self, body: Body, op: Op) -> None:
        a, b = op.operands
        for product, other in ((a, b), (b, a)):
            matmul = body.feeder(product, MATMUL)
            # Equal types also mean that the sum is rounded to the product's dtype, and that only `other` is broadcast.
            if matmul is None or other is None or matmul.result.type != op.result.type:
                continue
            lhs, rhs, bias, residual = matmul.operands
            bare = bias is None and residual is None and matmul.attrs["epilogue"] == "none"
            if bare and _is_bias(body, other, op.result):
                _rebuild(body, matmul, op, [lhs, rhs, other, None], "none")
                return
            if self.residual and residual is None and other.type == op.result.type:
                _rebuild(body, matmul, op, [lhs, rhs, bias, other], str(matmul.attrs["epilogue"]))
                return

    def _fuse_activation(self, body: Body, op: Op) -> None:
        matmul = body.feeder(op.operands[0], MATMUL)
        if matmul is not None and matmul.attrs["epilogue"] == "none" and matmul.operands[3] is None:
            _rebuild(body, matmul, op, matmul.operands, activation_of(op))


def _is_bias(body: Body, value: ir.Value, result: ir.Value) -> bool:
    """Whether `value` is a constant with one element for each column of `result`, of the same dtype."""
    bias, out = tensor_type(value), tensor_type(result)
    return body.is_constant(value) and bias.shape == out.shape[-1:] and bias.dtype == out.dtype


def _rebuild(body: Body, matmul: Op, last: Op, operands: list[ir.Value | None], epilogue: str) -> None:
    """Put the matmul in the place of `last`, where all that it uses is known."""
    attrs = {**matmul.attrs, "epilogue": epilogue}
    body.replace(last, body.create(MATMUL, operands, attrs, before=last, of=[matmul, last]))
    body.erase(matmul)
