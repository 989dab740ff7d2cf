"""`primer.squared_relu`, the activation of Primer (So et al., "Primer: Searching for Efficient Transformers", 2021)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import FLOATS
from kernelforge.op import Attrs, Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def infer(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = operands
    assert x is not None
    if x.dtype not in FLOATS:
        raise OpError(f"operand 'x' must have a float type, got {x.dtype}")
    return (TensorType(x.shape, x.dtype),)


def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    import numpy as np

    return (np.square(np.maximum(arrays[0], 0)),)


def samples(rng: random.Random) -> Iterator[Problem]:
    """As between the matmuls of an MLP: one token, some, a prompt."""
    for dtype in ("f32", "bf16", "f16"):
        yield SQUARED_RELU.problem([TensorType((3, rng.randrange(1, 99)), dtype)], {})
    for tokens in (1, 16, 256):
        yield SQUARED_RELU.problem([TensorType((tokens, 1536), "f32")], {})


def cost(problem: Problem) -> Cost:
    x = problem.operand(0)
    return Cost(flops=2 * x.size(), bytes=2 * x.nbytes())


SQUARED_RELU = OpDef(
    name="squared_relu",
    summary="max(x, 0)^2",
    operands=(Operand("x"),),
    results=("out",),
    infer=infer,
    reference=reference,
    sample=samples,
    cost=cost,
    dialect="primer",
)

OPS = (SQUARED_RELU,)
