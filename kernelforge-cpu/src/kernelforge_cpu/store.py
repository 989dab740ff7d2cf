"""Constants of compiled plans, in the layouts that kernels read: evaluated and packed once per source of tensors."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.backend import PackedSource
from kernelforge.constant import Constant, Fold, Named, evaluate
from kernelforge.dtype import to_numpy
from kernelforge_cpu.kernel import Pack

if TYPE_CHECKING:
    from kernelforge.backend import TensorSource
    from kernelforge.op import OpDef
    from kernelforge.problem import Problem

Array = np.ndarray[Any, np.dtype[Any]]

ALIGNMENT = 64
ROW_MAJOR = ""
"""The layout of a constant that is not packed."""


def _quantize(problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    from kernelforge_cpu.folding import quantize

    (x,) = arrays
    assert x is not None
    return (quantize(x, str(dict(problem.attrs)["format"])),)


FOLDS: Mapping[str, Fold] = {"transformer.quantize": _quantize}
"""By op: compiled code that computes constants as its reference does, faster."""


def _is_stored(constant: Constant, pack: Pack | None) -> bool:
    """Whether the array is the source's own tensor."""
    return pack is None and isinstance(constant, Named)


def aligned_empty(nbytes: int) -> Array:
    """Uninitialised bytes that start at a cache line."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -address(raw) % ALIGNMENT
    return raw[start : start + nbytes]


def aligned_zeros(nbytes: int) -> Array:
    """Zeroed bytes that start at a cache line; the system provides their pages when they are first written."""
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -address(raw) % ALIGNMENT
    return raw[start : start + nbytes]


def address(array: Array) -> int:
    """Address of the first element."""
    found: int = array.__array_interface__["data"][0]
    return found


_MEMORY = ctypes.cast(8, ctypes.POINTER(ctypes.c_uint64))
"""The process's memory in words, from the second on (a pointer to the first would be null)."""


def _read_address(array: Array) -> int:
    found: int = _MEMORY[(id(array) + object.__basicsize__) // 8 - 1]
    return found


_PROBE = np.arange(9)[4:]
quick_address = _read_address if _read_address(_PROBE) == address(_PROBE) else address
"""`address` for what is known to be a numpy array, ten times as fast: half of what a run of small arrays costs. An array is
the header of a Python object, then this address (`PyArrayObject`, part of numpy's binary interface)."""


class LargePages:
    """Chunks of memory on large pages, to which arrays are copied one after the other.

    The processor keeps the addresses of only so many pages at hand, and a step reads all weights once. numpy asks for large
    pages itself where an array is large.
    """

    PAGE = 1 << 21
    CHUNK = 8 * PAGE
    SMALL, LARGE = 1 << 14, 1 << 22
    """Bytes of an array that is worth copying, and from where on numpy has done it."""

    def __init__(self) -> None:
        self._rest = np.empty(0, np.uint8)

    def hold(self, array: Array) -> Array:
        """The C-contiguous array, or a copy on large pages where that helps and the system has them."""
        if not hasattr(mmap, "MADV_HUGEPAGE") or not self.SMALL <= array.nbytes < self.LARGE:
            return array
        nbytes = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if nbytes > self._rest.nbytes:
            self._rest = self._chunk()
        own, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        copy = own[: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def _chunk(self) -> Array:
        memory = mmap.mmap(-1, self.CHUNK + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
        start = -address(raw) % self.PAGE
        return raw[start : start + self.CHUNK]


class ConstantStore:
    """Packed constants of one tensor source, shared by the executables that are compiled with it."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], Array] = {}
        self._pages = LargePages()

    def get(self, constant: Constant, pack: Pack | None, source: TensorSource, ops: Mapping[str, OpDef]) -> Array:
        """The constant in the layout of `pack`, or row-major when None. The array is C-contiguous and kept alive here.

        `source` is always the one that this store belongs to; the store must not keep it alive.
        """
        layout = pack.key if pack is not None else ROW_MAJOR
        key = (constant.key, layout)
        if key not in self._arrays:
            found = self._taken(constant, pack, source)
            if found is None:
                plain = self._arrays.get((constant.key, ROW_MAJOR))
                value = evaluate(constant, source, ops, FOLDS) if plain is None else plain
                found = np.ascontiguousarray(value if pack is None else pack.pack(value))
                if isinstance(source, PackedSource) and not _is_stored(constant, pack):
                    found = source.keep(constant.key, layout, found)
                elif not _is_stored(constant, pack):
                    found = self._pages.hold(found)
            self._arrays[key] = found
        return self._arrays[key]

    @staticmethod
    def _taken(constant: Constant, pack: Pack | None, source: TensorSource) -> Array | None:
        """The packed constant as the source has it, if it does."""
        if not isinstance(source, PackedSource) or _is_stored(constant, pack):
            return None
        t = constant.value_type
        if pack is None:
            found = source.packed(constant.key, ROW_MAJOR, t.nbytes({}))
            return None if found is None else found.view(to_numpy(t.dtype)).reshape(t.array_shape())
        return None if pack.nbytes is None else source.packed(constant.key, pack.key, pack.nbytes(t))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self._arrays.values())
