"""Many rows in q8a times a quantised weight, in integers: tiles of the result, words of four int8 in workgroup memory.

The sum of a group of 32 is exact. It begins at the bits of 1.5 * 2^23, less the eights of the row beside q4 weights, which are
stored plus 8: read as a float it is that number plus the sum, so that a subtraction takes the place of a conversion. Then both
scales multiply it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT, GROUP
from kernelforge.variant import ConfigSpace, Reject
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.kernels.matmul.common import without_dot4
from kernelforge_metal.kernels.matmul.gemm import MAX_SUMS, Gemm, default_tile, takes_gemm
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.sources import BLOCK, Groups, Packed, Source
from kernelforge_metal.kernels.matmul.tile import Slab, sums
from kernelforge_metal.kernels.matmul.tiled import constant_weights
from kernelforge_metal.kernels.matmul.words import WORDS, ZERO, ColumnWords, RowWords, Words, WordTile

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernel import GpuKernel
    from kernelforge_metal.kernels.matmul.result import Result
    from kernelforge_metal.kernels.matmul.weights import Piece

NAMES = ("rows", "columns", "groups", "thread_rows", "thread_columns", "at_once", "unroll", "prefetch")
TILES = ((64, 64, 2, 8, 4, 4, 32, 1), (32, 64, 2, 4, 4, 4, 32, 1), (32, 32, 2, 4, 4, 4, 32, 1))
"""Configs from large tiles to small ones. On an H200 larger ones are slower, also of a gated product."""
SMALL_TILE = (32, 32, 1, 4, 4, 4, 4, 0)
"""Of little text, for a processor, which compiles what it runs."""


def takes_integers(problem: Problem, device: DeviceInfo) -> Verdict:
    if problem.operand(0).dtype != ACTIVATION_FORMAT:
        return Reject(f"takes rows of {ACTIVATION_FORMAT}, not {problem.operand(0).dtype}")
    return without_dot4(device) or takes_gemm(problem, device)


def integers_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """See `WordTile`."""
    g = product_of(problem)
    count = len(g.rhs)
    nibbles = problem.operand(g.rhs[0]).dtype == "q4"
    threads = device.limit("max-compute-invocations-per-workgroup", 256)
    memory = device.limit("max-compute-workgroup-storage-size", 16384)

    def shares(c: Config) -> bool:
        tile = tile_of(c)
        groups = [extent // BLOCK * tile.groups for extent in (tile.rows, tile.columns)]
        loads = (groups[0] * WORDS, groups[1] * WORDS // (2 if nibbles else 1))
        return max(groups) <= tile.threads and all(n < tile.threads or n % tile.threads == 0 for n in loads)

    return ConfigSpace(
        (
            ("rows", (32, 64, 128)),
            ("columns", (32, 64, 128)),
            ("groups", (1, 2, 4)),
            ("thread_rows", (4, 8)),
            ("thread_columns", (4, 8)),
            ("at_once", (4, 8)),
            ("unroll", (32, 4)),
            ("prefetch", (0, 1)),
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
            ("a thread has not so many columns", lambda c: int(c["at_once"]) <= int(c["thread_columns"])),
        ),
    )


def integers_default(problem: Problem, device: DeviceInfo) -> Config:
    g = product_of(problem)
    tiles = (SMALL_TILE,) if SOFTWARE in device.features else TILES
    return default_tile(g, integers_space(problem, device), [dict(zip(NAMES, tile, strict=True)) for tile in tiles])


def tile_of(c: Config) -> WordTile:
    rows, columns, groups, thread_rows, thread_columns, at_once, unroll, prefetch = (int(c[name]) for name in NAMES)
    return WordTile(rows, columns, GROUP * groups, thread_rows, thread_columns, unroll, prefetch, BLOCK, at_once)


@dataclass(frozen=True)
class IntegerGemm(Gemm):
    """Sums in the registers of threads, those of a group in integers."""

    tile: WordTile

    def slab(self, name: str, extent: int, source: Source) -> Words:
        if isinstance(source, Groups):
            return RowWords(name, self.tile, extent, source, self.eights)
        assert isinstance(source, Packed)
        return ColumnWords(name, self.tile, extent, source)

    @property
    def eights(self) -> bool:
        """Whether the weights are stored plus 8."""
        return self.weights is not None and self.weights.dtype == "q4"

    def body(self, left: Slab, rights: Sequence[Slab], result: Result, piece: Piece) -> Iterator[str]:
        yield from self.tile.places
        yield from sums(self.tile, left, rights, -(-self.product.inner // self.tile.steps), self._products)
        yield from self.stores(result, len(rights), piece)

    def _products(self, left: Slab, rights: Sequence[Slab]) -> Iterator[str]:
        """Of all groups of a slab."""
        tile = self.tile
        yield f"for (var g = 0u; g < {tile.groups}u; g++) {{"
        for n, right in enumerate(rights):
            for first in range(0, tile.thread_columns // 4, tile.at_once // 4):
                yield from self._group(left, right, n, range(first, first + tile.at_once // 4))
        yield "}"

    def _group(self, left: Slab, right: Slab, n: int, vectors: range) -> Iterator[str]:
        """The sums of a group in these vectors of the thread's columns."""
        tile, name = self.tile, right.name
        down, across = range(tile.thread_rows), range(tile.thread_rows // 4)
        yield "{"
        for v in across:
            at = f"g * {tile.rows // 4}u + ty + {v * tile.down}u"
            begin = f"a_begin[{at}]" if self.eights else f"vec4<i32>({ZERO})"
            yield f"let begin{v} = {begin}; let d{v} = a_scale[{at}];"
        for i in down:
            for j in vectors:
                yield f"var s{i}_{j} = vec4<i32>(begin{i // 4}.{'xyzw'[i % 4]});"
        written = tile.unroll // 4
        if written < WORDS:
            yield f"for (var first = 0u; first < {WORDS}u; first += {written}u) {{"
        for word in range(written):
            at = f"(g * {WORDS}u + {word}u{' + first' if written < WORDS else ''})"
            yield "{"
            for v in across:
                yield f"let a{v} = a_words[{at} * {left.stride}u + ty + {v * tile.down}u];"
            for j in vectors:
                yield f"let b{j} = {name}_words[{at} * {right.stride}u + tx + {j * tile.across}u];"
            for i in down:
                for j in vectors:
                    a = f"a{i // 4}.{'xyzw'[i % 4]}"
                    dots = ", ".join(f"dot4I8Packed({a}, b{j}.{lane})" for lane in "xyzw")
                    yield f"s{i}_{j} += vec4<i32>({dots});"
            yield "}"
        if written < WORDS:
            yield "}"
        for j in vectors:
            yield f"let e{j} = {name}_scale[g * {tile.columns // 4}u + tx + {j * tile.across}u];"
        for i in down:
            for j in vectors:
                sums = f"(bitcast<vec4<f32>>(s{i}_{j}) - vec4<f32>(12582912.0))"
                d = f"vec4<f32>(d{i // 4}.{'xyzw'[i % 4]})"
                yield f"c{n}_{i}_{j} = fma({sums} * e{j}, {d}, c{n}_{i}_{j});"  # d * e may be subnormal
        yield "}"


def build_integers(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    g = product_of(problem)
    return IntegerGemm(g, tile_of(config), constant_weights(g), device).kernel()
