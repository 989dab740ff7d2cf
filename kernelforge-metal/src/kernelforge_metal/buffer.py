"""Memory on the GPU that a caller holds: KV caches, mostly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge.problem import TensorType
from kernelforge_metal.encoder import Region

if TYPE_CHECKING:
    from kernelforge_metal.native import Gpu

    Array = np.ndarray[Any, np.dtype[Any]]


class GpuBuffer:
    """See `kernelforge.backend.Buffer`."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: str) -> None:
        t = TensorType(shape, dtype)
        self._gpu, self._shape, self._dtype = gpu, t.array_shape(), dtype
        self._nbytes = t.nbytes()
        self.memory = gpu.allocate(self._nbytes, f"a {dtype}{list(shape)} buffer")

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def region(self) -> Region:
        return Region(self.memory, 0, self.memory.size)

    def numpy(self) -> Array:
        with self._gpu.lock:
            data = self._gpu.queue.download(Region(self.memory, 0, self._nbytes))
        return data.view(to_numpy(self._dtype)).reshape(self._shape)

    def fetch(self, *index: int) -> Callable[[], Array]:
        dtype = to_numpy(self._dtype)
        shape = self._shape[len(index) :]
        place = 0
        for i, size in zip(index, self._shape, strict=False):
            if not 0 <= i < size:
                raise IndexError(f"there is no element {list(index)} in a {self._dtype}{list(self._shape)} buffer")
            place = place * size + i
        nbytes = prod(shape) * dtype.itemsize
        first = place * nbytes
        skipped = first % 4  # copies start at whole words
        with self._gpu.lock:
            begun = self._gpu.queue.fetch(Region(self.memory, first - skipped, skipped + nbytes))

        @cache
        def take() -> Array:
            with self._gpu.lock:
                data = self._gpu.queue.take(begun)
            return data[skipped:].view(dtype).reshape(shape)

        return take

    def write(self, array: Array) -> None:
        if tuple(array.shape) != self._shape or array.dtype != to_numpy(self._dtype):
            raise UsageError(
                f"cannot write {array.dtype}{list(array.shape)} into a {self._dtype}{list(self._shape)} buffer"
            )
        if array.size:
            with self._gpu.lock:
                self._gpu.queue.upload(self.memory, 0, np.ascontiguousarray(array))
