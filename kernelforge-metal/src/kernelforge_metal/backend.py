"""The target `gpu`: finds the machine's adapters and opens one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelforge.errors import DeviceError, KernelForgeWarning, UsageError
from kernelforge.variant import DeviceInfo
from kernelforge_metal.adapters import SOFTWARE, Adapter, list_adapters

if TYPE_CHECKING:
    from kernelforge_metal.device import GpuDevice

CHOICE = "KERNELFORGE_GPU"
"""Environment variable: the name of an adapter, or a part of it."""

WITHOUT = "KERNELFORGE_GPU_WITHOUT"
"""Environment variable: features not to use, separated by commas, to find out which one a driver gets wrong."""

_DRIVERS = {
    "linux": "install the GPU's Vulkan driver and loader (libvulkan1); mesa-vulkan-drivers has one that needs no GPU",
    "win32": "install the GPU's driver (DirectX 12)",
    "darwin": "Metal needs macOS 11 or later, not in a virtual machine",
}


class GpuBackend:
    """See `kernelforge.backend.Backend`."""

    def devices(self) -> Sequence[DeviceInfo]:
        return tuple(adapter.info for adapter in list_adapters())

    def open(self, device: str | None = None, *, threads: int | None = None) -> GpuDevice:
        """Open an adapter by name or a part of it: the given one, else that of KERNELFORGE_GPU, else the first, hardware before
        software. Raises UsageError for a name that no adapter has, or that several have; DeviceError when there is none."""
        from kernelforge_metal.cooperative import examine
        from kernelforge_metal.device import GpuDevice
        from kernelforge_metal.native import Gpu

        adapter = choose(list_adapters(), device or os.environ.get(CHOICE) or None)
        without = {name.strip() for name in os.environ.get(WITHOUT, "").split(",")}
        gpu = Gpu(replace(adapter, features=adapter.features - without))
        if adapter.kind == SOFTWARE:
            text = f"{adapter.name} is a software GPU: it computes on the processor, slowly"
            warnings.warn(KernelForgeWarning(text), stacklevel=2)
        return GpuDevice(examine(gpu, adapter), gpu)


def choose(adapters: Sequence[Adapter], name: str | None) -> Adapter:
    """The adapter that `name` names, else the first. Raises as `GpuBackend.open` does."""
    if not adapters:
        driver = _DRIVERS.get(sys.platform, "install the GPU's Vulkan driver")
        raise DeviceError("there is no GPU adapter here", hint=f"{driver}, or use --target cpu")
    if name is None:
        return adapters[0]
    names = ", ".join(f"'{a.name}'" for a in adapters)
    found = [a for a in adapters if a.name == name] or [a for a in adapters if name.lower() in a.name.lower()]
    if not found:
        raise UsageError(f"the gpu target has no device '{name}'", hint=f"it has: {names}")
    if len({a.name for a in found}) > 1:
        raise UsageError(f"several devices of the gpu target are called '{name}'", hint=f"name one of: {names}")
    return found[0]
