"""The tiles of a GEMM in integers: words of four int8 in workgroup memory, with the scales of their groups beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from kernelforge.dtype import GROUP
from kernelforge_metal.kernels.matmul.sources import BLOCK, Groups, Packed
from kernelforge_metal.kernels.matmul.tile import Slab, Tile
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads
from kernelforge_metal.kernels.quantised_activations import GROUP_WORDS

WORDS = GROUP // 4
"""Of a group."""
ZERO = 0x4B400000
"""The bits of 1.5 * 2^23: integers that are added to it are added to the float."""


@dataclass(frozen=True)
class WordTile(Tile):
    """`steps` are those of whole groups, a word for each four, of which a group's or one are written out (`unroll`, in steps)."""

    at_once: int
    """Columns of a thread's whose integer sums are in registers at once."""

    @property
    def groups(self) -> int:
        """Of a slab."""
        return self.steps // GROUP

    def stride(self, extent: int) -> int:
        """Vectors from one word of all rows to the next: odd, so that neighbouring words hit different banks."""
        return extent // BLOCK + 1

    def shared_bytes(self, rhs: int) -> int:
        """Of words, scales, and where the sums of rows begin."""
        words = self.groups * WORDS * (self.stride(self.rows) + rhs * self.stride(self.columns))
        return 16 * (words + self.groups * (2 * self.rows + rhs * self.columns) // BLOCK)


@dataclass(frozen=True)
class Words(Slab):
    """One operand's part of a tile, word by word: a vec4<u32> of four rows (or columns), a vec4<f32> of their scales for a group.

    A thread loads units, a vec4<u32> each in its registers; a thread for four rows and a group loads the scales.
    """

    tile: WordTile

    @property
    @abstractmethod
    def units(self) -> int:
        """Of a group in four rows."""

    @property
    @abstractmethod
    def all_groups(self) -> int:
        """Of a row."""

    @property
    @abstractmethod
    def ragged(self) -> bool:
        """Whether the last slab is not full."""

    @abstractmethod
    def place(self, n: str) -> Iterator[str]:
        """Where four rows begin in the array."""

    @abstractmethod
    def unit(self, n: str) -> str:
        """Unit `u` of group `g` of such rows."""

    @abstractmethod
    def heads(self, n: str) -> Iterator[str]:
        """Loads the scales of group `g`, and what else there is for a group."""

    @abstractmethod
    def store_unit(self, n: str) -> Iterator[str]: ...

    @abstractmethod
    def store_heads(self, n: str) -> Iterator[str]:
        """At element `at` of arrays that have one for each group and four rows."""

    @property
    def quads(self) -> int:
        """Fours of rows."""
        return self.extent // BLOCK

    @property
    def declaration(self) -> str:
        name, groups = self.name, self.tile.groups
        return (
            f"var<workgroup> {name}_words: array<vec4<u32>, {self.stride * groups * WORDS}>;\n"
            f"var<workgroup> {name}_scale: array<vec4<f32>, {self.quads * groups}>;\n"
        )

    @property
    def count(self) -> int:
        """Units of all threads."""
        return self.quads * self.units * self.tile.groups

    @property
    def blocks(self) -> list[str]:
        """Names of a thread's units."""
        return [f"{self.name}{i}" for i in range(max(1, self.count // self.tile.threads))]

    @property
    def with_unit(self) -> str:
        """The condition of threads that have one."""
        return f"if (t < {self.count}u) " if self.count < self.tile.threads else ""

    @property
    def with_heads(self) -> str:
        return f"if (t < {self.quads * self.tile.groups}u)"

    def setup(self) -> Iterator[str]:
        each, head = self.units * self.tile.groups, f"{self.name}h"
        for i, n in enumerate(self.blocks):
            number = f"min(t, {self.count - 1}u)" if self.with_unit else f"(t + {i * self.tile.threads}u)"
            yield f"let {n}_k = {number} % {each}u; let {n}_r = {number} / {each}u;"
            yield from self.place(n)
            yield f"var {n}_w = vec4<u32>();"
        yield f"let {head}_k = t % {self.tile.groups}u; let {head}_r = min(t / {self.tile.groups}u, {self.quads - 1}u);"
        yield from self.place(head)
        yield f"var {head}_s = vec4<u32>(); var {head}_z = vec4<u32>();"

    def load(self, slab: str) -> Iterator[str]:
        inside, head = f"if (g < {self.all_groups}u) " if self.ragged else "", f"{self.name}h"
        for n in self.blocks:
            yield f"{self.with_unit}{{ let g = {slab} * {self.tile.groups}u + {n}_k / {self.units}u;"
            yield f"{inside}{{ let u = {n}_k % {self.units}u; {n}_w = {self.unit(n)}; }} }}"
        yield f"{self.with_heads} {{ let g = {slab} * {self.tile.groups}u + {head}_k;"
        if inside:
            yield f"{head}_s = vec4<u32>();"
        yield f"{inside}{{"
        yield from self.heads(head)
        yield "} }"

    def store(self, slab: int = 0) -> Iterator[str]:
        head = f"{self.name}h"
        for n in self.blocks:
            yield f"{self.with_unit}{{"
            yield from self.store_unit(n)
            yield "}"
        yield f"{self.with_heads} {{ let at = {head}_k * {self.quads}u + {head}_r;"
        yield from self.store_heads(head)
        yield "}"

    def put(self, word: str, row: str, value: str) -> str:
        return f"{self.name}_words[({word}) * {self.stride}u + {row}] = {value};"


@dataclass(frozen=True)
class RowWords(Words):
    """Of activations: a unit is a word of four rows. `<name>_begin` is where the sums of rows begin."""

    source: Groups
    eights: bool
    """They begin at `ZERO` less the row's eights."""

    units = WORDS

    @property
    def all_groups(self) -> int:
        return self.source.inner // GROUP

    @property
    def ragged(self) -> bool:
        return self.source.ragged

    @property
    def declaration(self) -> str:
        begin = f"var<workgroup> {self.name}_begin: array<vec4<i32>, {self.quads * self.tile.groups}>;\n"
        return super().declaration + (begin if self.eights else "")

    def place(self, n: str) -> Iterator[str]:
        source = self.source
        for r in range(BLOCK):
            row = f"(row0 + {n}_r * {BLOCK}u + {r}u)"
            at = row if source.last is None else f"min({row}, {source.last})"
            yield f"let {n}_p{r} = ({source.start} + {at} * {source.row_step}u) / {GROUP}u * {GROUP_WORDS}u;"

    def _word(self, n: str, word: str) -> str:
        """A word of group `g`, of four rows."""
        words = (f"{self.source.name}[{n}_p{r} + g * {GROUP_WORDS}u + {word}]" for r in range(BLOCK))
        return f"vec4<u32>({', '.join(words)})"

    def unit(self, n: str) -> str:
        return self._word(n, "2u + u")

    def heads(self, n: str) -> Iterator[str]:
        yield f"{n}_s = {self._word(n, '0u')};"
        if self.eights:
            yield f"{n}_z = {self._word(n, '1u')};"

    def store_unit(self, n: str) -> Iterator[str]:
        yield self.put(f"{n}_k", f"{n}_r", f"{n}_w")

    def store_heads(self, n: str) -> Iterator[str]:
        yield f"{self.name}_scale[at] = bitcast<vec4<f32>>({n}_s);"
        if self.eights:
            yield f"let z = bitcast<vec4<i32>>({n}_z); let half = vec4<u32>(16u);"
            yield f"{self.name}_begin[at] = vec4<i32>({ZERO}) - ((z << half) >> half) - (z >> half);"


@dataclass(frozen=True)
class ColumnWords(Words):
    """Of weights: a unit is a vec4<u32> as it is stored, of q4 one of eight steps."""

    source: Packed

    @property
    def weights(self) -> Quads:
        assert isinstance(self.source.weights, Quads)
        return self.source.weights

    @property
    def units(self) -> int:
        return self.weights.group_units

    @property
    def all_groups(self) -> int:
        return self.weights.groups

    @property
    def ragged(self) -> bool:
        return self.source.ragged

    def place(self, n: str) -> Iterator[str]:
        quad, last = f"column0 / {QUAD}u + {n}_r", self.source.last
        yield f"let {n}_p = {quad if last is None else f'min({quad}, {last})'};"

    def unit(self, n: str) -> str:
        return f"{self.source.name}[{n}_p * {self.weights.units}u + g * {self.units}u + u]"

    def heads(self, n: str) -> Iterator[str]:
        yield f"{n}_s = vec4<u32>({self.source.name}_scales[{n}_p * {self.all_groups}u + g], 0u, 0u);"

    def store_unit(self, n: str) -> Iterator[str]:
        if self.units == WORDS:
            yield self.put(f"{n}_k", f"{n}_r", f"{n}_w")
            return
        for half in range(2):
            nibbles = f"({n}_w >> vec4<u32>({4 * half}u)) & vec4<u32>(0x0f0f0f0fu)"
            yield self.put(f"2u * {n}_k + {half}u", f"{n}_r", nibbles)

    def store_heads(self, n: str) -> Iterator[str]:
        yield f"{self.name}_scale[at] = vec4<f32>(unpack2x16float({n}_s.x), unpack2x16float({n}_s.y));"
