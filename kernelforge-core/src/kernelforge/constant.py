"""Constants of a plan: named tensors and what is computed only from them, evaluated once when compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError
from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.backend import TensorSource

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Named:
    """A tensor of the constants' source."""

    name: str
    type: TensorType

    @property
    def key(self) -> str:
        return self.name

    @property
    def value_type(self) -> TensorType:
        return self.type


@dataclass(frozen=True)
class Folded:
    """A result of an op whose operands are all constants."""

    problem: Problem
    operands: tuple[Constant | None, ...]
    result: int

    @cached_property
    def key(self) -> str:
        """Equal keys mean equal values, given the same source."""
        inner = ",".join("_" if c is None else c.key for c in self.operands)
        return f"{self.problem}#{self.result}<{inner}>"

    @property
    def value_type(self) -> TensorType:
        return self.problem.results[self.result]


Constant = Named | Folded


class ArraySource:
    """A dict of arrays as a `TensorSource`."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def names(self) -> Sequence[str]:
        return tuple(self._arrays)

    def tensor(self, name: str) -> Array:
        if name not in self._arrays:
            raise AssetError(f"there is no constant '{name}'", hint=f"given: {', '.join(self._arrays) or 'none'}")
        return self._arrays[name]


Fold = Callable[[Problem, "Sequence[Array | None]"], "tuple[Array, ...]"]
"""Computes an op's results as `OpDef.evaluate` does, exactly."""


def evaluate(
    constant: Constant, source: TensorSource, ops: Mapping[str, OpDef], folds: Mapping[str, Fold] | None = None
) -> Array:
    """The constant's value. `folds`, by op, are used in place of the ops' references.

    Raises AssetError when a named tensor's shape or dtype is not what the module says.
    """
    from kernelforge.dtype import GROUP, QUANTISED, from_numpy

    if isinstance(constant, Folded):
        arrays = [None if c is None else evaluate(c, source, ops, folds) for c in constant.operands]
        fold = (folds or {}).get(constant.problem.op, ops[constant.problem.op].evaluate)
        return fold(constant.problem, arrays)[constant.result]
    array = source.tensor(constant.name)
    dtype, shape = from_numpy(array.dtype), tuple(array.shape)
    if dtype in QUANTISED and shape:
        shape = (*shape[:-1], shape[-1] * GROUP)
    have, want = TensorType(shape, dtype), constant.type
    if (have.shape, have.dtype) != (want.shape, want.dtype):
        raise AssetError(f"constant '{constant.name}' is {have}, the module wants {want.dtype}{list(want.shape)}")
    return array
