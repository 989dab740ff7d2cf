"""Where the values of a plan are in memory: the caller's arrays, the arena, packed constants and scratch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge.dtype import to_numpy
from kernelforge_cpu.kernel import NativeKernel
from kernelforge_cpu.store import ALIGNMENT, address, aligned_empty

if TYPE_CHECKING:
    from kernelforge.plan import Plan
    from kernelforge_cpu.kernel import PythonKernel

Array = np.ndarray[Any, np.dtype[Any]]


class Layout:
    """What native code is told of places and sizes: each step has its pointers in one flat array, and its sizes in another.
    The arena is for the largest sizes so far."""

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[NativeKernel | PythonKernel],
        constants: Mapping[tuple[int, int], Array],
        threads: int,
    ) -> None:
        """`constants`: the packed array of (step, operand index). They and the kernels' tables must live as long as this."""
        self._plan, self._kernels, self._threads = plan, kernels, threads
        self.dims: dict[str, int] | None = None
        """The sizes; None before there are any, and where a change of them failed."""
        self.starts: list[int] = []
        """Of each step, where its pointers begin."""
        self.dim_starts: list[int] = []
        self.places: dict[int, int] = {}
        """The address of each root value, as the pointers say."""
        self.changes = 0
        """Of pointers and sizes, so far."""
        self._bounds: dict[str, int] | None = None
        self.arena = self._scratch = aligned_empty(0)
        self._patches: dict[int, list[tuple[int, int]]] = {}  # where each root value's address must be written
        self._scratch_slots: list[tuple[int, int, NativeKernel]] = []
        pointers: list[int] = []
        dims: list[str] = []
        for i, (step, kernel) in enumerate(zip(plan.steps, kernels, strict=True)):
            self.starts.append(len(pointers))
            self.dim_starts.append(len(dims))
            dims.extend(step.dims)
            for position, value in enumerate((*step.operands, *step.results)):
                constant = constants.get((i, position))
                if constant is not None:
                    pointers.append(address(constant) if constant.size else 0)
                    continue
                if value is not None:
                    root, offset = plan.root(value), plan.values[value].offset
                    offset = plan.values[value].type.bytes_of(offset)
                    self._patches.setdefault(root, []).append((len(pointers), offset))
                pointers.append(0)
            if isinstance(kernel, NativeKernel):
                pointers.extend(address(table) for table in kernel.tables)
                self._scratch_slots.append((len(pointers), i, kernel))
                pointers.append(0)
        self.pointers = np.array(pointers, np.uint64)
        # Takes a number ten times faster than the array; made from its address, for the typing of numpy says no buffer.
        self._words = (ctypes.c_uint64 * len(pointers)).from_address(address(self.pointers))
        self.dim_values = np.zeros(max(1, len(dims)), np.int64)
        self._dim_slots = {d: np.array([k for k, name in enumerate(dims) if name == d]) for d in set(dims)}

    def forget(self) -> None:
        """The sizes are about to change: what fails meanwhile leaves none."""
        self.dims = None
        self.changes += 1

    def resize(self, dims: dict[str, int]) -> None:
        """Make room for these sizes and tell them."""
        self.forget()
        known = self._plan.max_dims if self._bounds is None else self._bounds
        grown = {d: max(n, known.get(d, 0)) for d, n in dims.items()}
        if grown != self._bounds:
            self._bounds = None
            packed = self._plan.pack(grown)
            self.arena = aligned_empty(packed.nbytes)
            for value, offset in packed.offsets.items():
                self.place(value, address(self.arena) + offset)
            self._bounds = grown
        for name, slots in self._dim_slots.items():
            self.dim_values[slots] = dims[name]
        self._place_scratch(dims)
        self.dims = dict(dims)

    def _place_scratch(self, dims: Mapping[str, int]) -> None:
        """Steps of one group run at the same time: each has scratch of its own; groups reuse the memory."""
        offsets: list[int] = []
        group, used, needed = -1, 0, 0
        for _, i, kernel in self._scratch_slots:
            step = self._plan.steps[i]
            if step.group != group:
                group, used = step.group, 0
            offsets.append(used)
            nbytes = kernel.scratch([dims[d] for d in step.dims], self._threads)
            used += -(-nbytes // ALIGNMENT) * ALIGNMENT
            needed = max(needed, used)
        if needed > self._scratch.nbytes:
            self._scratch = aligned_empty(needed)
        for (slot, _, _), offset in zip(self._scratch_slots, offsets, strict=True):
            self.pointers[slot] = address(self._scratch) + offset

    def place(self, root: int, start: int) -> None:
        """Say where a value is."""
        if self.places.get(root) != start:
            self.changes += 1
            self.places.pop(root, None)  # known again when all is written: Ctrl-C may come in between
            for slot, offset in self._patches.get(root, ()):
                self._words[slot] = start + offset
            self.places[root] = start

    def view(self, value: int, memory: Mapping[int, Array]) -> Array:
        """The memory of a value as an array; `memory` has the callers' arrays, by root value. Of the present sizes."""
        found, root, dims = self._plan.values[value], self._plan.root(value), self.dims or {}
        dtype = to_numpy(found.type.dtype)
        shape = found.type.array_shape(dims)
        if root in memory:
            flat = memory[root].reshape(-1)
        else:
            start = self.places[root] - address(self.arena)
            flat = self.arena[start : start + self._plan.values[root].type.nbytes(dims)].view(dtype)
        strides = tuple(s * dtype.itemsize for s in found.type.element_strides()) if found.type.strides else None
        if strides is None:
            return flat[found.offset : found.offset + found.type.size(dims)].reshape(shape)
        return as_strided(flat[found.offset :], shape, strides)
