"""The tiles of a GEMM: slabs of both operands in workgroup memory, a block of sums for each thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kernelforge_metal.kernels.matmul.sources import BLOCK, Source

LEFT = "a"
"""The name of the slab of the left-hand side."""
LANES = 32
"""Threads that are laid out together in a tile: a subgroup, where it is that wide."""


@dataclass(frozen=True)
class Division(ABC):
    """How a product is divided: `rows` x `columns` of the result for a workgroup, `steps` of the inner dimension in workgroup
    memory at a time."""

    rows: int
    columns: int
    steps: int

    @property
    @abstractmethod
    def threads(self) -> int:
        """Of a workgroup."""

    @property
    def depth(self) -> int:
        """Blocks of steps of a slab."""
        return self.steps // BLOCK

    @property
    def lines(self) -> int:
        """Rows of a block that a thread loads: 4, turned in registers, or 1, whose numbers are stored one by one."""
        return BLOCK

    @property
    def slabs(self) -> int:
        """That are in workgroup memory at once."""
        return 1

    def shares(self, extent: int) -> bool:
        """Whether the blocks of that many rows or columns are the same number for every thread."""
        return extent // self.lines * self.depth % self.threads == 0

    @abstractmethod
    def stride(self, extent: int) -> int:
        """Vectors from one step of a slab to the next."""


@dataclass(frozen=True)
class Tile(Division):
    """`thread_rows` x `thread_columns` of the result for a thread."""

    thread_rows: int
    thread_columns: int
    unroll: int
    """Steps that are written out; the others are a loop around them."""
    prefetch: int
    """0: a slab is loaded when the one before is done with; 1: into registers before that one is multiplied; 2: the same without
    a branch around the loads, so that they may be moved among the products: the last slab is loaded twice; 3: as 2, but
    then into a second slab, so that the threads wait for each other once a slab and not twice, and a step's numbers are read
    from workgroup memory while the step before is multiplied."""
    block: int
    """See `lines`."""

    @property
    def lines(self) -> int:
        return self.block

    @property
    def slabs(self) -> int:
        return 2 if self.prefetch == 3 else 1

    @property
    def to_and_fro(self) -> bool:
        """Whether every second row of a thread's is multiplied from its last column to its first: each product shares a factor
        with the one before, which stays in a cache of the registers."""
        return self.slabs == 2

    def lanes(self, row: int) -> str:
        """Where the columns of a vector of sums are, in a thread's row."""
        return "wzyx" if self.to_and_fro and row % 2 else "xyzw"

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
        return 16 * self.slabs * self.steps * (self.stride(self.rows) + rhs * self.stride(self.columns))

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
    def vectors(self) -> int:
        return self.stride * self.tile.steps

    @property
    def declaration(self) -> str:
        return f"var<workgroup> {self.name}_slab: array<vec4<f32>, {self.vectors * self.tile.slabs}>;\n"

    @property
    def blocks(self) -> list[str]:
        """Names of a thread's blocks."""
        return [f"{self.name}{i}" for i in range(self.extent // self.tile.lines * self.tile.depth // self.tile.threads)]

    def setup(self) -> Iterator[str]:
        depth, vectors = self.tile.depth, self.extent // BLOCK
        for i, n in enumerate(self.blocks):
            number = f"(t + {i * self.tile.threads}u)"
            if self.source.along_steps:
                yield f"let {n}_k = {number} % {depth}u; let {n}_r = {number} / {depth}u;"
            else:
                yield f"let {n}_r = {number} % {vectors}u; let {n}_k = {number} / {vectors}u;"
            if self.tile.lines == 1:
                yield f"let {n}_at = {n}_k * {self.stride}u + {n}_r / {BLOCK}u; let {n}_c = {n}_r % {BLOCK}u;"
            else:
                yield f"let {n}_at = {n}_k * {self.stride}u + {n}_r;"
            yield from self.source.setup(n)
            yield from self.source.declare(n)

    def load(self, slab: str) -> Iterator[str]:
        for n in self.blocks:
            yield from self.source.load(n, f"({slab} * {self.tile.depth}u + {n}_k)")

    def load_next(self, slabs: str) -> Iterator[str]:
        """From `<n>_next` on, which then moves by so many slabs."""
        for n in self.blocks:
            yield from self.source.load(n, f"{n}_next")
            yield f"{n}_next += {slabs} * {self.tile.depth}u;"

    def store(self, slab: int = 0) -> Iterator[str]:
        """Into that one of the slabs in workgroup memory."""
        for n in self.blocks:
            yield "{"
            yield from self.source.vectors(n)
            for s, lane in enumerate("xyzw"):
                at = f"{n}_at + {s * self.tile.depth * self.stride + slab * self.vectors}u"
                if self.tile.lines == 1:
                    yield f"{self.name}_slab[{at}][{n}_c] = v0.{lane};"
                    continue
                numbers = ", ".join(f"v{r}.{lane}" for r in range(BLOCK))
                value = f"vec4<f32>({numbers})" if self.source.along_steps else f"v{s}"
                yield f"{self.name}_slab[{at}] = {value};"
            yield "}"


Products = Callable[[Slab, Sequence[Slab]], Iterator[str]]
"""The text that adds the products of all steps of a slab, which is in workgroup memory, to `c<n>_<i>_<j>`."""


def sums(tile: Tile, left: Slab, rights: Sequence[Slab], slabs: int, products: Products | None = None) -> Iterator[str]:
    """c<n>_<i>_<j>: with right-hand side n, row i of the thread's and vector j of its columns, in the order of `Tile.lanes`.
    `products`: None for those of floats."""
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
    if tile.slabs == 2:
        yield from _in_turns(tile, left, rights, -(-slabs // 2))
        return
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
    yield from _slab_products(tile, left, rights) if products is None else products(left, rights)
    yield "}"


def _in_turns(tile: Tile, left: Slab, rights: Sequence[Slab], pairs: int) -> Iterator[str]:
    """Two slabs take turns: both are in the text, so that their places are constants. `next<name>`: what is multiplied next."""
    sides = (left, *rights)

    def load(slabs: str) -> Iterator[str]:
        yield "{"
        for side in sides:
            yield from side.load_next(slabs)
        yield "}"

    def read(step: int, slab: int, declared: str = "") -> Iterator[str]:
        for name, number in _numbers(tile, left, rights, step, slab):
            yield f"{declared}next{name} = {number};"

    for side in sides:
        yield _begin(side, None)
        for n in side.blocks:
            yield f"var {n}_next = {n}_k;"
    yield from load("1u")
    for side in sides:
        yield from side.store(0)
    yield "workgroupBarrier();"
    yield from read(0, 0, "var ")
    yield f"for (var pair = 0u; pair < {pairs}u; pair++) {{"
    for slab in range(2):
        yield from load("1u" if slab else f"select(0u, 1u, pair + 1u < {pairs}u)")
        for step in range(tile.steps):
            yield "{"
            for name, _ in _numbers(tile, left, rights, step, slab):
                yield f"let {name} = next{name};"
            if step + 1 < tile.steps:
                yield from read(step + 1, slab)
            yield from _products(tile, len(rights))
            yield "}"
        for side in sides:
            yield from side.store(1 - slab)
        yield "workgroupBarrier();"
        yield from read(0, 1 - slab)
    yield "}"


def _slab_products(tile: Tile, left: Slab, rights: Sequence[Slab]) -> Iterator[str]:
    """All steps of a slab in workgroup memory."""
    looped = tile.unroll < tile.steps
    if looped:
        yield f"for (var part = 0u; part < {tile.depth}u; part += {tile.unroll // BLOCK}u) {{"
    for side in (left, *rights):
        yield _begin(side, "part" if looped else None)
    for step in range(min(tile.unroll, tile.steps)):
        yield "{"
        for name, number in _numbers(tile, left, rights, step):
            yield f"let {name} = {number};"
        yield from _products(tile, len(rights))
        yield "}"
    if looped:
        yield "}"


def _numbers(tile: Tile, left: Slab, rights: Sequence[Slab], step: int, slab: int = 0) -> Iterator[tuple[str, str]]:
    """Names and texts of what a thread multiplies in one step: vectors a<i> of its rows, b<n>_<j> of its columns."""
    for v in range(tile.thread_rows // 4):
        yield f"a{v}", _read(tile, left, step, v, slab)
    for n, right in enumerate(rights):
        for j in range(tile.thread_columns // 4):
            yield f"b{n}_{j}", _read(tile, right, step, j, slab)


def _products(tile: Tile, rights: int) -> Iterator[str]:
    """One step of a slab: every row of the thread's times every column."""
    vectors = range(tile.thread_columns // 4)
    for n in range(rights):
        if tile.to_and_fro:
            for j in vectors:
                yield f"let r{n}_{j} = b{n}_{j}.wzyx;"
        for i in range(tile.thread_rows):
            back = tile.to_and_fro and i % 2
            for j in reversed(vectors) if back else vectors:
                c, b = f"c{n}_{i}_{j}", f"{'r' if back else 'b'}{n}_{j}"
                yield f"{c} = fma(vec4<f32>(a{i // 4}.{'xyzw'[i % 4]}), {b}, {c});"


def _read(tile: Tile, side: Slab, step: int, vector: int, slab: int) -> str:
    """Vector `vector` of a thread's, in a step that is counted from `from_<name>` on."""
    block, s = divmod(step, BLOCK)
    threads = tile.down if side.name == LEFT else tile.across
    row = s * tile.depth + block
    return f"{side.name}_slab[from_{side.name} + {row * side.stride + vector * threads + slab * side.vectors}u]"


def _begin(slab: Slab, block: str | None) -> str:
    """Where a thread reads from block `block` of steps on."""
    place = "ty" if slab.name == LEFT else "tx"
    return f"let from_{slab.name} = {place}{'' if block is None else f' + {block} * {slab.stride}u'};"
