"""Bytes on their way from the GPU to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kernelforge_metal.encoder import Region

Array = np.ndarray[Any, np.dtype[Any]]

SHARED = 4096
"""Bytes of a landing that several fetches of a submission share: mapping it costs more than copying some bytes."""


@dataclass(eq=False)
class Landing:
    """A buffer that the host reads."""

    target: Any
    size: int
    used: int = 0
    """Bytes."""
    left: int = 0
    """Fetches that have not been taken."""
    submission: int | None = None
    """The number of the submission that copies to it."""
    data: Array | None = None
    """Its bytes, once the host has them."""

    def place(self, region: Region) -> Fetch | None:
        """A fetch to the next free bytes, if they are enough."""
        if self.used + region.nbytes > self.size:
            return None
        fetch = Fetch(region, self, self.used)
        self.used += -(-region.nbytes // 8) * 8
        self.left += 1
        return fetch


@dataclass(eq=False)
class Fetch:
    """A reading of a region that was asked for."""

    region: Region
    landing: Landing
    at: int
    """Byte of the landing that its bytes go to."""
