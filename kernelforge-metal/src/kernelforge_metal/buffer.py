"""Memory on the GPU that a caller holds: KV caches, mostly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge.problem import TensorType
from kernelforge_metal.native import Region

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
            data = self._gpu.download(Region(self.memory, 0, self._nbytes))
        return data.view(to_numpy(self._dtype)).reshape(self._shape)

    def write(self, array: Array) -> None:
        if tuple(array.shape) != self._shape or array.dtype != to_numpy(self._dtype):
            raise UsageError(
                f"cannot write {array.dtype}{list(array.shape)} into a {self._dtype}{list(self._shape)} buffer"
            )
        if array.size:
            with self._gpu.lock:
                self._gpu.upload(self.memory, 0, np.ascontiguousarray(array))
