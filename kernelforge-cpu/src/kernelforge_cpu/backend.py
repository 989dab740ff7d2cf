"""The CPU backend: one device, the host's processor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError
from kernelforge.variant import INT8_ACTIVATIONS, DeviceInfo

if TYPE_CHECKING:
    from kernelforge_cpu.device import CpuDevice

WITH_INTEGERS = {"ssse3", "avx2", "asimddp"}
"""Features that the integer kernels need one of: see `kernelforge_cpu.kernels.matmul.integer`."""


class CpuBackend:
    """See `kernelforge.backend.Backend`."""

    def devices(self) -> Sequence[DeviceInfo]:
        return (host_info(default_threads()),)

    def open(self, device: str | None = None, *, threads: int | None = None) -> CpuDevice:
        """The host's processor. Raises UsageError for another device name or a thread count below 1."""
        from kernelforge_cpu.device import CpuDevice
        from kernelforge_cpu.team import get_team

        info = host_info(threads if threads is not None else default_threads())
        if device not in (None, info.name):
            raise UsageError(f"the cpu target has no device '{device}'", hint=f"it has '{info.name}'")
        return CpuDevice(info, get_team(info.threads))


def default_threads() -> int:
    """KERNELFORGE_NUM_THREADS, else the physical cores this process may use."""
    from kernelforge_cpu.team import default_threads as of_team

    return of_team()


@cache
def host_info(threads: int) -> DeviceInfo:
    """The host's processor as selection sees it, for a team of `threads`."""
    from kernelforge.machine import probe
    from kernelforge_cpu.isa import host_target

    if threads < 1:
        raise UsageError(f"{threads} threads", hint="give at least 1 (--threads, KERNELFORGE_NUM_THREADS)")
    machine, target = probe(), host_target()
    limits = {
        "vector_bytes": 4 * target.lanes,
        "l1d_bytes": machine.l1d_bytes,
        "l2_bytes": machine.l2_bytes,
        "l3_bytes": machine.l3_bytes,
    }
    return DeviceInfo(
        target="cpu",
        name=machine.cpu,
        fingerprint=f"{machine.fingerprint}/t{threads}",
        features=machine.features | {target.cpu} | ({INT8_ACTIVATIONS} if machine.features & WITH_INTEGERS else set()),
        limits=tuple(sorted((k, v) for k, v in limits.items() if v)),
        threads=threads,
    )
