"""What is known of cores beside the instructions that they have: measured, see docs/performance.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo

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


def widens_free(device: DeviceInfo) -> bool:
    """Whether 16-bit vectors become f32 in other units than those that multiply and add 512 bits."""
    return ZEN5 in device.features
