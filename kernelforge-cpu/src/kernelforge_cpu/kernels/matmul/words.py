"""The packed layout of quantised weights for integer products: panels of columns, one after the other, each its scales and
then its values.

A panel has `width` columns, one for each 32-bit lane of a vector. Its scales are f16, [groups][width], filled up to a cache
line. Its values are 32-bit words, [groups][words][width]: four int8 of a column for `q8`, eight nibbles for `q4`. The words
are those of `kernelforge.quant`, so that packing only moves them: of a q4 word i, byte j holds elements 4 i + j (low nibble)
and 16 + 4 i + j of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge_cpu.kernel import Pack
from kernelforge_cpu.store import ALIGNMENT

if TYPE_CHECKING:
    from kernelforge_cpu.kernel import Array

WORD = 4
"""Bytes that one instruction multiplies and adds up in a 32-bit lane."""


@dataclass(frozen=True)
class Words:
    """Panels of `width` columns of a weight [columns, inner] in format `dtype`."""

    dtype: str
    width: int
    columns: int
    inner: int

    @property
    def panels(self) -> int:
        return -(-self.columns // self.width)

    @property
    def groups(self) -> int:
        """In the inner dimension."""
        return self.inner // GROUP

    @property
    def words(self) -> int:
        """Of a column's group."""
        return GROUP // WORD // (1 if self.dtype == "q8" else 2)

    @property
    def group_bytes(self) -> int:
        """Of a panel's group, without its scales."""
        return self.words * self.width * WORD

    @property
    def scale_bytes(self) -> int:
        """Of a panel: where its values begin."""
        return -(-2 * self.groups * self.width // ALIGNMENT) * ALIGNMENT

    @property
    def panel_bytes(self) -> int:
        return self.scale_bytes + self.groups * self.group_bytes

    @property
    def name(self) -> str:
        """The layout's."""
        return f"words{self.width}:{self.dtype}"

    @property
    def pack(self) -> Pack:
        """The layout of a constant [columns, inner]."""
        return Pack(self.name, self.packed, lambda _: self.panels * self.panel_bytes)

    def packed(self, weight: Array) -> Array:
        """Groups [columns, inner / 32] (see `kernelforge.quant`) as bytes; columns that are not there are zeros."""
        import numpy as np

        from kernelforge_cpu.store import aligned_empty

        out = aligned_empty(self.panels * self.panel_bytes)
        for panel, block in enumerate(out.reshape(self.panels, self.panel_bytes)):
            part = weight[panel * self.width : (panel + 1) * self.width]
            scales = block[: self.scale_bytes].view(np.float16)
            values = block[self.scale_bytes :].view("<u4").reshape(self.groups, self.words, self.width)
            if len(part) < self.width or scales.size > self.groups * self.width:
                block[...] = 0
            scales[: self.groups * self.width].reshape(self.groups, self.width)[:, : len(part)] = part["scale"].T
            words = np.ascontiguousarray(part["values"]).view("<u4")
            values[:, :, : len(part)] = words.transpose(1, 2, 0)
        return out
