"""`fuse-qkv`: matmuls that multiply one tensor by several weights become one matmul by the weights side by side.

The weights are put together when the module is compiled, and the results are views of the wide one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.op import UNKNOWN
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import MATMUL
from kernelforge.passes.rewriting import Body, Op, tensor_type
from kernelforge.syntax import RUNS

CONCAT = "transformer.concat"
SPLIT = "transformer.split"


@dataclass(frozen=True)
class FuseQkv(Pass):
    """Only bare matmuls with constant weights of rank 2 are merged: all with a constant bias, or all without."""

    name: ClassVar[str] = "fuse-qkv"

    def run(self, module: Module) -> None:
        body = Body(module)
        groups: dict[tuple[object, ...], list[Op]] = {}
        for op in body.walk(MATMUL):
            key = _key(body, op)
            if key is None:
                continue
            groups.setdefault(key, []).append(op)
        for group in groups.values():
            for part in _parts(group):
                if len(part) > 1:
                    _merge(body, part)


def _key(body: Body, op: Op) -> tuple[object, ...] | None:
    """What matmuls that can be merged have in common, None when `op` cannot be."""
    lhs, rhs, bias, residual = op.operands
    if lhs is None or rhs is None or residual is not None or op.attrs["epilogue"] != "none":
        return None
    weight = tensor_type(rhs)
    *rows, columns = tensor_type(op.result).shape
    constant = all(v is None or body.is_constant(v) for v in (rhs, bias))
    if body.producer(rhs, CONCAT) is not None:  # merged already
        return None
    # A result that is declared with an unknown size could not be split off again.
    if not constant or weight.rank != 2 or columns == UNKNOWN:
        return None
    bias_dtype = None if bias is None else tensor_type(bias).dtype
    return lhs, op.attrs["transpose_lhs"], op.attrs["transpose_rhs"], tuple(rows), weight.dtype, bias_dtype


def _parts(group: list[Op]) -> Iterator[list[Op]]:
    """Cut a group where the widths of its results change more often than concat and split can tell."""
    runs = [list(run) for _, run in groupby(group, key=lambda op: tensor_type(op.result))]
    for i in range(0, len(runs), RUNS):
        yield list(chain.from_iterable(runs[i : i + RUNS]))


def _merge(body: Body, group: list[Op]) -> None:
    # Read again: what was read before may be of a group that has been merged since, and be gone.
    group = [Op(op.operation, op.definition) for op in group]
    first = group[0]
    lhs, _, bias, _ = first.operands

    # The merged matmul stands where the first one stood.
    def side_by_side(index: int, axis: int) -> ir.Value:
        parts = [op.operands[index] for op in group]
        for part in parts:
            if part is not None:
                body.hoist(part, before=first)
        return body.create(CONCAT, parts, {"axis": axis}, before=first, of=group)[0]

    columns = 0 if first.attrs["transpose_rhs"] else 1
    operands = [lhs, side_by_side(1, columns), None if bias is None else side_by_side(2, 0)]
    (wide,) = body.create(MATMUL, operands, first.attrs, before=first, of=group)
    sizes = tuple(n for op in group if isinstance(n := tensor_type(op.result).shape[-1], int))
    pieces = body.create(SPLIT, [wide], {"axis": -1, "sizes": sizes}, before=first, of=group)
    for op, piece in zip(group, pieces, strict=True):
        body.replace(op, [piece])
