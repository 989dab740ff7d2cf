"""How far the products of changed matrices are from the original's, on activations of a text.

A matrix that changed much may matter little, and the other way round: what counts is x @ W for the x that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernelforge.dtype import WEIGHT_FORMATS, from_numpy
from kernelforge.module import Function, Module, Node
from kernelforge.planning import make_plan
from kernelforge.quant import dequantize
from kernelforge_llm.model import PREFILL_TOKENS, Model

if TYPE_CHECKING:
    from kernelforge.backend import Buffer
    from kernelforge.session import Session
    from kernelforge_llm.checkpoint import TensorSource
    from kernelforge_llm.source import Source

PRODUCTS = ("transformer.matmul", "transformer.glu_matmul")
SAMPLED = 128
"""Tokens, evenly spread, whose activations are multiplied."""
ROWS = 1 << 12
"""Of a matrix, widened at a time."""


def product_inputs(source: Source, session: Session, ids: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """By matrix, what the model multiplies by it: x [tokens, K], of tokens spread over the sequence `ids`, as far as the
    model's context goes."""
    model = Model.make(source, session.registry, kv_dtype="f32", activations="f32")
    ids = ids[: min(PREFILL_TOKENS, model.context)]
    model = replace(model, context=len(ids))
    function = Module.parse(model.module, session.registry).function()
    multiplied = _multiplied(function)
    function = _only(function, sorted(set(multiplied.values())))
    dims = {"tokens": len(ids), "rows": len(ids)}
    plan = make_plan(function, session.registry.ops, session.select, target=session.target, dims=dims)
    positions = np.arange(len(ids), dtype=np.int32)
    inputs: dict[str, NDArray[np.int32] | Buffer] = {
        "tokens": np.array(ids, np.int32),
        "positions": positions,
        "slots": np.zeros_like(positions),
        "rows": positions,
    }
    for arg in function.args:
        if arg.donated:
            inputs[arg.name] = session.device.allocate(arg.type.static_shape(), arg.type.dtype)
    outputs = session.build(plan, _Borrowed(source.tensors)).run(inputs)
    spread = np.linspace(0, len(ids) - 1, min(SAMPLED, len(ids))).astype(int)
    found = {v: np.asarray(x)[spread].astype(np.float32) for v, x in zip(function.outputs, outputs, strict=True)}
    return {name: found[value] for name, value in multiplied.items()}


def product_error(x: NDArray[np.float32], before: NDArray[np.generic], after: NDArray[np.generic]) -> float:
    """Root mean square of the differences of x @ W.T over that of the numbers, for W [N, K] of floats or groups, before
    and after; 0 for zeros."""
    size = changed = 0.0
    for start in range(0, len(before), ROWS):
        want, found = (_widened(matrix[start : start + ROWS]) for matrix in (before, after))
        size += float(np.square(x @ want.T, dtype=np.float64).sum())
        changed += float(np.square(x @ (found - want).T, dtype=np.float64).sum())
    return (changed / size) ** 0.5 if size else 0.0


@dataclass(frozen=True, eq=False)
class _Borrowed:
    """Tensors of a source, under which what was packed for this one run is not kept."""

    source: TensorSource

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def tensor(self, name: str) -> NDArray[np.generic]:
        return self.source.tensor(name)


def _multiplied(function: Function) -> dict[str, int]:
    """By constant of which a right-hand side is made: the left-hand side's value."""
    made = {result: node for node in function.nodes for result in node.results}
    found: dict[str, int] = {}
    for node in function.nodes:
        if node.op not in PRODUCTS or node.operands[0] is None:
            continue
        operands = zip(node.operands, node.problem.operands, strict=True)
        pending = [v for v, t in operands if v is not None and t is not None and t.constant and t.rank > 1]
        while pending:
            value = pending.pop()
            if value < len(function.args):
                if function.args[value].constant:
                    found[function.args[value].name] = node.operands[0]
            else:
                pending += [v for v in made[value].operands if v is not None]
    return found


def _only(function: Function, outputs: Sequence[int]) -> Function:
    """What computes some values alone."""
    needed, nodes = set(outputs), list[Node]()
    for node in reversed(function.nodes):
        if needed.intersection(node.results):
            needed.update(v for v in node.operands if v is not None)
            nodes.insert(0, node)
    return replace(function, nodes=tuple(nodes), outputs=tuple(outputs), output_names=tuple(map(str, outputs)))


def _widened(matrix: NDArray[np.generic]) -> NDArray[np.float32]:
    return dequantize(matrix) if from_numpy(matrix.dtype) in WEIGHT_FORMATS else matrix.astype(np.float32)
