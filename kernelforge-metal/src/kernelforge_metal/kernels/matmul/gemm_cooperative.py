"""Many rows times a weight by cooperative matrices: tiles of the result, whose parts are sums of subgroups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernelforge.variant import ConfigSpace, Reject
from kernelforge_metal.adapters import COOPERATIVE
from kernelforge_metal.cooperative import NONE, Matrices, usable
from kernelforge_metal.kernels.matmul.gemm import default_tile, takes_gemm
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.sources import BLOCK, Source
from kernelforge_metal.kernels.matmul.tile import LANES, LEFT, Division, Slab
from kernelforge_metal.kernels.matmul.tiled import Tiled, constant_weights
from kernelforge_metal.wgsl import FLAT, SUBGROUP_IDS

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernel import GpuKernel
    from kernelforge_metal.kernels.matmul.result import Result
    from kernelforge_metal.kernels.matmul.weights import Piece

NAMES = ("rows", "columns", "steps", "part_rows", "part_columns", "prefetch")
TILES = ((128, 128, 32, 64, 32, 1), (64, 64, 32, 32, 32, 1), (32, 32, 32, 16, 32, 1))
"""Configs from large tiles to small ones."""
MAX_SUMS = 64
"""Of a thread in a subgroup of 32."""


def takes_cooperative(problem: Problem, device: DeviceInfo) -> Verdict:
    if matrices_for(problem, device) is None:
        if COOPERATIVE in device.features:
            return Reject(f"this device's cooperative matrices take f16 only, not {', '.join(factors(problem))}")
        return Reject(dict(device.missing).get(COOPERATIVE, NONE))
    return takes_gemm(problem, device)


def factors(problem: Problem) -> tuple[str, str]:
    """The dtypes that are multiplied."""
    return problem.operand(0).dtype, problem.operand(1).dtype


def matrices_for(problem: Problem, device: DeviceInfo) -> Matrices | None:
    """The matrices that multiply exactly what is there: numbers of f16 as such where both factors are, else all as f32."""
    half = usable(device, "f16") if factors(problem) == ("f16", "f16") else None
    return half or usable(device, "f32")


def cooperative_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """See `PartedTile`."""
    matrices = matrices_for(problem, device)
    threads = device.limit("max-compute-invocations-per-workgroup", 256)
    memory = device.limit("max-compute-workgroup-storage-size", 16384)

    def whole(c: Config) -> bool:
        tile = tile_of(c, matrices)
        sizes = (tile.part_rows, tile.part_columns, tile.steps)
        return not any(size % tile.matrices.size for size in sizes) and tile.parts > 0

    def shares(c: Config) -> bool:
        tile = tile_of(c, matrices)
        return tile.shares(tile.rows) and tile.shares(tile.columns)

    return ConfigSpace(
        (
            ("rows", (32, 64, 128)),
            ("columns", (32, 64, 128)),
            ("steps", (16, 32)),
            ("part_rows", (16, 32, 64)),
            ("part_columns", (16, 32, 64)),
            ("prefetch", (0, 1)),
        ),
        (
            ("parts are whole matrices, and tiles whole parts", whole),
            ("the device has no such large workgroups", lambda c: tile_of(c, matrices).threads <= min(threads, 256)),
            ("the slabs do not fit workgroup memory", lambda c: tile_of(c, matrices).shared_bytes <= memory),
            (
                "the sums do not fit the registers",
                lambda c: int(c["part_rows"]) * int(c["part_columns"]) <= MAX_SUMS * LANES,
            ),
            ("the threads cannot share the loads evenly", shares),
        ),
    )


def cooperative_default(problem: Problem, device: DeviceInfo) -> Config:
    tiles = [dict(zip(NAMES, tile, strict=True)) for tile in TILES]
    return default_tile(product_of(problem), cooperative_space(problem, device), tiles)


def tile_of(c: Config, matrices: Matrices | None) -> PartedTile:
    assert matrices is not None
    rows, columns, steps, part_rows, part_columns, prefetch = (int(c[name]) for name in NAMES)
    return PartedTile(rows, columns, steps, part_rows, part_columns, prefetch, matrices)


@dataclass(frozen=True)
class PartedTile(Division):
    """`part_rows` x `part_columns` of the result for a subgroup."""

    part_rows: int
    part_columns: int
    prefetch: int
    """1: the next slab is loaded into registers before this one is multiplied."""
    matrices: Matrices

    @property
    def across(self) -> int:
        """Parts side by side."""
        return self.columns // self.part_columns

    @property
    def parts(self) -> int:
        return self.rows // self.part_rows * self.across

    @property
    def threads(self) -> int:
        """Where subgroups are wider than 32, they take several parts in turn; where they are narrower, some repeat the last."""
        return LANES * self.parts

    def stride(self, extent: int) -> int:
        """See `Division`: 16 bytes, which matrices in memory must start at, are two vectors of f16."""
        return extent // BLOCK + 2

    @property
    def shared_bytes(self) -> int:
        """Of workgroup memory."""
        number = 2 if self.matrices.scalar == "f16" else 4
        slabs = BLOCK * self.steps * (self.stride(self.rows) + self.stride(self.columns)) * number
        return slabs + 4 * self.band_numbers + 4

    @property
    def band_numbers(self) -> int:
        """Sums of a row of matrices of all parts."""
        return self.parts * self.matrices.size * self.part_columns


@dataclass(frozen=True)
class MatrixSlab(Slab):
    """The same with single numbers of a matrix's type: of vectors, wgpu does not say what the distance of rows counts."""

    scalar: str

    @property
    def declaration(self) -> str:
        return f"var<workgroup> {self.name}_slab: array<{self.scalar}, {BLOCK * self.stride * self.tile.steps}>;\n"

    def store(self, slab: int = 0) -> Iterator[str]:
        for n in self.blocks:
            yield "{"
            yield from self.source.vectors(n)
            for s, step in enumerate("xyzw"):
                for r, row in enumerate("xyzw"):
                    value = f"v{r}.{step}" if self.source.along_steps else f"v{s}.{row}"
                    at = f"{BLOCK}u * {n}_at + {BLOCK * (s * self.tile.depth * self.stride + slab * self.vectors) + r}u"
                    yield f"{self.name}_slab[{at}] = {self.scalar}({value});"
            yield "}"


@dataclass(frozen=True)
class CooperativeGemm(Tiled):
    """Sums in cooperative matrices. All of a workgroup runs the same text, as they demand, also subgroups without a part of
    their own: those repeat the last one's."""

    tile: PartedTile

    ids: ClassVar[str] = SUBGROUP_IDS
    number: ClassVar[str] = f"let number = min({FLAT}, down * across - 1u);"
    """No return before them, which to wgpu would not be uniform: surplus workgroups compute the last tile and store nothing."""

    def slab(self, name: str, extent: int, source: Source) -> Slab:
        return MatrixSlab(name, self.tile, extent, source, self.tile.matrices.scalar)

    def declarations(self) -> Iterator[str]:
        yield "var<workgroup> subgroups: u32;"
        yield f"var<workgroup> finals: array<f32, {self.tile.band_numbers}>;"

    def body(self, left: Slab, rights: Sequence[Slab], result: Result, piece: Piece) -> Iterator[str]:
        tile, (right,) = self.tile, rights
        for side in (left, right):
            yield from side.setup()
        yield f"let surplus = {FLAT} >= down * across;"
        yield "if (t == 0u) { subgroups = ids.subgroups; }"
        yield "let together = workgroupUniformLoad(&subgroups);"
        yield f"for (var round = 0u; round < {tile.parts}u; round += together) {{"
        yield f"let part = min(round + ids.subgroup, {tile.parts - 1}u);"
        yield f"let part_row = part / {tile.across}u * {tile.part_rows}u;"
        yield f"let part_column = part % {tile.across}u * {tile.part_columns}u;"
        yield from self.sums(left, right)
        yield from self.stores(result, piece)
        yield "}"

    @property
    def blocks(self) -> tuple[range, range]:
        """Matrices of a part, down and across."""
        size = self.tile.matrices.size
        return range(self.tile.part_rows // size), range(self.tile.part_columns // size)

    def sums(self, left: Slab, right: Slab) -> Iterator[str]:
        """c<i>_<j>: the matrix in row i and column j of the part."""
        tile, matrices = self.tile, self.tile.matrices
        slabs = -(-self.product.inner // tile.steps)
        down, across = self.blocks
        for i in down:
            for j in across:
                yield f"var c{i}_{j} = {matrices.type('C')}();"

        def loads(slab: str) -> Iterator[str]:
            yield from left.load(slab)
            yield from right.load(slab)

        if tile.prefetch:
            yield from loads("0u")
        yield f"for (var slab = 0u; slab < {slabs}u; slab++) {{"
        if not tile.prefetch:
            yield from loads("slab")
        yield "workgroupBarrier();"
        yield from left.store()
        yield from right.store()
        yield "workgroupBarrier();"
        if tile.prefetch:
            yield f"if (slab + 1u < {slabs}u) {{"
            yield from loads("(slab + 1u)")
            yield "}"
        for step in range(0, tile.steps, matrices.size):
            yield "{"
            for role, side, place, count in (("A", left, "part_row", down), ("B", right, "part_column", across)):
                stride = BLOCK * side.stride
                for i in count:
                    first = f"{side.name}_slab[{place} + {step * stride + i * matrices.size}u]"
                    yield f"let {role.lower()}{i} = {matrices.load(role, first, stride, by_rows=side.name != LEFT)};"
            for i in down:
                for j in across:
                    yield f"c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});"
            yield "}"
        yield "}"

    def stores(self, result: Result, piece: Piece) -> Iterator[str]:
        """A row of matrices of all parts goes through workgroup memory, from which the threads take it number by number."""
        tile, size = self.tile, self.tile.matrices.size
        down, across = self.blocks
        width = result.vector
        own, line = size * tile.part_columns, tile.part_columns // width
        for i in down:
            yield "workgroupBarrier();"
            for j in across:
                first = f"finals[part * {own}u + {j * size}u]"
                yield tile.matrices.store(f"c{i}_{j}", first, tile.part_columns)
            yield "workgroupBarrier();"
            yield f"for (var e = t; e < {tile.band_numbers // width}u; e += {tile.threads}u) {{"
            yield f"let which = e / {own // width}u;"
            yield f"let row = row0 + which / {tile.across}u * {tile.part_rows}u + {i * size}u + e / {line}u % {size}u;"
            yield f"let own = column0 + which % {tile.across}u * {tile.part_columns}u + e % {line}u * {width}u;"
            yield "let column = first + own;"
            yield "if (!surplus && which >= round && which < round + together && row < rows && own < columns) {"
            values = [result.finished([f"finals[e * {width}u + {n}u]"], "row", f"column + {n}u") for n in range(width)]
            value = values[0] if width == 1 else f"vec4<f32>({', '.join(values)})"
            yield f"store(batch, row, column, {value});"
            yield "} }"


def build_cooperative(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    g = product_of(problem)
    tile = tile_of(config, matrices_for(problem, device))
    return CooperativeGemm(g, tile, constant_weights(g), device).kernel()
