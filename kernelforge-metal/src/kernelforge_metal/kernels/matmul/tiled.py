"""A tile of a product for each workgroup: where it is, where its operands come from, and how they are bound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel, Grid, Pack, Size, size_of
from kernelforge_metal.kernels.matmul.common import start_of
from kernelforge_metal.kernels.matmul.geometry import Product, count_of, count_text
from kernelforge_metal.kernels.matmul.numbers import Q8
from kernelforge_metal.kernels.matmul.result import Result, stored_columns
from kernelforge_metal.kernels.matmul.sources import Dense, Groups, Packed, Source
from kernelforge_metal.kernels.matmul.tile import LEFT, Division, Slab
from kernelforge_metal.kernels.matmul.weights import QUAD, Piece, Quads, Weights, pieces, weights_of
from kernelforge_metal.wgsl import FLAT, HALVES, IDS, fold

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo

BAND = 8
"""Columns of tiles whose rows of tiles are walked together: what they share of the weight stays in the cache."""


def constant_weights(product: Product) -> Weights | None:
    """How the right-hand sides are packed; None where they are no constants, or have batches."""
    rhs = product.problem.operand(product.rhs[0])
    return weights_of(rhs.dtype, product.columns, product.inner) if rhs.constant and rhs.rank == 2 else None


@dataclass(frozen=True)
class Tiled(ABC):
    """The text of a kernel that computes a tile of the result in each workgroup."""

    product: Product
    tile: Division
    weights: Weights | None
    """None: the right-hand side is no constant, or has batches."""
    device: DeviceInfo

    ids: ClassVar[str] = IDS
    """The declaration of the parameter of `main`."""
    number: ClassVar[str] = f"let number = {FLAT}; if (number >= down * across) {{ return; }}"
    """Of the tile; there may be more workgroups than tiles."""

    def slab(self, name: str, extent: int, source: Source) -> Slab:
        return Slab(name, self.tile, extent, source)

    @abstractmethod
    def body(self, left: Slab, rights: Sequence[Slab], result: Result, piece: Piece) -> Iterator[str]:
        """From the tile's place, `row0` and `column0`, to its stores."""

    def declarations(self) -> Iterator[str]:
        """What the body needs besides slabs and the result's functions."""
        return iter(())

    @property
    def ragged(self) -> bool:
        return self.product.inner % (self.tile.steps * self.tile.slabs) != 0

    @property
    def left(self) -> Slab:
        g = self.product
        clamped = g.static_rows is None or g.static_rows % self.tile.rows != 0
        last = "(rows - 1u)" if clamped else None
        if g.problem.operand(0).quantised:
            groups = Groups("x", self._start(0, "x"), last, g.rows.lhs, g.inner, self.ragged)
            return self.slab(LEFT, self.tile.rows, groups)
        source = Dense(
            "x",
            g.problem.operand(0).dtype,
            self.device,
            self._start(0, "x"),
            "row0",
            last,
            g.static_rows,
            g.rows.lhs,
            g.lhs_inner,
            g.inner,
            self.ragged,
            self.tile.lines,
        )
        return self.slab(LEFT, self.tile.rows, source)

    def right(self, n: int, piece: Piece) -> Slab:
        g = self.product
        name, index = ("b", "g")[n], g.rhs[n]
        clamped = not piece.whole or g.columns % self.tile.columns != 0
        source: Source
        if self.weights is not None:
            last = "(columns - 1u)"
            if isinstance(self.weights, Quads):
                last = f"{(self.weights.quads if piece.whole else piece.columns // QUAD) - 1}u"
            source = Packed(f"{name}_w", self.weights, last if clamped else None, self.ragged, self.tile.lines)
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
                self.tile.lines,
            )
        return self.slab(name, self.tile.columns, source)

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
            self.ids,
            HALVES if {"bf16", "f16"} & set(dtypes) else "",
            Q8 if {"q8", ACTIVATION_FORMAT} & set(dtypes) else "",
            *(slab.source.functions + slab.declaration for slab in (left, *rights)),
            result.functions,
            *self.declarations(),
            f"@compute @workgroup_size({tile.threads})",
            "fn main(ids: Ids) {",
            f"let t = ids.thread; let batch = ids.group.z; let rows = {count_text(g.rows, g.problem)};",
            place,
            f"let down = (rows + {tile.rows - 1}u) / {tile.rows}u;",
            self.number,
            f"let band = number / (down * {BAND}u); let within = number % (down * {BAND}u);",
            f"let width = min({BAND}u, across - band * {BAND}u);",
            f"let row0 = within / width * {tile.rows}u;",
            f"let column0 = (band * {BAND}u + within % width) * {tile.columns}u;",
            *self.body(left, rights, result, piece),
            "}",
        ]
        bindings = tuple(self.bindings(left, rights, piece, result))
        return Dispatch("\n".join(lines), bindings, self.workgroups(across), numbers)

    def workgroups(self, across: int) -> Grid:
        """A workgroup for each tile, batches along z."""
        g, tile = self.product, self.tile
        rows, batches = count_of(g.rows, g.problem), [count_of(b, g.problem) for b in g.batches]

        def counted(dims: Sequence[int]) -> tuple[int, int, int]:
            x, y, _ = fold(-(-size_of(rows, dims) // tile.rows) * across)
            return x, y, size_of(batches[0], dims) if batches else 1

        return counted if g.problem.dims else counted(())

    def kernel(self) -> GpuKernel:
        g, weights = self.product, self.weights
        parts = [Piece(0, g.columns, True)] if weights is None else pieces(weights, self.device)
        packs: dict[int, Pack] = {}
        if weights is not None and (pack := weights.packs(transposed=g.transpose_rhs)) is not None:
            packs = dict.fromkeys(g.rhs, pack)
        return GpuKernel(tuple(self.dispatch(piece) for piece in parts), packs)
