"""Who brought a descriptor: stamped by the plugin loader, shown wherever the descriptor is named."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Provenance:
    plugin: str
    """Entry-point name."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({f'{self.distribution} {self.version}'.rstrip()})"


BUILTIN = Provenance("core", "kernelforge-core", "")
"""Until the loader stamps a descriptor, it counts as core's own."""
