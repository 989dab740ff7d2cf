"""softmax(q @ k^T) @ v over heads: q [..., H, T, D], k and v [..., H, L, D], with at most one batch axis before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import Body, Op, tensor_type

ATTENTION = "transformer.attention"
MATMUL = "transformer.matmul"
SOFTMAX = "transformer.softmax"
TRANSPOSE = "transformer.transpose"


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Scores must be used by the softmax alone, and the softmax by the product alone. A row of scores that are all -inf
    becomes 0 where softmax gives NaN."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, module: Module) -> None:
        body = Body(module)
        for product in body.walk(MATMUL):
            softmax = body.feeder(product.operands[0], SOFTMAX)
            scores = body.feeder(softmax.operands[0], MATMUL) if softmax is not None else None
            if softmax is None or scores is None or not _bare(product, False) or not _bare(scores, True):
                continue
            inputs = [v for v in (*scores.operands[:2], product.operands[1]) if v is not None]
            if softmax.attrs["axis"] in (-1, len(softmax.result.type.shape) - 1) and _fits(*inputs):
                _fuse(body, inputs, [scores, softmax, product])


def _bare(op: Op, transpose_rhs: bool) -> bool:
    plain = {"transpose_lhs": False, "transpose_rhs": transpose_rhs, "epilogue": "none"}
    return dict(op.attrs) == plain and op.operands[2:] == [None, None]


def _fits(q: ir.Value, k: ir.Value, v: ir.Value) -> bool:
    """Whether attention takes them: heads everywhere, keys and values alike, no fewer keys than queries."""
    queries, keys, values = map(tensor_type, (q, k, v))
    ints = isinstance(queries.shape[-2], int) and isinstance(keys.shape[-2], int)
    enough = not ints or queries.shape[-2] <= keys.shape[-2]  # type: ignore[operator]  # both are numbers then
    return queries.rank == keys.rank and queries.rank in (3, 4) and keys == values and enough


def _fuse(body: Body, inputs: list[ir.Value], ops: list[Op]) -> None:
    scores, softmax, product = ops
    perm = {"perm": (1, 0, 2) if len(product.result.type.shape) == 3 else (0, 2, 1, 3)}  # heads behind tokens, and back
    swapped = [body.create(TRANSPOSE, [x], perm, before=product, of=ops)[0] for x in inputs]
    attended = body.create(ATTENTION, swapped, {"causal": False, "scale": 1.0}, before=product, of=ops)
    body.replace(product, body.create(TRANSPOSE, attended, perm, before=product, of=ops))
    body.erase(softmax)
    body.erase(scores)
