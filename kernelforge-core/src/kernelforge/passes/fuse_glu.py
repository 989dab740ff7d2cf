"""`fuse-glu`: act(x @ gate) * (x @ up) becomes one op, which reads x once and writes neither product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import GELU, GLU_MATMUL, MATMUL, SILU, activation_of
from kernelforge.passes.rewriting import Body, Op, tensor_type

MUL = "transformer.mul"


@dataclass(frozen=True)
class FuseGlu(Pass):
    name: ClassVar[str] = "fuse-glu"

    def run(self, module: Module) -> None:
        body = Body(module)
        for op in body.walk(MUL):
            a, b = op.operands
            if not _fuse(body, op, a, b):
                _fuse(body, op, b, a)


def _fuse(body: Body, op: Op, gated: ir.Value | None, plain: ir.Value | None) -> bool:
    activation = body.feeder(gated, SILU, GELU)
    gate = body.feeder(gated if activation is None else activation.operands[0], MATMUL)
    up = body.feeder(plain, MATMUL)
    if gate is None or up is None:
        return False
    # The activation is an op of its own, or the gate's epilogue already.
    epilogue = str(gate.attrs["epilogue"])
    name = epilogue if activation is None else activation_of(activation)
    if name == "none" or (activation is not None and epilogue != "none") or not _pair(body, gate, up):
        return False
    if up.result.type != op.result.type or gate.result.type != op.result.type:
        return False
    x, gate_weight, up_weight = gate.operands[0], gate.operands[1], up.operands[1]
    attrs = {"transpose_rhs": gate.attrs["transpose_rhs"], "activation": name}
    parts = [gate, *([] if activation is None else [activation]), up]
    body.replace(op, body.create(GLU_MATMUL, [x, gate_weight, up_weight], attrs, before=op, of=[*parts, op]))
    for part in reversed(parts):
        body.erase(part)
    return True


def _pair(body: Body, gate: Op, up: Op) -> bool:
    """Whether both multiply the same x by constants of the same kind, and `up` does nothing besides, `gate` nothing but
    its epilogue."""
    x, gate_weight, *gate_rest = gate.operands
    up_x, up_weight, *up_rest = up.operands
    if x != up_x or any(v is not None for v in (*gate_rest, *up_rest)) or gate_weight is None or up_weight is None:
        return False
    if gate.attrs != {**up.attrs, "epilogue": gate.attrs["epilogue"]} or up.attrs["epilogue"] != "none":
        return False
    constant = body.is_constant(gate_weight) and body.is_constant(up_weight)
    alike = gate_weight.type == up_weight.type and tensor_type(up_weight).rank == 2
    return constant and alike and not up.attrs["transpose_lhs"]
