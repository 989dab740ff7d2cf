"""Constants of compiled plans on the GPU, in the layouts that kernels read: evaluated, packed and sent once per tensor source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.constant import Constant, evaluate
from kernelforge_metal.encoder import Region

if TYPE_CHECKING:
    from kernelforge.backend import TensorSource
    from kernelforge.op import OpDef
    from kernelforge_metal.kernel import Pack
    from kernelforge_metal.native import Gpu

Array = np.ndarray[Any, np.dtype[Any]]


class ConstantStore:
    """Constants of one tensor source, resident on one GPU, shared by the executables that are compiled with it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._regions: dict[tuple[str, str], Region] = {}
        self._arrays: dict[str, Array] = {}

    def get(self, constant: Constant, pack: Pack | None, source: TensorSource, ops: Mapping[str, OpDef]) -> Region:
        """The constant in the layout of `pack`, or row-major when None.

        `source` is always the one that this store belongs to; the store must not keep it alive.
        """
        key, plain = (constant.key, pack.key if pack is not None else ""), (constant.key, "")
        if key not in self._regions:
            value = evaluate(constant, source, ops)
            packed = value if pack is None else pack.pack(value)
            if packed.nbytes == value.nbytes and packed.ctypes.data == value.ctypes.data:  # the layout is the plain one
                if plain not in self._regions:
                    self._regions[plain] = send(self._gpu, value, constant.key[:80])
                self._regions[key] = self._regions[plain]
            else:
                self._regions[key] = send(self._gpu, packed, constant.key[:80])
        return self._regions[key]

    def array(self, constant: Constant, source: TensorSource, ops: Mapping[str, OpDef]) -> Array:
        """The constant on the host, for a step that runs there."""
        if constant.key not in self._arrays:
            self._arrays[constant.key] = evaluate(constant, source, ops)
        return self._arrays[constant.key]


def send(gpu: Gpu, array: Array, what: str) -> Region:
    """A new buffer with the bytes of `array` in row-major order."""
    buffer = gpu.allocate(array.nbytes, f"constant '{what}'")
    if array.size:
        gpu.queue.upload(buffer, 0, np.ascontiguousarray(array))
    return Region(buffer, 0, buffer.size)
