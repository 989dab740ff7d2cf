"""Many rows times a weight, or any two matrices: tiles of the result, their operands in workgroup memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel, Grid, Pack, Size, size_of
from kernelforge_metal.kernels.matmul.common import start_of, takes_products
from kernelforge_metal.kernels.matmul.geometry import Product, count_of, count_text, product_of
from kernelforge_metal.kernels.matmul.numbers import Q8
from kernelforge_metal.kernels.matmul.result import Result, stored_columns
from kernelforge_metal.kernels.matmul.sources import Dense, Packed, Source
from kernelforge_metal.kernels.matmul.tile import LEFT, Slab, Tile, sums
from kernelforge_metal.kernels.matmul.weights import QUAD, Piece, Quads, Weights, pieces, weights_of
from kernelforge_metal.wgsl import BF16, FLAT, IDS, fold

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

BAND = 8
"""Columns of tiles whose rows of tiles are walked together: what they share of the weight stays in the cache."""
MAX_SUMS = 128
"""Of a thread: more do not fit the registers."""
NAMES = ("rows", "columns", "steps", "thread_rows", "thread_columns", "unroll", "prefetch")
TILES = (
    (128, 128, 32, 8, 8, 32, 1),
    (128, 64, 32, 8, 8, 16, 1),
    (64, 64, 32, 8, 8, 16, 1),
    (64, 64, 32, 8, 4, 32, 1),
    (32, 64, 32, 4, 8, 32, 1),
    (32, 32, 32, 4, 4, 32, 1),
)
"""Configs from large tiles to small ones."""
GATED_TILES = ((64, 64, 16, 8, 8, 16, 1), (64, 64, 32, 8, 4, 32, 1), (32, 32, 32, 4, 4, 32, 1))
"""With twice the sums and right-hand sides."""
PROMPT = 512
"""Rows for which a tile is chosen when any number may come."""
BUSY = 128
"""Workgroups that a large GPU needs at least."""


def takes_gemm(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_products(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    if len(product_of(problem).batches) > 1:
        return Reject("takes batches whose matrices are the same number of elements apart")
    return Accept()


def gemm_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """See `Tile`."""
    count = len(product_of(problem).rhs)
    threads = device.limit("max-compute-invocations-per-workgroup", 256)
    memory = device.limit("max-compute-workgroup-storage-size", 16384)

    def shares(c: Config) -> bool:
        tile = tile_of(c)
        return tile.shares(tile.rows) and tile.shares(tile.columns)

    return ConfigSpace(
        (
            ("rows", (32, 64, 128)),
            ("columns", (32, 64, 128)),
            ("steps", (16, 32)),
            ("thread_rows", (4, 8, 16)),
            ("thread_columns", (4, 8, 16)),
            ("unroll", (16, 32)),
            ("prefetch", (0, 1, 2)),
        ),
        (
            ("the device has no such large workgroups", lambda c: tile_of(c).threads <= min(threads, 256)),
            ("a tile needs at least 32 threads", lambda c: tile_of(c).threads >= 32),
            ("the slabs do not fit workgroup memory", lambda c: tile_of(c).shared_bytes(count) <= memory),
            (
                "the sums do not fit the registers",
                lambda c: count * int(c["thread_rows"]) * int(c["thread_columns"]) <= MAX_SUMS,
            ),
            ("the threads cannot share the loads evenly", shares),
            ("there are not so many steps", lambda c: int(c["unroll"]) <= int(c["steps"])),
        ),
    )


def gemm_default(problem: Problem, device: DeviceInfo) -> Config:
    """The largest tile of which there are enough, or the smallest."""
    g = product_of(problem)
    space = gemm_space(problem, device)
    tiles_of = TILES if len(g.rhs) == 1 else GATED_TILES
    legal = [c for tile in tiles_of if (c := dict(zip(NAMES, tile, strict=True))) in space]
    if not legal:
        return next(iter(space))

    def tiles(c: Config) -> int:
        rows = g.static_rows if g.static_rows is not None else PROMPT
        return -(-rows // int(c["rows"])) * -(-g.columns // int(c["columns"]))

    return next((c for c in legal if tiles(c) >= BUSY), legal[-1])


def tile_of(c: Config) -> Tile:
    return Tile(*(int(c[name]) for name in NAMES))


@dataclass(frozen=True)
class Gemm:
    """The text of a GEMM kernel."""

    product: Product
    tile: Tile
    weights: Weights | None
    """None: the right-hand side is no constant, or has batches."""
    device: DeviceInfo

    @property
    def ragged(self) -> bool:
        return self.product.inner % self.tile.steps != 0

    @property
    def left(self) -> Slab:
        g = self.product
        clamped = g.static_rows is None or g.static_rows % self.tile.rows != 0
        source = Dense(
            "x",
            g.problem.operand(0).dtype,
            self.device,
            self._start(0, "x"),
            "row0",
            "(rows - 1u)" if clamped else None,
            g.static_rows,
            g.rows.lhs,
            g.lhs_inner,
            g.inner,
            self.ragged,
        )
        return Slab(LEFT, self.tile, self.tile.rows, source)

    def right(self, n: int, piece: Piece) -> Slab:
        g = self.product
        name, index = ("b", "g")[n], g.rhs[n]
        clamped = not piece.whole or g.columns % self.tile.columns != 0
        source: Source
        if self.weights is not None:
            last = "(columns - 1u)"
            if isinstance(self.weights, Quads):
                last = f"{(self.weights.quads if piece.whole else piece.columns // QUAD) - 1}u"
            source = Packed(f"{name}_w", self.weights, last if clamped else None, self.ragged)
        else:
            source = Dense(
                f"{name}_w",
                g.problem.operand(index).dtype,
                self.device,
                self._start(index, f"{name}_w"),
                "column0",
                "(columns - 1u)" if clamped else None,
                g.columns,
                g.rhs_columns,
                g.rhs_inner,
                g.inner,
                self.ragged,
            )
        return Slab(name, self.tile, self.tile.columns, source)

    def _start(self, index: int, name: str) -> str:
        start = start_of(self.product.problem, index, name)
        for axis in self.product.batches:
            start += f" + batch * {axis.lhs if index == 0 else axis.rhs}u"
        return start

    def bindings(self, left: Slab, rights: Sequence[Slab], piece: Piece, result: Result) -> list[Binding]:
        found = [Binding(left.source.name, 0, left.source.element)]
        for slab, index in zip(rights, self.product.rhs, strict=True):
            name, element = slab.source.name, slab.source.element
            if self.weights is None:
                found.append(Binding(name, index, element))
            else:
                found += self.weights.bindings(name, index, piece, element)
        return found + result.bindings

    def dispatch(self, piece: Piece) -> Dispatch:
        g, tile = self.product, self.tile
        left, rights = self.left, [self.right(n, piece) for n in range(len(g.rhs))]
        result = Result(g, self.device, stored_columns(g) or 1)
        dtypes = {t.dtype for t in (*g.problem.operands, *g.problem.results) if t is not None}
        columns = min(piece.columns, g.columns - piece.first)
        across = -(-columns // tile.columns)
        numbers: tuple[tuple[str, Size], ...] = ()
        place = f"let first = 0u; let columns = {columns}u; let across = {across}u;"
        if not piece.whole:
            numbers = (("first", piece.first), ("columns", columns), ("across", across))
            place = "let first = p.first; let columns = p.columns; let across = p.across;"
        lines = [
            IDS,
            BF16 if "bf16" in dtypes else "",
            Q8 if "q8" in dtypes else "",
            *(slab.source.functions + slab.declaration for slab in (left, *rights)),
            result.functions,
            f"@compute @workgroup_size({tile.threads})",
            "fn main(ids: Ids) {",
            f"let t = ids.thread; let batch = ids.group.z; let rows = {count_text(g.rows, g.problem)};",
            place,
            f"let down = (rows + {tile.rows - 1}u) / {tile.rows}u;",
            f"let number = {FLAT};",
            "if (number >= down * across) { return; }",
            f"let band = number / (down * {BAND}u); let within = number % (down * {BAND}u);",
            f"let width = min({BAND}u, across - band * {BAND}u);",
            f"let row0 = within / width * {tile.rows}u;",
            f"let column0 = (band * {BAND}u + within % width) * {tile.columns}u;",
            *tile.places,
            *sums(tile, left, rights, -(-g.inner // tile.steps)),
            *self.stores(result, len(rights), piece),
            "}",
        ]
        bindings = tuple(self.bindings(left, rights, piece, result))
        return Dispatch("\n".join(lines), bindings, self.workgroups(across), numbers)

    def stores(self, result: Result, count: int, piece: Piece) -> Iterator[str]:
        """Guarded where tiles may be cut off."""
        g, tile = self.product, self.tile
        down = g.static_rows is None or g.static_rows % tile.rows != 0
        right = not piece.whole or g.columns % tile.columns != 0
        plain = g.bias is None and g.residual is None and g.activation == "none" and count == 1
        for i in range(tile.thread_rows):
            yield f"{{ let row = row0 + ty * 4u + {i // 4 * tile.down * 4 + i % 4}u;"
            yield "if (row < rows) {" if down else "{"
            for j in range(tile.thread_columns // 4):
                yield f"{{ let own = column0 + tx * 4u + {j * tile.across * 4}u; let column = first + own;"
                parts = [[f"c{n}_{i}_{j}.{lane}" for n in range(count)] for lane in "xyzw"]
                values = [result.finished(part, "row", f"column + {e}u") for e, part in enumerate(parts)]
                if result.vector == 4:
                    value = f"c0_{i}_{j}" if plain else f"vec4<f32>({', '.join(values)})"
                    text = f"store(batch, row, column, {value});"
                    yield f"if (own < columns) {{ {text} }}" if right else text
                else:
                    for e, value in enumerate(values):
                        text = f"store(batch, row, column + {e}u, {value});"
                        yield f"if (own + {e}u < columns) {{ {text} }}" if right else text
                yield "}"
            yield "} }"

    def workgroups(self, across: int) -> Grid:
        """A workgroup for each tile, batches along z."""
        g, tile = self.product, self.tile
        rows, batches = count_of(g.rows, g.problem), [count_of(b, g.problem) for b in g.batches]

        def counted(dims: Sequence[int]) -> tuple[int, int, int]:
            x, y, _ = fold(-(-size_of(rows, dims) // tile.rows) * across)
            return x, y, size_of(batches[0], dims) if batches else 1

        return counted if g.problem.dims else counted(())


def build_gemm(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    g = product_of(problem)
    rhs = problem.operand(g.rhs[0])
    weights = weights_of(rhs.dtype, g.columns, g.inner) if rhs.constant and rhs.rank == 2 else None
    kernel = Gemm(g, tile_of(config), weights, device)
    parts = [Piece(0, g.columns, True)] if weights is None else pieces(weights, device)
    packs: dict[int, Pack] = {}
    if weights is not None and (pack := weights.packs(transposed=g.transpose_rhs)) is not None:
        packs = dict.fromkeys(g.rhs, pack)
    return GpuKernel(tuple(kernel.dispatch(piece) for piece in parts), packs)
