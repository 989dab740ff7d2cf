"""Every error that KernelForge raises on purpose, each with the exit code its command ends with.

A message says what went wrong and why; `hint` says what to do next (a flag, a command, a file to look at).
"""

from __future__ import annotations

from typing import ClassVar


class KernelForgeError(Exception):
    """Base of all errors a user can cause or cure. Commands print `str(error)`, then the hint, and exit with `exit_code`."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(KernelForgeError):
    """A request that cannot be meant: an unknown target, variant, flag or shape, a token id out of range."""

    exit_code = 2


class WrongResultError(KernelForgeError):
    """A kernel's output differs from its reference by more than the tolerance."""

    exit_code = 10


class DeviceError(KernelForgeError):
    """No usable device, or the package of the target is not installed."""

    exit_code = 11


class PluginError(KernelForgeError):
    """A plugin that was asked for by name failed, or a plugin's descriptor is invalid."""

    exit_code = 12


class AssetError(KernelForgeError):
    """A model, tokenizer, key or other file is missing or is not what it claims to be."""

    exit_code = 13


class RegressionError(KernelForgeError):
    """A benchmark is slower than its baseline."""

    exit_code = 14


class PartialResult(KernelForgeError):
    """Interrupted; what was measured so far is saved."""

    exit_code = 15


class KernelForgeWarning(UserWarning):
    """Something was done otherwise than asked, or not at all. Commands show each one once, on stderr and in the envelope."""
