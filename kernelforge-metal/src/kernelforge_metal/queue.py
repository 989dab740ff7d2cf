"""What the GPU is given to do, in order, and the way of bytes to it and back.

Submitting costs the host about as much as some twenty dispatches: what belongs together goes together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import DeviceError
from kernelforge.interruption import held_back

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

MAX_SPARE = 4
"""Buffers of a size that are kept to be read from again."""


@dataclass(frozen=True)
class Region:
    """A range of a GPU buffer."""

    buffer: Any
    """A `wgpu.GPUBuffer`."""
    offset: int
    nbytes: int


@dataclass(eq=False)
class Fetch:
    """A reading of a region that was asked for."""

    region: Region
    target: Any
    """The buffer that the host reads."""
    submission: int | None = None
    """The number of the submission that copies to it."""


class Queue:
    """The queue of a device. Not for concurrent use by several threads."""

    def __init__(self, device: Any, errors: Callable[[str], AbstractContextManager[None]], name: str) -> None:
        """`errors`: turns what wgpu raises into a DeviceError, of something that cannot be done."""
        from wgpu.backends.wgpu_native import ffi, lib

        self._ffi, self._lib = ffi, lib
        self._device, self._errors, self._name = device, errors, name
        self._mapped = 0
        self._map_info = self._map_callback()
        self._readback: Any = None  # where `download` copies to
        self._waiting: list[Any] = []  # recorded, to be submitted with what comes next
        self._meanwhile: list[Callable[[], None]] = []
        self._fetches: list[Fetch] = []  # asked for, their copies not yet recorded
        self._copied: list[Fetch] = []  # recorded, waiting
        self._spare: dict[int, list[Any]] = {}

    # --- work ---

    def submit(self, recorded: Any) -> None:
        self._add(recorded)
        self.flush()

    def submit_soon(self, recorded: Any, meanwhile: Callable[[], None]) -> None:
        """Submit together with what is fetched next: at the latest before the host waits for anything or writes to a buffer.
        `meanwhile` is then called, while the GPU works."""
        self._add(recorded)
        self._meanwhile.append(meanwhile)

    def flush(self) -> None:
        """Submit what waits."""
        self._record_copies()
        if not self._waiting:
            return
        waiting, copied, meanwhile = self._waiting, self._copied, self._meanwhile
        self._waiting, self._copied, self._meanwhile = [], [], []
        number = self._submit(waiting)
        for fetch in copied:
            fetch.submission = number
        for call in meanwhile:
            call()

    def wait(self) -> None:
        """Until everything that was submitted is done."""
        self.flush()
        with self._errors("finish its work"):
            self._device._poll_wait()

    def _add(self, recorded: Any) -> None:
        """What was fetched before is copied before."""
        self._record_copies()
        self._waiting.append(recorded)

    def _submit(self, recorded: list[Any]) -> int:
        """The number of the submission."""
        from wgpu.backends.wgpu_native import _api

        with self._errors("run commands"):
            handles = self._ffi.new("WGPUCommandBuffer[]", [r._internal for r in recorded])
            return int(_api.libf.wgpuQueueSubmitForIndex(self._device.queue._internal, len(recorded), handles))

    # --- bytes ---

    def upload(self, buffer: Any, offset: int, data: Array) -> None:
        """Write the bytes of a C-contiguous array; they are padded with zeros to a multiple of 4."""
        raw = data.reshape(-1).view(np.uint8)
        step = 64 << 20
        if self._waiting or any(f.region.buffer is buffer for f in self._fetches):
            self.flush()
        with self._errors("take data"):
            for start in range(0, raw.size, step):
                part = raw[start : start + step]
                if part.size % 4:
                    part = np.concatenate([part, np.zeros(-part.size % 4, np.uint8)])
                self._device.queue.write_buffer(buffer, offset + start, part)

    def download(self, region: Region) -> Array:
        """The bytes of a region; waits for what was submitted."""
        if region.nbytes == 0:
            return np.empty(0, np.uint8)
        if self._readback is None or self._readback.size < region.nbytes:
            self._readback = self.readable(region.nbytes)
        with self._errors("record commands"):
            encoder = self._device.create_command_encoder()
            copy(encoder, region, self._readback)
            recorded = encoder.finish()
        self.submit(recorded)
        return self.read(self._readback, region.nbytes)

    def readable(self, nbytes: int) -> Any:
        """A buffer from which `read` takes what was copied to it."""
        from wgpu import BufferUsage

        size = max(256, -(-nbytes // 256) * 256)
        with self._errors(f"allocate {size} bytes to read from"):
            return self._device.create_buffer(size=size, usage=BufferUsage.MAP_READ | BufferUsage.COPY_DST)

    def fetch(self, region: Region) -> Fetch:
        """Ask for the bytes of a region as what was submitted so far leaves them; `take` hands them out."""
        if not region.nbytes:
            return Fetch(region, None)
        spare = self._spare.get(region.nbytes)
        fetch = Fetch(region, spare.pop() if spare else self.readable(region.nbytes))
        self._fetches.append(fetch)
        return fetch

    def take(self, fetch: Fetch) -> Array:
        """Wait for what was submitted before the fetch; then its bytes. Once only. Raises DeviceError when they were never
        copied, because submitting failed."""
        if not fetch.region.nbytes:
            return np.empty(0, np.uint8)
        if fetch.submission is None or self._waiting:
            self.flush()
        if fetch.submission is None:
            raise DeviceError(f"the GPU {self._name} did not run what was to be read", hint="run it again")
        data = self.read(fetch.target, fetch.region.nbytes, fetch.submission)
        spare = self._spare.setdefault(fetch.region.nbytes, [])
        if len(spare) < MAX_SPARE:
            spare.append(fetch.target)
        return data

    def _record_copies(self) -> None:
        """The copies of what was fetched, before anything that may change it."""
        if not self._fetches:
            return
        fetches, self._fetches = self._fetches, []
        with self._errors("record commands"):
            encoder = self._device.create_command_encoder()
            for fetch in fetches:
                copy(encoder, fetch.region, fetch.target)
            self._waiting.append(encoder.finish())
        self._copied += fetches

    def read(self, buffer: Any, nbytes: int, submission: int | None = None) -> Array:
        """Wait for everything that was submitted, or up to this submission; then the first bytes of a buffer made by
        `readable`."""
        if submission is None:
            self.flush()
        with self._errors("finish its work"), held_back():
            size = -(-nbytes // 8) * 8
            ffi, lib, handle = self._ffi, self._lib, buffer._internal
            self._mapped = 0
            lib.wgpuBufferMapAsync(handle, lib.WGPUMapMode_Read, 0, size, self._map_info)
            until = ffi.NULL if submission is None else ffi.new("WGPUSubmissionIndex *", submission)
            lib.wgpuDevicePoll(self._device._internal, True, until)
            if self._mapped != lib.WGPUMapAsyncStatus_Success:
                raise DeviceError(
                    f"the GPU {self._name} cannot hand over its results: status {self._mapped}", hint="open it again"
                )
            pointer = lib.wgpuBufferGetConstMappedRange(handle, 0, size)
            data = np.frombuffer(ffi.buffer(pointer, size), np.uint8)[:nbytes].copy()
            lib.wgpuBufferUnmap(handle)
        return data

    def _map_callback(self) -> Any:
        """What a mapping calls. wgpu-py's own mapping wakes a second thread that polls, too: handing over between the two costs
        a step of a decoder several milliseconds."""
        ffi, lib = self._ffi, self._lib

        @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")  # type: ignore[untyped-decorator]
        def mapped(status: int, message: Any, first: Any, second: Any) -> None:
            self._mapped = status

        self._callback = mapped  # kept: C holds no reference
        info = ffi.new("WGPUBufferMapCallbackInfo *")
        info.mode = lib.WGPUCallbackMode_AllowProcessEvents
        info.callback = mapped
        return info[0]


def copy(encoder: Any, region: Region, target: Any) -> None:
    """Encode a copy of a region to the start of a buffer."""
    nbytes = -(-region.nbytes // 4) * 4
    encoder.copy_buffer_to_buffer(region.buffer, region.offset, target, 0, nbytes)
