"""The target `gpu`: it finds the machine's adapters. This version has no GPU kernels, so none can be opened."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from kernelforge.errors import DeviceError, UsageError
from kernelforge.variant import DeviceInfo
from kernelforge_metal.adapters import list_adapters

_DRIVERS = {
    "linux": "install the GPU's Vulkan driver and loader (libvulkan1); mesa-vulkan-drivers has one that needs no GPU",
    "win32": "install the GPU's driver (DirectX 12)",
    "darwin": "Metal needs macOS 11 or later, not in a virtual machine",
}


class GpuBackend:
    """See `kernelforge.backend.Backend`."""

    def devices(self) -> Sequence[DeviceInfo]:
        return tuple(adapter.info for adapter in list_adapters())

    def open(self, device: str | None = None, *, threads: int | None = None) -> NoReturn:
        """Raises UsageError for a name that no adapter has, else DeviceError: nothing can run on a GPU yet."""
        names = [info.name for info in self.devices()]
        if not names:
            driver = _DRIVERS.get(sys.platform, "install the GPU's Vulkan driver")
            raise DeviceError("there is no GPU adapter here", hint=f"{driver}, or use --target cpu")
        if device is not None and device not in names:
            raise UsageError(f"the gpu target has no device '{device}'", hint=f"it has: {', '.join(names)}")
        raise DeviceError(
            f"this version of kernelforge-metal has no kernels for {device or names[0]} yet: it only lists GPUs",
            hint="use --target cpu",
        )
