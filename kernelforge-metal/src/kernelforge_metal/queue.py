"""What the GPU is given to do, in order, and the way of bytes to it and back.

Submitting costs the host about as much as some twenty dispatches: what belongs together goes together.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import DeviceError
from kernelforge.interruption import held_back
from kernelforge_metal.encoder import Encoder, Recorded, Region
from kernelforge_metal.fetch import SHARED, Fetch, Landing
from kernelforge_metal.recorder import Recorder, Stream

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

MAX_SPARE = 4
"""Buffers of a size that are kept to be read from again."""


class Queue:
    """The queue of a device. Not for concurrent use by several threads."""

    def __init__(self, device: Any, errors: Callable[[str], AbstractContextManager[None]], name: str) -> None:
        """`errors`: turns what wgpu raises into a DeviceError, of something that cannot be done."""
        self._recorder = recorder = Recorder()
        self._ffi, self._lib, self._libf = recorder.ffi, recorder.lib, recorder.libf
        self._handle = device.queue._internal
        self._device, self._errors, self._name = device, errors, name
        self._threads = ThreadPoolExecutor(1, "kernelforge-record")
        self._mapped = 0
        self._map_info = self._map_callback()
        self._readback: Any = None  # where `download` copies to
        self._waiting: list[Recorded] = []  # to be submitted with what comes next
        self._meanwhile: list[Callable[[], None]] = []
        self._fetches: list[Fetch] = []  # asked for, their copies not yet recorded
        self._landings: list[Landing] = []  # of what was asked for since the last submission
        self._spare: dict[int, list[Any]] = {}

    # --- work ---

    def encoder(self) -> Encoder:
        with self._errors("record commands"):
            return Encoder(self._device, self._recorder)

    def record(self, stream: Stream, uniforms: Any) -> Callable[[], Recorded] | None:
        """Begin to record a command buffer with these dispatches in another thread; what is returned waits for it. None where
        Python would record call by call, as two threads that do would mostly wait for each other, and where no thread begins
        anything any more because the main one has ended."""
        with self._errors("record commands"):
            call = self._recorder.recording(self._device, stream, uniforms)
        if call is None:
            return None
        try:
            begun = self._threads.submit(call)
        except RuntimeError:
            return None

        def wait() -> Recorded:
            with self._errors("record commands"):
                return Recorded(begun.result())

        return wait

    def submit(self, recorded: Recorded) -> None:
        self._add(recorded)
        self.flush()

    def submit_soon(self, recorded: Recorded, meanwhile: Callable[[], None]) -> None:
        """Submit together with what is fetched next: at the latest before the host waits for anything or writes to a buffer.
        `meanwhile` is then called, while the GPU works."""
        self._add(recorded)
        self._meanwhile.append(meanwhile)

    def flush(self) -> None:
        """Submit what waits."""
        self._record_copies()
        if not self._waiting:
            return
        waiting, landings, meanwhile = self._waiting, self._landings, self._meanwhile
        self._waiting, self._landings, self._meanwhile = [], [], []
        number = self._submit(waiting)
        for landing in landings:
            landing.submission = number
        for call in meanwhile:
            call()

    def wait(self) -> None:
        """Until everything that was submitted is done."""
        self.flush()
        with self._errors("finish its work"):
            self._device._poll_wait()

    def _add(self, recorded: Recorded) -> None:
        """What was fetched before is copied before."""
        self._record_copies()
        self._waiting.append(recorded)

    def _submit(self, recorded: list[Recorded]) -> int:
        """The number of the submission."""
        with self._errors("run commands"):
            handles = self._ffi.new("WGPUCommandBuffer[]", [r.handle for r in recorded])
            return int(self._libf.wgpuQueueSubmitForIndex(self._handle, len(recorded), handles))

    # --- bytes ---

    def upload(self, buffer: Any, offset: int, array: Array) -> None:
        """Write the bytes of a C-contiguous array; they are padded with zeros to a multiple of 4."""
        raw = array.reshape(-1).view(np.uint8)
        step = 64 << 20
        if self._waiting or any(f.region.buffer is buffer for f in self._fetches):
            self.flush()
        with self._errors("take data"):
            for start in range(0, raw.size, step):
                part = raw[start : start + step]
                if part.size % 4:
                    part = np.concatenate([part, np.zeros(-part.size % 4, np.uint8)])
                data = self._ffi.from_buffer(part)
                self._libf.wgpuQueueWriteBuffer(self._handle, buffer._internal, offset + start, data, part.size)

    def download(self, region: Region) -> Array:
        """The bytes of a region; waits for what was submitted."""
        if region.nbytes == 0:
            return np.empty(0, np.uint8)
        if self._readback is None or self._readback.size < region.nbytes:
            self._readback = self.readable(region.nbytes)
        with self._errors("record commands"):
            encoder = self.encoder()
            encoder.copy(region, self._readback)
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
        fetch = self._landings[-1].place(region) if self._landings else None
        if fetch is None:
            size = max(SHARED, region.nbytes)
            spare = self._spare.get(size)
            self._landings.append(Landing(spare.pop() if spare else self.readable(size), size))
            fetch = self._landings[-1].place(region)
            assert fetch is not None
        if region.nbytes:
            self._fetches.append(fetch)
        return fetch

    def take(self, fetch: Fetch) -> Array:
        """Wait for what was submitted before the fetch; then its bytes. Once only. Raises DeviceError when they were never
        copied, because submitting failed."""
        nbytes, landing = fetch.region.nbytes, fetch.landing
        if landing.data is None and nbytes:
            if landing.submission is None or self._waiting:
                self.flush()
            if landing.submission is None:
                raise DeviceError(f"the GPU {self._name} did not run what was to be read", hint="run it again")
            landing.data = self.read(landing.target, landing.used, landing.submission)
        landing.left -= 1
        if landing.data is None:
            return np.empty(0, np.uint8)
        if not landing.left:
            spare = self._spare.setdefault(landing.size, [])
            if len(spare) < MAX_SPARE:
                spare.append(landing.target)
        return landing.data[fetch.at : fetch.at + nbytes]

    def _record_copies(self) -> None:
        """The copies of what was fetched, before anything that may change it."""
        if not self._fetches:
            return
        fetches, self._fetches = self._fetches, []
        with self._errors("record commands"):
            encoder = self.encoder()
            for fetch in fetches:
                encoder.copy(fetch.region, fetch.landing.target, fetch.at)
            self._waiting.append(encoder.finish())

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
