"""The packed layout of quantised weights: panels of columns, each group by group, then the scales of all panels.

A group of 32 steps along the inner dimension of a panel of `width` columns is

- q8: 32 rows of `width` int8;
- q4: 4 rows of `width` 32-bit words, whose nibbles are eight steps of one column, in two's complement. The words are those
  of GGUF's blocks with the zero point taken off (v ^ 8 for v - 8), so that packing only moves words.

The scales are f16, [panels][groups][width]: one load gives those of a vector of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge_cpu.kernel import Pack

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Builder, Pointer, Value
    from kernelforge_cpu.kernel import Array

OCTET = 8
"""Steps whose weights are read together."""
NIBBLE = 4


@dataclass(frozen=True)
class Groups:
    """Panels of `vectors` vectors of `lanes` columns of a weight [columns, inner] in format `dtype`."""

    dtype: str
    vectors: int
    lanes: int
    columns: int
    inner: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        return -(-self.columns // self.width)

    @property
    def groups(self) -> int:
        """In the inner dimension."""
        return self.inner // GROUP

    @property
    def group_bytes(self) -> int:
        """Of a panel's group, without its scales."""
        return self.width * GROUP // (1 if self.dtype == "q8" else 2)

    @property
    def scales(self) -> int:
        """The byte at which the scales begin."""
        return self.panels * self.groups * self.group_bytes

    @property
    def nbytes(self) -> int:
        """Of the whole weight."""
        return self.scales + 2 * self.panels * self.groups * self.width

    @property
    def name(self) -> str:
        """The layout's."""
        return f"groups{self.width}:{self.dtype}"

    @property
    def pack(self) -> Pack:
        """The layout of a constant [columns, inner]."""
        return Pack(self.name, self.packed, lambda _: self.nbytes)

    def packed(self, weight: Array) -> Array:
        """Groups [columns, inner / 32] (see `kernelforge.quant`) as bytes; columns that are not there are zeros."""
        import numpy as np

        from kernelforge_cpu.store import aligned_empty

        out = aligned_empty(self.nbytes)
        element, steps = ("u1", GROUP) if self.dtype == "q8" else ("<u4", GROUP // OCTET)
        panels = out[: self.scales].view(element).reshape(self.panels, self.groups, steps, self.width)
        scales = out[self.scales :].view(np.float16).reshape(self.panels, self.groups, self.width)
        for panel in range(self.panels):
            part = weight[panel * self.width : (panel + 1) * self.width]
            values = np.ascontiguousarray(part["values"]).view(element)
            if self.dtype == "q4":
                values = values ^ np.uint32(0x88888888)
            panels[panel, :, :, : len(part)] = values.transpose(1, 2, 0)
            scales[panel, :, : len(part)] = part["scale"].T
            panels[panel, :, :, len(part) :] = 0
            scales[panel, :, len(part) :] = 0
        return out

    @property
    def stride(self) -> int:
        """Steps of the inner dimension from the first of one octet to the first of the next."""
        return OCTET if self.dtype == "q8" else GROUP // OCTET

    def step(self, i: int) -> int:
        """Which step of the group, after the octet's first, the octet's weight `i` belongs to."""
        return i if self.dtype == "q8" else i // 2 + GROUP // 2 * (i % 2)

    def load_octet(self, k: Builder, group: Pointer, octet: Value) -> list[list[Value]]:
        """The weights of eight steps, not scaled: for each, the vectors of the panel's columns. `group` counts i8."""
        if self.dtype == "q8":
            rows = group.at(octet * (OCTET * self.width))
            return [
                [rows.load_f32(i * self.width + v * self.lanes, self.lanes) for v in range(self.vectors)]
                for i in range(OCTET)
            ]
        row = group.of("i32").at(octet * self.width)
        words = [row.load(v * self.lanes, self.lanes) for v in range(self.vectors)]
        return [[_nibble(k, word, i) for word in words] for i in range(OCTET)]


def _nibble(k: Builder, words: Value, i: int) -> Value:
    """Nibble `i` of every word as f32."""
    if k.target.level == "x86-64-v4" and words.type.lanes == 16:
        # One instruction looks 16 numbers up by the lower four bits of each lane.
        table = k.consts([float(v - 16 if v >= 8 else v) for v in range(16)], "f32")
        return k.intrinsic(
            "llvm.x86.avx512.permvar.sf.512", table.type, table, k.shift_right_logical(words, NIBBLE * i)
        )
    top = 32 - NIBBLE
    return k.convert((words << (top - NIBBLE * i)) >> top, "f32")
