"""Where KernelForge keeps its state: `KERNELFORGE_HOME`, by default `~/.kernelforge`."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The state folder; it need not exist. Read on every call, so that a changed environment counts at once."""
    configured = os.environ.get("KERNELFORGE_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".kernelforge"


def records_file() -> Path:
    """Measurements: data, never removed by clearing a cache."""
    return home() / "autotune.jsonl"


def cache_folder() -> Path:
    """Compiled objects and packed weights: safe to delete."""
    return home() / "cache"


def plugins_folder() -> Path:
    """Which plugin versions were imported without ending the process."""
    return home() / "plugins"
