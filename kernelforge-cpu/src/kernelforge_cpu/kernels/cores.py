"""What is known of cores beside the instructions that they have: measured, see docs/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo

LINE = 64
"""Bytes that are asked of memory at a time, on any core."""
ZEN5 = "znver5"
"""By LLVM's name, which is among a device's features."""


def reads_far(device: DeviceInfo) -> bool:
    """Whether what is read once comes faster from memory as one stream that is asked for far ahead than as several: where L1
    waits for many lines at once. On Zen 5 by a tenth to a quarter; on Zen 3 it is the other way round."""
    return ZEN5 in device.features


def in_flight(device: DeviceInfo) -> int:
    """Bytes of weights that are asked for ahead of use, over all streams together: what memory delivers to a core within its
    latency. Much more pushes lines out before they are used."""
    return 8192 if reads_far(device) else 2048


def rows_widened_once(device: DeviceInfo) -> dict[str, int]:
    """With AVX-512, by type of 16 bits: rows of a product from where on its weights are kept as f32. The instruction that widens
    a vector takes the place of a multiply-add; on Zen 5 those of bf16 do not, and that of f16 does in part."""
    return {"f16": 256} if ZEN5 in device.features else {"f16": 64, "bf16": 64}
