"""What a device can do at most: the limits that every op meets, measured by kernels that do nothing else, kept on disk.

An op of so many operations and bytes takes at least the longer of operations / peak and bytes / bandwidth (S. Williams,
A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", 2009).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kernelforge import home
from kernelforge.errors import PluginError
from kernelforge.lazy import resolve

if TYPE_CHECKING:
    from kernelforge.backend import Device
    from kernelforge.op import Cost
    from kernelforge.registry import Registry
    from kernelforge.variant import Arithmetic, DeviceInfo

_FORMAT = 1

Limit = Literal["memory", "compute"]
"""What work meets first: the bandwidth of the memory, or the peak of its arithmetic."""


@dataclass(frozen=True)
class Peaks:
    """Of a whole device, or of one of its threads. Raises PluginError for numbers that are not positive."""

    bytes_s: float
    """Bytes per second, read from memory that no cache holds."""
    flops: float
    """f32 operations per second, two in a fused multiply-add."""
    int8_ops: float | None = None
    """Operations per second of the instruction that multiplies bytes and adds neighbours; None where there is none."""

    def __post_init__(self) -> None:
        numbers = [self.bytes_s, self.flops, *([] if self.int8_ops is None else [self.int8_ops])]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) and n > 0 for n in numbers):
            raise PluginError(f"a roofline needs positive numbers, got {numbers}")


@dataclass(frozen=True)
class Standing:
    """An op's speed beside the limits."""

    memory: float
    """Share of the bandwidth. Above 1: its operands came from a cache."""
    compute: float
    """Share of the peak of its kernel's arithmetic."""
    limit: Limit
    """What it meets first when its kernel is perfect."""
    least: float
    """Seconds that a perfect kernel takes."""


@dataclass(frozen=True)
class Roofline:
    """The limits of a device."""

    device: Peaks
    """All its threads together."""
    thread: Peaks | None = None
    """One alone; None where a device has no such thing."""
    timing_source: str = "host-clock"
    """As that of `kernelforge.backend.Timing`."""

    def standing(self, cost: Cost, seconds: float, arithmetic: Arithmetic = "f32") -> Standing:
        """Where work that took `seconds` stands. Work on bytes is compared with the f32 peak where they have none."""
        peak = self.device.int8_ops if arithmetic == "int8" and self.device.int8_ops else self.device.flops
        reading, computing = cost.bytes / self.device.bytes_s, cost.flops / peak
        limit: Limit = "memory" if reading >= computing else "compute"
        return Standing(reading / seconds, computing / seconds, limit, max(reading, computing))

    def as_data(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Roofline:
        """The inverse of `as_data`. Raises KeyError, TypeError or PluginError for other data."""
        thread = data["thread"]
        return cls(Peaks(**data["device"]), None if thread is None else Peaks(**thread), str(data["timing_source"]))

    def __str__(self) -> str:
        per_thread = "" if self.thread in (None, self.device) else f" (one thread: {_words(self.thread)})"
        return _words(self.device) + per_thread


def _words(peaks: Peaks) -> str:
    int8 = "" if peaks.int8_ops is None else f", int8 {peaks.int8_ops / 1e9:.0f} Gop/s"
    return f"memory {peaks.bytes_s / 1e9:.1f} GB/s, f32 {peaks.flops / 1e9:.0f} GFLOP/s{int8}"


STANDING_HEADERS = ["of memory", "of peak", "limit"]
"""Of `standing_cells`."""


def standing_data(at: Standing | None) -> dict[str, Any]:
    """As plain values: shares of the bandwidth and of the peak, and which limit comes first."""
    return {
        "of_bandwidth": None if at is None else float(f"{at.memory:.4g}"),
        "of_peak": None if at is None else float(f"{at.compute:.4g}"),
        "limit": None if at is None else at.limit,
    }


def standing_cells(at: Standing | None) -> list[str]:
    """As cells of a table."""
    return ["", "", ""] if at is None else [f"{at.memory:.0%}", f"{at.compute:.0%}", at.limit]


def kept_roofline(info: DeviceInfo) -> Roofline | None:
    """What was measured on this device before; None when nothing was, or the file is damaged."""
    try:
        kept = json.loads(_file(info).read_text(encoding="utf-8"))
        return Roofline.from_data(kept["roofline"]) if kept["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, PluginError):
        return None


def device_roofline(device: Device, registry: Registry, *, again: bool = False) -> Roofline | None:
    """The limits of an open device: those on disk, or measured now, which takes about a second, and kept.

    `again` measures in any case. None when the target's `BackendSpec` offers no measurement. Raises PluginError when it
    gives something else.
    """
    measure = registry.backend_spec(device.info.target).roofline
    if measure is None:
        return None
    if not again and (kept := kept_roofline(device.info)) is not None:
        return kept
    found = resolve(measure)(device)
    if not isinstance(found, Roofline):
        raise PluginError(f"the roofline of target '{device.info.target}' is {found!r}, wants a Roofline")
    _keep(device.info, found)
    return found


def _keep(info: DeviceInfo, roofline: Roofline) -> None:
    """A folder that cannot be written costs measuring again, nothing else."""
    content = {"format": _FORMAT, "device": info.name, "fingerprint": info.fingerprint, "roofline": roofline.as_data()}
    try:
        home.write_atomic(_file(info), json.dumps(content, indent=1) + "\n")
    except OSError:
        return


def _file(info: DeviceInfo) -> Path:
    key = hashlib.sha256(f"{info.target}\0{info.fingerprint}".encode()).hexdigest()[:16]
    return home.cache_dir() / "roofline" / f"{key}.json"
