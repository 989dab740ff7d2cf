"""The GPU adapters of this machine, as wgpu lists them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernelforge.errors import DeviceError
from kernelforge.variant import ASYNCHRONOUS, INT8_ACTIVATIONS, DeviceInfo

_API = {"darwin": "Metal", "win32": "DX12"}.get(sys.platform, "Vulkan")
"""One API per system: with all of them wgpu lists a card once for each, and opens OpenGL to look for more."""

_KINDS = {"DiscreteGPU": "discrete", "IntegratedGPU": "integrated", "CPU": "software"}

SOFTWARE = "software"
"""The kind and the feature of an adapter that computes on the processor: for tests, not for speed."""

DOT4 = "dot4"
"""The feature of adapters that multiply four bytes by one instruction (`dot4I8Packed`). wgpu has the function everywhere and does
not tell where it is one instruction: Vulkan and DirectX 12 have one, which GPUs of the last ten years carry out as such; Metal
has none."""

COOPERATIVE = "cooperative-matrix"
"""The feature of adapters that multiply small matrices by a subgroup (`kernelforge_metal.cooperative`)."""

EXPERIMENTAL = frozenset({COOPERATIVE})
"""Features that wgpu may list and yet refuse."""

FEATURES = ("shader-f16", "subgroup", "timestamp-query", "immediates", COOPERATIVE)
"""The abilities that kernels may ask for."""

LIMITS = (
    "max-buffer-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-storage-size",
    "max-compute-workgroups-per-dimension",
    "max-storage-buffer-binding-size",
    "max-storage-buffers-per-shader-stage",
    "min-storage-buffer-offset-alignment",
)
"""The limits that decide what a kernel may look like: bytes and counts."""


@dataclass(frozen=True)
class Adapter:
    """What wgpu tells of an adapter."""

    name: str
    kind: str
    """"discrete", "integrated", "software" or "unknown"."""
    api: str
    """"Metal", "Vulkan" or "D3D12"."""
    driver: str
    ids: tuple[int, int]
    """PCI vendor and device."""
    features: frozenset[str]
    limits: tuple[tuple[str, int], ...]

    @property
    def info(self) -> DeviceInfo:
        """For selection: the features, less those that only an opened device can tell, "software" of a software adapter, "dot4"
        of those that are not used through Metal, and "int8-activations" where `gemv-quantising` runs and that is faster."""
        told = {ASYNCHRONOUS}
        if self.kind == SOFTWARE:
            told.add(SOFTWARE)
        if self.api != "Metal":
            told.add(DOT4)
            if self.kind != SOFTWARE and "subgroup" in self.features:
                told.add(INT8_ACTIVATIONS)
        return DeviceInfo(
            target="gpu",
            name=self.name,
            fingerprint=f"gpu/{self.api}/{self.ids[0]:04x}:{self.ids[1]:04x}/{self.name}/{self.driver}",
            features=self.features - EXPERIMENTAL | told,
            limits=self.limits,
        )


def from_wgpu(info: Mapping[str, Any], features: set[str], limits: Mapping[str, int]) -> Adapter:
    """An adapter from the three things that a `wgpu.GPUAdapter` has."""
    return Adapter(
        name=str(info["device"]),
        kind=_KINDS.get(info["adapter_type"], "unknown"),
        api=str(info["backend_type"]),
        driver=str(info["description"]),
        ids=(int(info["vendor_id"]), int(info["device_id"])),
        features=frozenset(name for name in FEATURES if name in features),
        limits=tuple((name, int(limits[name])) for name in LIMITS if name in limits),
    )


@cache
def list_adapters() -> tuple[Adapter, ...]:
    """The adapters, real hardware before software. Raises DeviceError when wgpu cannot look for them."""
    try:
        with _quiet_wayland():
            found = [from_wgpu(a.info, a.features, a.limits) for a in _ask_wgpu()]
    except Exception as error:
        raise DeviceError(f"wgpu cannot list the GPU adapters: {type(error).__name__}: {error}") from error
    return tuple(sorted(found, key=lambda adapter: adapter.kind == SOFTWARE))


def wgpu_adapter(adapter: Adapter) -> Any:
    """The `wgpu.GPUAdapter` that `adapter` was made from."""
    found = [(from_wgpu(a.info, a.features, a.limits), a) for a in _ask_wgpu()]
    return next(a for made, a in found if made.info.fingerprint == adapter.info.fingerprint)


@cache
def _ask_wgpu() -> list[Any]:
    import wgpu
    from wgpu.backends.wgpu_native import extras

    with suppress(RuntimeError):  # the process has used wgpu before: its choice of APIs holds
        extras.set_instance_extras(backends=[_API])
    return list(wgpu.gpu.enumerate_adapters_sync())


@contextmanager
def _quiet_wayland() -> Iterator[None]:
    """Vulkan drivers try Wayland, whose library prints to stderr where no session is: give it a folder without one."""
    if sys.platform != "linux" or "XDG_RUNTIME_DIR" in os.environ:
        yield
        return
    os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["XDG_RUNTIME_DIR"]
