"""Many rows times a weight, or any two matrices: tiles of the result, their operands in workgroup memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.kernels.matmul.common import takes_products
from kernelforge_metal.kernels.matmul.geometry import Product, product_of
from kernelforge_metal.kernels.matmul.tile import Slab, Tile, sums
from kernelforge_metal.kernels.matmul.tiled import Tiled, constant_weights
from kernelforge_metal.kernels.matmul.weights import Piece

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernel import GpuKernel
    from kernelforge_metal.kernels.matmul.result import Result

MAX_SUMS = 128
"""Of a thread: more do not fit the registers."""
MAX_GUARDS = 16
"""Of loads in a loop, on software GPUs: the time that SwiftShader takes to compile is exponential in them."""
NAMES = ("rows", "columns", "steps", "thread_rows", "thread_columns", "unroll", "prefetch", "block")
LARGE = (256, 128, 8, 16, 8, 8, 3, 1)
"""For weights of f32, where workgroups have more than 32 KiB of memory. Of 16 bits they are loaded in too small pieces."""
TILES = (
    (128, 128, 32, 8, 8, 32, 1, 4),
    (128, 64, 32, 8, 8, 16, 1, 4),
    (64, 64, 32, 8, 8, 16, 1, 4),
    (64, 64, 32, 8, 4, 32, 1, 4),
    (32, 64, 32, 4, 8, 32, 1, 4),
    (32, 32, 32, 4, 4, 32, 1, 4),
)
"""Configs from large tiles to small ones."""
GATED_TILES = ((64, 64, 16, 8, 8, 16, 1, 4), (64, 64, 32, 8, 4, 32, 1, 4), (32, 32, 32, 4, 4, 32, 1, 4))
"""With twice the sums and right-hand sides."""
SMALL_TILES = ((32, 32, 32, 4, 4, 8, 0, 4), (32, 32, 8, 4, 4, 8, 0, 1))
"""Of little text, for a processor, which compiles what it runs; the last one where operands can be loaded row by row."""
PROMPT = 512
"""Rows for which a tile is chosen when any number may come."""
BUSY = 128
"""Workgroups that a large GPU needs at least."""


def takes_gemm(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_products(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    g = product_of(problem)
    if not g.inner:
        return Reject("takes sums of at least one number")
    if len(g.batches) > 1:
        return Reject("takes batches whose matrices are the same number of elements apart")
    return Accept()


def gemm_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """See `Tile`."""
    count = len(product_of(problem).rhs)
    threads = device.limit("max-compute-invocations-per-workgroup", 256)
    memory = device.limit("max-compute-workgroup-storage-size", 16384)

    g = product_of(problem)
    by_lines, weights, software = _by_lines(g, device), constant_weights(g), SOFTWARE in device.features

    def few_guards(c: Config) -> bool:
        return not software or Gemm(g, tile_of(c), weights, device).guards <= MAX_GUARDS

    def shares(c: Config) -> bool:
        tile = tile_of(c)
        return tile.shares(tile.rows) and tile.shares(tile.columns)

    return ConfigSpace(
        (
            ("rows", (32, 64, 128, 256)),
            ("columns", (32, 64, 128)),
            ("steps", (8, 16, 32)),
            ("thread_rows", (4, 8, 16)),
            ("thread_columns", (4, 8, 16)),
            ("unroll", (8, 16, 32)),
            ("prefetch", (0, 1, 2, 3)),
            ("block", (4, 1)),
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
            (
                "single rows are loaded of floats that follow each other along the inner dimension",
                lambda c: int(c["block"]) == 4 or by_lines,
            ),
            ("there are not so many steps", lambda c: int(c["unroll"]) <= int(c["steps"])),
            (
                "where two slabs take turns, all steps are written out",
                lambda c: int(c["prefetch"]) != 3 or c["unroll"] == c["steps"],
            ),
            (
                "drivers of software GPUs do not end compiling so many loads that depend on where the sums end",
                few_guards,
            ),
        ),
    )


def gemm_default(problem: Problem, device: DeviceInfo) -> Config:
    g = product_of(problem)
    tiles: tuple[tuple[int, ...], ...] = TILES if len(g.rhs) == 1 else GATED_TILES
    dtypes = [g.problem.operand(i).dtype for i in g.rhs]
    if device.limit("max-compute-workgroup-storage-size") > 32768 and dtypes == ["f32"]:
        tiles = (LARGE, *tiles)
    if SOFTWARE in device.features:
        tiles = SMALL_TILES
    return default_tile(g, gemm_space(problem, device), [dict(zip(NAMES, tile, strict=True)) for tile in tiles])


def default_tile(g: Product, space: ConfigSpace, tiles: Sequence[Config]) -> Config:
    """The first legal one of `tiles`, from large to small, of which there are enough, or the last."""
    legal = [c for c in tiles if c in space]
    if not legal:
        return next(iter(space))

    def count(c: Config) -> int:
        rows = g.static_rows if g.static_rows is not None else PROMPT
        return -(-rows // int(c["rows"])) * -(-g.columns // int(c["columns"]))

    return next((c for c in legal if count(c) >= BUSY), legal[-1])


def _by_lines(g: Product, device: DeviceInfo) -> bool:
    """Whether all operands can be loaded row by row."""
    kernel = Gemm(g, Tile(*TILES[0]), constant_weights(g), device)
    sides = (kernel.left, *(kernel.right(n, Piece(0, g.columns, True)) for n in range(len(g.rhs))))
    return all(side.source.by_lines for side in sides)


def tile_of(c: Config) -> Tile:
    return Tile(*(int(c[name]) for name in NAMES))


@dataclass(frozen=True)
class Gemm(Tiled):
    """Sums in the registers of threads."""

    tile: Tile

    @property
    def guards(self) -> int:
        """Conditions under which a thread loads its part of a slab: that the sums do not end before."""
        sides = (
            self.left,
            *(self.right(n, Piece(0, self.product.columns, True)) for n in range(len(self.product.rhs))),
        )
        return sum(line.startswith("if ") for side in sides for line in side.load("slab")) if self.ragged else 0

    def body(self, left: Slab, rights: Sequence[Slab], result: Result, piece: Piece) -> Iterator[str]:
        yield from self.tile.places
        yield from sums(self.tile, left, rights, -(-self.product.inner // self.tile.steps))
        yield from self.stores(result, len(rights), piece)

    def stores(self, result: Result, count: int, piece: Piece) -> Iterator[str]:
        """Guarded where tiles may be cut off."""
        g, tile = self.product, self.tile
        down = g.static_rows is None or g.static_rows % tile.rows != 0
        right = not piece.whole or g.columns % tile.columns != 0
        plain = g.bias is None and g.residual is None and g.activation == "none" and count == 1
        times = ""
        if plain and tile.to_and_fro:
            # Sums that are stored as they are must lie in the registers as the factors' vectors do, so that a product reads both
            # from one bank, in twice the time. Sums times a 1 that only the GPU knows leave the compiler free.
            yield "let one = select(0.0, 1.0, ids.groups.x > 0u);"
            times = " * one"
        for i in range(tile.thread_rows):
            yield f"{{ let row = row0 + ty * 4u + {i // 4 * tile.down * 4 + i % 4}u;"
            yield "if (row < rows) {" if down else "{"
            for j in range(tile.thread_columns // 4):
                yield f"{{ let own = column0 + tx * 4u + {j * tile.across * 4}u; let column = first + own;"
                parts = [[f"c{n}_{i}_{j}.{lane}" for n in range(count)] for lane in tile.lanes(i)]
                values = [result.finished(part, "row", f"column + {e}u") for e, part in enumerate(parts)]
                if result.vector == 4:
                    value = f"c0_{i}_{j}.{tile.lanes(i)}{times}" if plain else f"vec4<f32>({', '.join(values)})"
                    text = f"store(batch, row, column, {value});"
                    yield f"if (own < columns) {{ {text} }}" if right else text
                else:
                    for e, value in enumerate(values):
                        text = f"store(batch, row, column + {e}u, {value});"
                        yield f"if (own + {e}u < columns) {{ {text} }}" if right else text
                yield "}"
            yield "} }"


def build_gemm(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    g = product_of(problem)
    return Gemm(g, tile_of(config), constant_weights(g), device).kernel()
