"""What can be wrong with a GPU for the moment, and says nothing of what was asked of it."""

from __future__ import annotations

from kernelforge.errors import DeviceError

LOST_HINT = (
    "its driver gave it up: after work that took too long, a fault, or because it was taken away; the system's log "
    "(such as dmesg) may say which. Run the command again, or use --target cpu"
)


class OutOfMemory(DeviceError):
    """Less work, or the same another time, may fit."""


class DeviceLost(DeviceError):
    """Nothing runs on this device any more; it can be opened again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint=LOST_HINT)
