"""The layouts of constant right-hand sides [columns, inner], which all matmul kernels share, and how WGSL reads them.

GEMV kernels read them in units: what a thread takes at a time, a few steps of the inner dimension in one or four columns, in
words of 16 bytes. Neighbouring threads read neighbouring words.

- f32, f16, bf16: the columns one after the other, each with its inner dimension padded with zeros to whole units. A unit is a
  word: 4 or 8 steps. Where nothing is padded that is the plain row-major [columns, inner].
- q8, q4: four columns together, in pairs of groups of 32. Unit `o` (0 to 7) of a pair holds the steps 4 o to 4 o + 3 of both
  groups: a u32 of four int8 for each column and group (q8: a word for each group), or a u32 of eight nibbles for each column,
  the first group's in the lower half (q4). Behind all units are the scales, a word for a pair: the f16 scales of the first
  group for the four columns, then those of the second.
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
PAIR = 2 * GROUP
OCTETS = 8
"""Units of a pair of groups."""
QUAD = 4
"""Columns of a quantised weight that are stored together."""
ALIGNED = 64
"""Columns of which every weight fills a whole number of 256-byte blocks: a binding begins at one."""


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
    def pairs(self) -> int:
        return -(-self.inner // PAIR)

    @property
    def units(self) -> int:
        """Of four columns."""
        return self.pairs * OCTETS

    @property
    def words(self) -> int:
        """Of a unit."""
        return 2 if self.dtype == "q8" else 1

    @property
    def quads(self) -> int:
        """Padded with zeros, so that the scales begin at a multiple of 256 bytes."""
        return -(-self.columns // ALIGNED) * ALIGNED // QUAD

    @property
    def column_bytes(self) -> int:
        return WORD * self.units * self.words // QUAD

    def packs(self, *, transposed: bool = True) -> Pack:
        def packed(weight: Array) -> Array:
            import numpy as np

            columns, groups = weight.shape
            wide = np.zeros((self.quads * QUAD, 2 * self.pairs), weight.dtype)
            wide[:columns, :groups] = weight
            grid = wide.reshape(self.quads, QUAD, self.pairs, 2)
            scales = np.ascontiguousarray(grid["scale"].transpose(0, 2, 3, 1))
            values = grid["values"]
            if self.dtype == "q4":
                values = np.concatenate([values & 15, values >> 4], axis=-1)
            values = values.reshape(self.quads, QUAD, self.pairs, 2, OCTETS, 4)
            if self.dtype == "q8":
                units = values.transpose(0, 2, 3, 4, 1, 5)
            else:
                units = (values[..., 0::2] | values[..., 1::2] << 4).transpose(0, 2, 4, 1, 3, 5)
            parts = (np.ascontiguousarray(units), scales)
            return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

        return Pack(f"quads:{self.dtype}", packed)

    def bindings(self, name: str, index: int, piece: Piece, element: str = "vec4<u32>") -> list[Binding]:
        """Of the units, and of the scales as `<name>_scales`."""
        quads, first = (self.quads if piece.whole else piece.columns // QUAD), piece.first // QUAD
        unit, scale = WORD * self.units * self.words, WORD * self.pairs
        return [
            Binding(name, index, element, first * unit, quads * unit),
            Binding(f"{name}_scales", index, element, self.quads * unit + first * scale, quads * scale),
        ]

    def functions(self, name: str) -> str:
        """`<name>_at(column, k)`: one number, for kernels that are not in a hurry."""
        at, half = f"(column >> 2u) * {self.units * self.words}u", "((k >> 5u) & 1u)"
        if self.dtype == "q8":
            word = f"{name}[{at} + (k >> 6u) * 16u + {half} * 8u + ((k >> 2u) & 7u)][column & 3u]"
            value = f"f32(i32({word} << (24u - ((k & 3u) << 3u))) >> 24u)"
        else:
            word = f"{name}[{at} + (k >> 6u) * 8u + ((k >> 2u) & 7u)][column & 3u]"
            value = f"(f32(({word} >> (({half} << 4u) + ((k & 3u) << 2u))) & 15u) - 8.0)"
        scale = f"{name}_scales[(column >> 2u) * {self.pairs}u + (k >> 6u)][{half} * 2u + ((column >> 1u) & 1u)]"
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
