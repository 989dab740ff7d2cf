"""The GPU as this package uses it: buffers, pipelines, bind groups, command streams, timestamps. Only this module,
`kernelforge_metal.queue`, `kernelforge_metal.encoder` and `kernelforge_metal.recorder` call wgpu for work; hot calls go to its C
functions directly, which wgpu-py's checks would make twice as expensive.

Everything that wgpu raises comes out as a DeviceError that says what to do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import DeviceError
from kernelforge_metal.adapters import EXPERIMENTAL, FEATURES, SOFTWARE, Adapter, wgpu_adapter
from kernelforge_metal.encoder import Encoder, Recorded, Region
from kernelforge_metal.errors import DeviceLost, OutOfMemory
from kernelforge_metal.queue import Queue

if TYPE_CHECKING:
    from kernelforge_metal.recorder import Command, Stream

    Array = np.ndarray[Any, np.dtype[Any]]

CHECKS = "KERNELFORGE_GPU_CHECKS"
"""Environment variable: 1 keeps wgpu's bounds and loop checks in all shaders."""

MAX_QUERIES = 4096
"""Timestamps of a query set, on every device."""


@dataclass(frozen=True)
class Pipeline:
    """A compiled shader and the layout of its bindings."""

    pipeline: Any
    layout: Any
    parameter_bytes: int


class Gpu:
    """An opened adapter, with those of the features that `adapter` names. Raises DeviceError when it cannot be opened."""

    def __init__(self, adapter: Adapter) -> None:
        from wgpu.backends.wgpu_native import ffi, lib

        self._ffi, self._lib = ffi, lib
        self.lock = RLock()
        """One run or transfer at a time: they share a queue, and a poll ends the mappings of all threads."""
        self.lost = False
        self.warm_at = -math.inf
        """When its clock was last known to be high, in seconds of `time.perf_counter`."""
        self.name = adapter.name
        self.discrete, self.software = adapter.kind == "discrete", adapter.kind == SOFTWARE
        with self._errors("open the device"):
            self.device, self.refused = _request(wgpu_adapter(adapter), adapter.features)
        self.queue = Queue(self.device, self._errors, self.name)
        self.features = frozenset(f for f in FEATURES if f in self.device.features)
        self.immediates = "immediates" in self.features
        self.alignment = max(64, self.limit("min-storage-buffer-offset-alignment"))
        self.checks = os.environ.get(CHECKS, "") not in ("", "0")
        self._pipelines: dict[tuple[str, tuple[bool, ...], int, bool], Pipeline] = {}
        self._layouts: dict[tuple[bool, ...], Any] = {}
        self._queries: Any = None

    @property
    def version(self) -> str:
        """Of wgpu's library, which compiles the shaders."""
        from wgpu.backends.wgpu_native import lib_version_info

        return ".".join(map(str, lib_version_info))

    def limit(self, name: str) -> int:
        """One of the device's limits by wgpu's name."""
        return int(self.device.limits[name])

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn wgpu's errors into DeviceErrors; those of the moment are OutOfMemory and DeviceLost."""
        if self.lost:
            raise DeviceLost(f"the GPU {self.name} was lost before it could {what}")
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            text = str(error).strip()
            kind = type(error).__name__
            if "OutOfMemory" in kind or "out of memory" in text.lower() or "not enough memory" in text.lower():
                raise OutOfMemory(
                    f"the GPU {self.name} has not enough memory to {what}",
                    hint="use smaller weights (--weights q4), a shorter context, or --target cpu",
                ) from error
            if "lost" in text.lower():
                self.lost = True
                raise DeviceLost(f"the GPU {self.name} was lost before it could {what}: {causes(text)}") from error
            raise DeviceError(f"the GPU {self.name} cannot {what}: {kind}: {text}") from error

    # --- memory ---

    def allocate(self, nbytes: int, what: str = "a buffer") -> Any:
        """A zeroed buffer of at least `nbytes`. Raises DeviceError when it is larger than a buffer may be, or does not fit."""
        from wgpu import BufferUsage

        size = max(256, -(-nbytes // 256) * 256)
        if size > self.limit("max-buffer-size"):
            raise DeviceError(
                f"{what} needs {size / 2**20:.0f} MiB, a buffer of {self.name} holds "
                f"{self.limit('max-buffer-size') / 2**20:.0f} MiB",
                hint="use smaller weights (--weights q4), a shorter context, or --target cpu",
            )
        with self._errors(f"allocate {size / 2**20:.0f} MiB for {what}"):
            usage = BufferUsage.STORAGE | BufferUsage.COPY_DST | BufferUsage.COPY_SRC | BufferUsage.UNIFORM
            return self.device.create_buffer(size=size, usage=usage)

    # --- code ---

    def pipeline(
        self, code: str, read_only: Sequence[bool], parameter_bytes: int, *, checked: bool, what: str
    ) -> Pipeline:
        """The pipeline of a shader with these bindings, compiled once. Raises DeviceError with wgpu's message."""
        key = (code, tuple(read_only), parameter_bytes, checked or self.checks)
        if key not in self._pipelines:
            with self._errors(f"compile {what}"):
                layout = self._bind_layout(tuple(read_only))
                groups = [layout]
                if parameter_bytes and not self.immediates:
                    groups.append(self.uniform_layout)
                module = self.device.create_shader_module(code=code) if key[3] else self._unchecked_module(code)
                made = self.device.create_compute_pipeline(
                    layout=self.device.create_pipeline_layout(
                        bind_group_layouts=groups, immediate_size=parameter_bytes if self.immediates else 0
                    ),
                    compute={"module": module, "entry_point": "main"},
                )
            self._pipelines[key] = Pipeline(made, layout, parameter_bytes)
        return self._pipelines[key]

    def _bind_layout(self, read_only: tuple[bool, ...]) -> Any:
        if read_only not in self._layouts:
            kinds = ["read-only-storage" if read else "storage" for read in read_only]
            entries = [{"binding": i, "visibility": 4, "buffer": {"type": kind}} for i, kind in enumerate(kinds)]
            self._layouts[read_only] = self.device.create_bind_group_layout(entries=entries)
        return self._layouts[read_only]

    @property
    def uniform_layout(self) -> Any:
        """Of the group that holds parameters on devices without immediates."""
        key = ()
        if key not in self._layouts:
            entry = {"binding": 0, "visibility": 4, "buffer": {"type": "uniform", "has_dynamic_offset": True}}
            self._layouts[key] = self.device.create_bind_group_layout(entries=[entry])
        return self._layouts[key]

    def _unchecked_module(self, code: str) -> Any:
        """A module without wgpu's bounds and loop checks, by a function that wgpu-py does not wrap."""
        from wgpu.backends.wgpu_native import _api

        data = code.encode()
        text = self._ffi.new("char[]", data)
        source = self._ffi.new("WGPUShaderSourceWGSL *")
        source.chain.next = self._ffi.NULL
        source.chain.sType = self._lib.WGPUSType_ShaderSourceWGSL
        source.code.data = text
        source.code.length = len(data)
        descriptor = self._ffi.new("WGPUShaderModuleDescriptor *")
        descriptor.nextInChain = self._ffi.cast("WGPUChainedStruct *", source)
        descriptor.label.data = self._ffi.NULL
        descriptor.label.length = 0
        made = _api.libf.wgpuDeviceCreateShaderModuleTrusted(self.device._internal, descriptor, 0)
        return _api.GPUShaderModule("", made, self.device)

    def bind_group(self, layout: Any, regions: Sequence[Region]) -> Any:
        """Raises DeviceError when a region is larger than a binding may be."""
        entries = [
            {"binding": i, "resource": {"buffer": r.buffer, "offset": r.offset, "size": r.nbytes}}
            for i, r in enumerate(regions)
        ]
        with self._errors("bind buffers"):
            return self.device.create_bind_group(layout=layout, entries=entries)

    # --- work ---

    def encode(
        self,
        encoder: Encoder,
        commands: Sequence[Command] | Stream,
        uniforms: Any = None,
        stamps: tuple[int, int] | None = None,
    ) -> None:
        """One compute pass with these dispatches; `stamps` are the queries that get the times of its start and end."""
        writes = None if stamps is None else (self.query_set, *stamps)
        with self._errors("record commands"):
            encoder.compute(commands, uniforms, writes)

    def finish(self, encoder: Encoder) -> Recorded:
        """What was encoded, checked and ready to be submitted once."""
        with self._errors("record commands"):
            return encoder.finish()

    # --- timestamps ---

    @property
    def has_timestamps(self) -> bool:
        return "timestamp-query" in self.features

    @property
    def query_set(self) -> Any:
        if self._queries is None:
            from wgpu import BufferUsage

            with self._errors("make timestamps"):
                self._queries = self.device.create_query_set(type="timestamp", count=MAX_QUERIES)
                usage = BufferUsage.QUERY_RESOLVE | BufferUsage.COPY_SRC
                self._resolved = self.device.create_buffer(size=8 * MAX_QUERIES, usage=usage)
        return self._queries

    def resolve(self, encoder: Encoder, count: int) -> None:
        """Encode the reading of the first `count` timestamps; `timestamps` returns them once submitted."""
        encoder.resolve(self.query_set, count, self._resolved)

    def timestamps(self, count: int) -> Array:
        """Seconds, float64, of the first `count` queries."""
        ticks = self.queue.download(Region(self._resolved, 0, 8 * count)).view(np.uint64)
        period = float(self._lib.wgpuQueueGetTimestampPeriod(self.device.queue._internal))
        return np.asarray((ticks - ticks.min()).astype(np.float64) * period * 1e-9)

    def pointer(self, words: Array) -> Any:
        """A C pointer to an array's first byte; the array must be kept."""
        return self._ffi.cast("void *", words.ctypes.data)


def causes(text: str, width: int = 200) -> str:
    """What wgpu says, in one line: its error, then what caused it, the last of which says most, each of at most `width`
    characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip() not in ("", "Caused by:")]
    return ": ".join(line if len(line) <= width else f"{line[:width]}..." for line in [*lines[:1], *lines[1:][-3:]])


def _request(adapter: Any, wanted: Collection[str]) -> tuple[Any, dict[str, str]]:
    """A `wgpu.GPUDevice` with all of these features, or with those that can be had one by one; and why it has not the others."""
    refused: dict[str, str] = {}

    def asked(features: Collection[str]) -> Any:
        try:
            return adapter.request_device_sync(required_features=sorted(features))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            refused.update(dict.fromkeys(features, lines[-1] if lines else type(error).__name__))
            return None

    if (device := asked(wanted)) is not None:
        return device, {}
    if EXPERIMENTAL & set(wanted) and (device := asked(set(wanted) - EXPERIMENTAL)) is not None:
        return device, {name: refused[name] for name in EXPERIMENTAL & set(wanted)}
    granted = {feature for feature in sorted(wanted) if asked([feature]) is not None}
    device = adapter.request_device_sync(required_features=sorted(granted))
    return device, {name: text for name, text in refused.items() if name not in granted}
