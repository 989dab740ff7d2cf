"""Other layouts of the same tensors: strides that a problem's operands may have, and arrangements of numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import UsageError
from kernelforge.problem import Problem, TensorType
from kernelforge.problem_plan import memory_of

if TYPE_CHECKING:
    from kernelforge.op import OpDef

    Array = np.ndarray[Any, np.dtype[Any]]

LAYOUTS = ("rows-apart", "packed", "transposed", "steps")
"""Rows with gaps between them, a third of a packed tensor, the last two axes in the other order, every other element."""
ARRANGEMENTS = ("fortran", "gaps", "reversed", "broadcast", "read-only", "misaligned")
"""See `arrange`."""


def restrided(problem: Problem, op: OpDef) -> Iterator[tuple[str, Problem]]:
    """The problem with one operand, then with all, in other layouts."""
    written = {operand for _, operand in op.in_place}
    able = [
        i
        for i, t in enumerate(problem.operands)
        if t is not None and not t.constant and not t.quantised and i not in written
    ]
    for layout in LAYOUTS:
        for chosen in [[i] for i in able] + ([able] if len(able) > 1 else []):
            operands = list(problem.operands)
            for i in chosen:
                operands[i] = _strided(problem.operand(i), layout) or operands[i]
            if operands != list(problem.operands):
                which = "all" if len(chosen) > 1 else str(chosen[0])
                yield f"{layout}-{which}", replace(problem, operands=tuple(operands))


def _strided(t: TensorType, layout: str) -> TensorType | None:
    inner = [d for d in t.shape[1:] if isinstance(d, int)]
    if t.rank == 0 or len(inner) != t.rank - 1 or (layout != "steps" and t.rank < 2):
        return None
    widths = list(inner)
    step = 1
    if layout == "rows-apart":
        widths[-1] += 3
    elif layout == "packed":
        widths[0] *= 3
    elif layout == "steps":
        step = 2
    strides = [step]
    for width in reversed(widths):
        strides.append(strides[-1] * width)
    strides.reverse()
    if layout == "transposed":
        if not t.static:
            return None
        rows = t.static_shape()[-2]
        strides[-2:] = [1, rows]
    made = replace(t, strides=tuple(strides))
    try:
        memory_of(made)
    except UsageError:
        return None
    return made


def arrange(array: Array, arrangement: str) -> Array:
    """The array with its axes in reversed order, with gaps, backwards, one row repeated by stride 0, read-only, or at an address
    that is no multiple of the element size; as it is for another name. Only "broadcast" changes values."""
    if arrangement == "fortran":
        return np.array(array, order="F")
    if arrangement == "gaps" and array.ndim:
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
        wide[..., 1::2] = array
        return wide[..., 1::2]
    if arrangement == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    if arrangement == "broadcast" and array.ndim > 1 and array.shape[0] and array.dtype.kind != "i":
        return np.broadcast_to(array[:1], array.shape)
    if arrangement == "misaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)
        moved: Array = raw[1:].view(array.dtype).reshape(array.shape) if array.size else array.copy()
        moved[...] = array
        return moved
    copy = array.copy()
    if arrangement == "read-only":
        copy.flags.writeable = False
    return copy
