"""The layouts of constant right-hand sides [columns, inner], which all matmul kernels share, and how WGSL reads them.

GEMV kernels read them in units: what a thread takes at a time, a few steps of the inner dimension in one or four columns, in
words of 16 bytes. Neighbouring threads read neighbouring words.

- f32, f16, bf16: the columns one after the other, each with its inner dimension padded with zeros to whole units. A unit is a
  word: 4 or 8 steps. Where nothing is padded that is the plain row-major [columns, inner].
- q8, q4: four columns together. Unit `i` of a quad is a vec4<u32>, a u32 for each column: the four int8 of steps 4 i to 4 i + 3
  (q8), or the eight nibbles of steps 8 i to 8 i + 7 (q4), of which the lower halves of the four bytes are the first four and
  the upper halves the last, so that a mask makes four numbers for a dot product of bytes. A unit lies in one group of 32: one
  scale. Behind all units are the scales, a vec2<u32> for each quad and group: the f16 scales of its four columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import GROUP, QUANTISED
from kernelforge_metal.kernel import Binding, Pack

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.variant import DeviceInfo

    Array = np.ndarray[Any, np.dtype[Any]]

WORD = 16
SCALES = 8
"""Bytes of the scales of a group in four columns."""
QUAD = 4
"""Columns of a quantised weight that are stored together."""
ALIGNED = 128
"""Columns of which every weight, and its scales, fill a whole number of 256-byte blocks: a binding begins at one."""
PADDED = 64
"""Columns of which the units of every weight do."""


@dataclass(frozen=True)
class Piece:
    """Columns of a weight that one dispatch reads: those that a binding can hold."""

    first: int
    columns: int
    whole: bool
    """There is no other piece."""


@dataclass(frozen=True)
class Rows:
    """A weight of floats."""

    dtype: str
    columns: int
    inner: int

    @property
    def steps(self) -> int:
        """Of the inner dimension in a unit."""
        return 4 if self.dtype == "f32" else 8

    @property
    def units(self) -> int:
        """Of a column."""
        return -(-self.inner // self.steps)

    @property
    def column_bytes(self) -> int:
        return WORD * self.units

    def packs(self, *, transposed: bool) -> Pack | None:
        """The layout of a constant [inner, columns], or of its transpose; None where it has it as it is."""
        pad = self.units * self.steps - self.inner
        if transposed and not pad:
            return None

        def packed(weight: Array) -> Array:
            import numpy as np

            return np.ascontiguousarray(np.pad(weight if transposed else weight.T, ((0, 0), (0, pad))))

        return Pack(f"columns:{'nk' if transposed else 'kn'}", packed)

    def bindings(self, name: str, index: int, piece: Piece, element: str) -> list[Binding]:
        if piece.whole:
            return [Binding(name, index, element)]
        return [
            Binding(name, index, element, piece.first * self.column_bytes, piece.columns * self.column_bytes),
        ]


@dataclass(frozen=True)
class Quads:
    """A quantised weight."""

    dtype: str
    columns: int
    inner: int

    @property
    def steps(self) -> int:
        """Of the inner dimension in a unit."""
        return 4 if self.dtype == "q8" else 8

    @property
    def units(self) -> int:
        """Of four columns."""
        return self.inner // self.steps

    @property
    def groups(self) -> int:
        return self.inner // GROUP

    @property
    def group_units(self) -> int:
        """Of a group."""
        return GROUP // self.steps

    @property
    def quads(self) -> int:
        """Padded with zeros, so that the scales begin at a multiple of 256 bytes."""
        return -(-self.columns // PADDED) * PADDED // QUAD

    @property
    def column_bytes(self) -> int:
        return WORD * self.units // QUAD

    def packs(self, *, transposed: bool = True) -> Pack:
        def packed(weight: Array) -> Array:
            import numpy as np

            padded = np.zeros((self.quads * QUAD, self.groups), weight.dtype)
            padded[: len(weight)] = weight
            quads = padded.reshape(self.quads, QUAD, self.groups)
            values = quads["values"]
            if self.dtype == "q4":
                values = np.concatenate([values & 15, values >> 4], axis=-1).reshape(*quads.shape, 4, 2, 4)
                values = values[..., 0, :] | values[..., 1, :] << 4
            units = values.reshape(self.quads, QUAD, self.units, 4).transpose(0, 2, 1, 3)
            parts = (units, quads["scale"].transpose(0, 2, 1))
            return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])

        return Pack(f"quads:{self.dtype}", packed)

    def bindings(self, name: str, index: int, piece: Piece, element: str = "vec4<u32>") -> list[Binding]:
        """Of the units, and of the scales as `<name>_scales`."""
        quads, first = (self.quads if piece.whole else piece.columns // QUAD), piece.first // QUAD
        unit, scale = WORD * self.units, SCALES * self.groups
        return [
            Binding(name, index, element, first * unit, quads * unit),
            Binding(f"{name}_scales", index, "vec2<u32>", self.quads * unit + first * scale, quads * scale),
        ]

    def functions(self, name: str) -> str:
        """`<name>_at(column, k)`: one number, for kernels that are not in a hurry."""
        word = f"{name}[(column >> 2u) * {self.units}u + k / {self.steps}u][column & 3u]"
        if self.dtype == "q8":
            value = f"f32(i32({word} << (24u - ((k & 3u) << 3u))) >> 24u)"
        else:
            value = f"(f32(({word} >> (((k & 3u) << 3u) + (k & 4u))) & 15u) - 8.0)"
        scale = f"{name}_scales[(column >> 2u) * {self.groups}u + k / {GROUP}u][(column >> 1u) & 1u]"
        return (
            f"fn {name}_at(column: u32, k: u32) -> f32 {{\n"
            f"  return {value} * unpack2x16float({scale} >> ((column & 1u) << 4u)).x;\n}}\n"
        )


Weights = Rows | Quads


def weights_of(dtype: str, columns: int, inner: int) -> Weights:
    return Quads(dtype, columns, inner) if dtype in QUANTISED else Rows(dtype, columns, inner)


def pieces(weights: Weights, device: DeviceInfo) -> Iterator[Piece]:
    """The weight in parts that may be bound at once."""
    limit = device.limit("max-storage-buffer-binding-size", 1 << 27)
    total = weights.column_bytes * (weights.quads * QUAD if isinstance(weights, Quads) else weights.columns)
    if total <= limit:
        yield Piece(0, weights.columns, True)
        return
    each = limit // weights.column_bytes // ALIGNED * ALIGNED
    for first in range(0, weights.columns, each):
        last = first + each >= weights.columns
        columns = weights.columns - first
        if isinstance(weights, Quads):
            columns = weights.quads * QUAD - first
        yield Piece(first, columns if last else each, False)
