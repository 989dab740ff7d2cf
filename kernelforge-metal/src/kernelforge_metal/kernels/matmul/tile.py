"""The tiles of a GEMM: slabs of both operands in workgroup memory, a block of sums for each thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernelforge_metal.kernels.matmul.sources import BLOCK, Source

LEFT = "a"
"""The name of the slab of the left-hand side."""
LANES = 32
"""Threads that are laid out together in a tile: a subgroup, where it is that wide."""


@dataclass(frozen=True)
class Division:
    """How a product is divided: `rows` x `columns` of the result for a workgroup, `steps` of the inner dimension in workgroup
    memory at a time."""

    rows: int
    columns: int
    steps: int

    @property
    def threads(self) -> int:
        """Of a workgroup."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Blocks of steps of a slab."""
        return self.steps // BLOCK

    def shares(self, extent: int) -> bool:
        """Whether the blocks of that many rows or columns are the same number for every thread."""
        return extent // BLOCK * self.depth % self.threads == 0

    def stride(self, extent: int) -> int:
        """Vectors from one step of a slab to the next."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tile(Division):
    """`thread_rows` x `thread_columns` of the result for a thread."""

    thread_rows: int
    thread_columns: int
    unroll: int
    """Steps that are written out; the others are a loop around them."""
    prefetch: int
    """0: a slab is loaded when the one before is done with; 1: into registers before that one is multiplied; 2: the same without
    a branch around the loads, so that they may be moved among the products: the last slab is loaded twice."""

    @property
    def across(self) -> int:
        """Threads side by side."""
        return self.columns // self.thread_columns

    @property
    def down(self) -> int:
        return self.rows // self.thread_rows

    @property
    def threads(self) -> int:
        return self.across * self.down

    def shared_bytes(self, rhs: int) -> int:
        """Of workgroup memory, with that many right-hand sides."""
        return 16 * self.steps * (self.stride(self.rows) + rhs * self.stride(self.columns))

    def stride(self, extent: int) -> int:
        """See `Division`. The padding lets the eight threads of one memory access, which store the same step of `depth` blocks
        of steps and neighbouring rows, hit different banks."""
        return extent // BLOCK + max(1, 8 // self.depth)

    @property
    def places(self) -> Iterator[str]:
        """`tx` and `ty`, a thread's place in the tile. A subgroup is as square as it can be, and reads fewer numbers."""
        width = min(8, self.across)
        height = LANES // width
        if self.down % height or self.across % width:
            yield f"let tx = t % {self.across}u; let ty = t / {self.across}u;"
            return
        blocks = self.across // width
        yield f"let tx = t % {width}u + t / {LANES}u % {blocks}u * {width}u;"
        yield f"let ty = t / {width}u % {height}u + t / {LANES * blocks}u * {height}u;"


@dataclass(frozen=True)
class Slab:
    """One operand's part of a tile, step by step: the numbers of all its rows (or columns) as vec4s of f32.

    The steps of a block lie `depth` steps apart, so that blocks can be padded apart: see `Tile.stride`.
    """

    name: str
    tile: Division
    extent: int
    """Rows or columns of the tile."""
    source: Source

    @property
    def stride(self) -> int:
        return self.tile.stride(self.extent)

    @property
    def declaration(self) -> str:
        return f"var<workgroup> {self.name}_slab: array<vec4<f32>, {self.stride * self.tile.steps}>;\n"

    @property
    def blocks(self) -> list[str]:
        """Names of a thread's blocks."""
        return [f"{self.name}{i}" for i in range(self.extent // BLOCK * self.tile.depth // self.tile.threads)]

    def setup(self) -> Iterator[str]:
        depth, vectors = self.tile.depth, self.extent // BLOCK
        for i, n in enumerate(self.blocks):
            number = f"(t + {i * self.tile.threads}u)"
            if self.source.along_steps:
                yield f"let {n}_k = {number} % {depth}u; let {n}_r = {number} / {depth}u;"
            else:
                yield f"let {n}_r = {number} % {vectors}u; let {n}_k = {number} / {vectors}u;"
            yield f"let {n}_at = {n}_k * {self.stride}u + {n}_r;"
            yield from self.source.setup(n)
            yield from self.source.declare(n)

    def load(self, slab: str) -> Iterator[str]:
        for n in self.blocks:
            yield from self.source.load(n, f"({slab} * {self.tile.depth}u + {n}_k)")

    def store(self) -> Iterator[str]:
        for n in self.blocks:
            yield "{"
            yield from self.source.vectors(n)
            for s, lane in enumerate("xyzw"):
                numbers = ", ".join(f"v{r}.{lane}" for r in range(BLOCK))
                value = f"vec4<f32>({numbers})" if self.source.along_steps else f"v{s}"
                yield f"{self.name}_slab[{n}_at + {s * self.tile.depth * self.stride}u] = {value};"
            yield "}"


def sums(tile: Tile, left: Slab, rights: Sequence[Slab], slabs: int) -> Iterator[str]:
    """c<n>_<i>_<j>: with right-hand side n, row i of the thread's and vector j of its columns."""
    sides = (left, *rights)

    def all_sides(slab: str) -> Iterator[str]:
        for side in sides:
            yield from side.load(slab)

    for side in sides:
        yield from side.setup()
    for n in range(len(rights)):
        for i in range(tile.thread_rows):
            for j in range(tile.thread_columns // 4):
                yield f"var c{n}_{i}_{j} = vec4<f32>();"
    if tile.prefetch:
        yield from all_sides("0u")
    yield f"for (var slab = 0u; slab < {slabs}u; slab++) {{"
    if not tile.prefetch:
        yield from all_sides("slab")
    yield "workgroupBarrier();"
    for side in sides:
        yield from side.store()
    yield "workgroupBarrier();"
    if tile.prefetch == 1:
        yield f"if (slab + 1u < {slabs}u) {{"
        yield from all_sides("(slab + 1u)")
        yield "}"
    elif tile.prefetch == 2:
        yield f"let next = min(slab + 1u, {slabs - 1}u);"
        yield from all_sides("next")
    looped = tile.unroll < tile.steps
    if looped:
        yield f"for (var part = 0u; part < {tile.depth}u; part += {tile.unroll // BLOCK}u) {{"
    for side in sides:
        yield _begin(tile, side, "part" if looped else None)
    for step in range(min(tile.unroll, tile.steps)):
        yield "{"
        yield from _products(tile, left, rights, step)
        yield "}"
    yield "} }" if looped else "}"


def _products(tile: Tile, left: Slab, rights: Sequence[Slab], step: int) -> Iterator[str]:
    """One step of a slab: every row of the thread's times every column."""
    vectors = range(tile.thread_columns // 4)
    for v in range(tile.thread_rows // 4):
        yield f"let a{v} = {_read(tile, left, step, v)};"
    for n, right in enumerate(rights):
        for j in vectors:
            yield f"let b{n}_{j} = {_read(tile, right, step, j)};"
        for i in range(tile.thread_rows):
            for j in vectors:
                c = f"c{n}_{i}_{j}"
                yield f"{c} = fma(vec4<f32>(a{i // 4}.{'xyzw'[i % 4]}), b{n}_{j}, {c});"


def _read(tile: Tile, slab: Slab, step: int, vector: int) -> str:
    """Vector `vector` of a thread's, in a step that is counted from `from_<name>` on."""
    block, s = divmod(step, BLOCK)
    threads = tile.down if slab.name == LEFT else tile.across
    row = s * tile.depth + block
    return f"{slab.name}_slab[from_{slab.name} + {row * slab.stride + vector * threads}u]"


def _begin(tile: Tile, slab: Slab, block: str | None) -> str:
    """Where a thread reads from block `block` of steps on."""
    place = "ty" if slab.name == LEFT else "tx"
    return f"let from_{slab.name} = {place}{'' if block is None else f' + {block} * {slab.stride}u'};"
