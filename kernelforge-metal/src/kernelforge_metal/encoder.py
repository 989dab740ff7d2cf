"""Commands that are being recorded. By wgpu's C functions: wgpu-py's objects cost several times as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelforge_metal.recorder import Command, Recorder, Stream


@dataclass(frozen=True)
class Region:
    """A range of a GPU buffer."""

    buffer: Any
    """A `wgpu.GPUBuffer`."""
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Recorded:
    """What was encoded, checked and ready to be submitted once."""

    handle: Any
    """A C handle."""


class Encoder:
    """Work that is done in the order of these calls, once it is finished and submitted."""

    def __init__(self, device: Any, recorder: Recorder) -> None:
        """`device`: a `wgpu.GPUDevice`."""
        self._lib, self._libf, self._ffi, self._recorder = recorder.lib, recorder.libf, recorder.ffi, recorder
        made = self._libf.wgpuDeviceCreateCommandEncoder(device._internal, self._ffi.NULL)
        self._handle = self._ffi.gc(made, self._lib.wgpuCommandEncoderRelease)

    def compute(
        self, commands: Sequence[Command] | Stream, uniforms: Any = None, stamps: tuple[Any, int, int] | None = None
    ) -> None:
        """One compute pass with these dispatches; `stamps` are a `wgpu.GPUQuerySet` and those of its queries that get the times
        of the start and end. `uniforms`: the C handle of the bind group of parameters, on devices without immediates."""
        ffi, lib, description = self._ffi, self._lib, self._ffi.NULL
        if stamps is not None:
            queries, start, end = stamps
            writes = ffi.new("WGPUPassTimestampWrites *")
            writes.querySet = queries._internal
            writes.beginningOfPassWriteIndex, writes.endOfPassWriteIndex = start, end
            description = ffi.new("WGPUComputePassDescriptor *")
            description.timestampWrites = writes
        handle = self._libf.wgpuCommandEncoderBeginComputePass(self._handle, description)
        try:
            self._recorder.encode(handle, commands, uniforms)
            self._libf.wgpuComputePassEncoderEnd(handle)
        finally:
            lib.wgpuComputePassEncoderRelease(handle)

    def copy(self, region: Region, target: Any, at: int = 0) -> None:
        """Copy a region to byte `at` of a buffer; whole words are copied."""
        nbytes = -(-region.nbytes // 4) * 4
        self._libf.wgpuCommandEncoderCopyBufferToBuffer(
            self._handle, region.buffer._internal, region.offset, target._internal, at, nbytes
        )

    def resolve(self, queries: Any, count: int, target: Any) -> None:
        """Write the first `count` timestamps of a `wgpu.GPUQuerySet` to the start of a buffer."""
        self._libf.wgpuCommandEncoderResolveQuerySet(self._handle, queries._internal, 0, count, target._internal, 0)

    def finish(self) -> Recorded:
        """Once."""
        made = self._libf.wgpuCommandEncoderFinish(self._handle, self._ffi.NULL)
        return Recorded(self._ffi.gc(made, self._lib.wgpuCommandBufferRelease))
