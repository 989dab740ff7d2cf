"""Stride arithmetic of views, with dynamic dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from kernelforge.errors import UsageError
from kernelforge.problem import Dim, TensorType


def known_strides(t: TensorType) -> tuple[int, ...] | None:
    """Strides in elements, None when one of them depends on a dynamic dimension."""
    try:
        return t.element_strides()
    except UsageError:
        return None


def _times(product: tuple[int, int], dim: Dim) -> tuple[int, int]:
    """A product of dimensions as (number of dynamic ones, product of the others)."""
    dynamic, static = product
    return (dynamic + 1, static) if isinstance(dim, str) else (dynamic, static * dim)


def reshaped_strides(shape: Sequence[Dim], strides: Sequence[int], new: Sequence[Dim]) -> tuple[int, ...] | None:
    """Strides by which the memory of `shape`, `strides` is read as `new`, or None when only a copy can be.

    Both shapes have the same number of elements and at most one dynamic dimension, the same. Dimensions are matched in
    groups of equal products; within a group the old ones must follow each other without gaps.
    """
    old = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    wanted = [d for d in new if d != 1]
    if 0 in wanted:
        return TensorType(tuple(0 if isinstance(d, str) else d for d in new), "i8").row_major_strides()
    found: list[int] = []
    i = j = 0
    while i < len(old):
        first_old, first_new = i, j
        have, want = _times((0, 1), old[i][0]), _times((0, 1), wanted[j])
        i, j = i + 1, j + 1
        while have != want:
            if have[0] < want[0] or (have[0] == want[0] and have[1] < want[1]):
                have, i = _times(have, old[i][0]), i + 1
            else:
                want, j = _times(want, wanted[j]), j + 1
        for (_, outer), (dim, inner) in zip(old[first_old : i - 1], old[first_old + 1 : i], strict=True):
            if isinstance(dim, str) or outer != inner * dim:
                return None
        step = old[i - 1][1]
        group = [step]
        for dim in reversed(wanted[first_new + 1 : j]):
            if isinstance(dim, str):
                return None
            step *= dim
            group.append(step)
        found += reversed(group)
    return _with_ones(new, found)


def _with_ones(new: Sequence[Dim], found: Sequence[int]) -> tuple[int, ...]:
    """Put dimensions of size 1 back: their stride is never used, row-major's is the one to expect."""
    strides: list[int] = []
    rest = list(found)
    step = 1
    for dim in reversed(new):
        if dim != 1:
            step = rest.pop()
        strides.append(step)
        if isinstance(dim, int):
            step *= dim
    return tuple(reversed(strides))
