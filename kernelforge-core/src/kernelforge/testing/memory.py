"""Arrays between guard bands, all of it poisoned, so that a kernel's writes and reads outside of them are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

GUARD = 512
"""Bytes before and after."""

POISONS = (0xFF, 0x3B)
"""Bytes that memory is filled with: NaN or -1, and a small number. What stays poison under both was not written."""


class Guarded:
    """A C-contiguous array inside a larger allocation, at an address that is aligned to its elements and no more."""

    def __init__(self, shape: Sequence[int], dtype: str, poison: int = POISONS[0]) -> None:
        """`shape` is that of the array, in groups where it is quantised; the array is full of poison bytes."""
        kind = to_numpy(dtype)
        self.nbytes = int(np.prod(shape)) * kind.itemsize
        self.poison = poison
        self._memory = np.full(self.nbytes + 2 * GUARD + 128, poison, np.uint8)
        start = GUARD + -(self._memory.ctypes.data + GUARD) % 64 + kind.itemsize
        self._inside = slice(start, start + self.nbytes)
        self.array: Array = self._memory[self._inside].view(kind).reshape(shape)
        self.seal()

    def fill(self, values: Array) -> None:
        self.array[...] = values
        self.seal()

    def spoil(self) -> None:
        """Poison the array again."""
        self._memory[self._inside] = self.poison
        self.seal()

    def seal(self) -> None:
        """Remember the contents: what they must stay."""
        self._sealed = self._memory.copy()

    def mutated(self) -> bool:
        """Whether the array itself was written since it was sealed."""
        return not np.array_equal(self._memory[self._inside], self._sealed[self._inside])

    def overrun(self) -> int | None:
        """The first byte outside of the array that was written, as an offset from its start; None when there is none."""
        changed = self._memory != self._sealed
        changed[self._inside] = False
        return int(changed.argmax()) - self._inside.start if changed.any() else None

    def unwritten(self) -> Array:
        """Where all bytes of an element are still poison: bool, of the array's shape."""
        bytes_of = self._memory[self._inside].reshape(*self.array.shape, self.array.itemsize)
        return np.asarray((bytes_of == self.poison).all(axis=-1))
