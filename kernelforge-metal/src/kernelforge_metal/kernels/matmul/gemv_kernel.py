"""The text of a GEMV: the threads of a workgroup share the inner dimension of a few columns.

Every weight is read once, in words of 16 bytes that lie side by side for neighbouring threads: the speed is that of memory as
long as enough of them are under way. Where a thread has registers for its part of lhs, its workgroup takes several tiles of
columns one after the other: lhs is read once for all, and words of the next tile are under way while those of one are multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernelforge_metal.kernel import Dispatch, Size
from kernelforge_metal.kernels.matmul.gemv_sums import Sums
from kernelforge_metal.kernels.matmul.result import Result
from kernelforge_metal.kernels.matmul.vectors import Groups, Vectors
from kernelforge_metal.kernels.matmul.weights import QUAD, Rows
from kernelforge_metal.wgsl import FLAT, HALVES, IDS, SUBGROUP_IDS, grid

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_metal.kernels.matmul.geometry import Product
    from kernelforge_metal.kernels.matmul.weights import Piece, Weights

MAX_KEPT = 64
"""Registers for what a thread keeps of lhs."""


@dataclass(frozen=True)
class Gemv(ABC):
    """The text of a GEMV kernel, but for what a thread does with a unit of weights."""

    product: Product
    weights: Weights
    names: tuple[str, ...]
    """Of the weights' arrays: one, or gate and up."""
    columns: int
    """Of a tile."""
    threads: int
    unroll: int
    tiles: int
    """Of a workgroup. More than one only where a thread keeps its numbers of lhs (`keeps_lhs`)."""
    subgroups: bool
    device: DeviceInfo
    span: int = 1
    """Words of a quantised weight side by side that make a unit here."""

    # --- the product of a unit ---

    @property
    @abstractmethod
    def functions(self) -> str:
        """WGSL functions that it needs."""

    @abstractmethod
    def lhs(self, i: int) -> Iterator[tuple[str, str]]:
        """Variables for the numbers of lhs that the weights of unit `i` are multiplied by, and their types."""

    @abstractmethod
    def numbers(self, i: int) -> Iterator[str]:
        """Fill them."""

    def prepared(self, i: int) -> Iterator[str]:
        """What else they need, while words are under way."""
        yield from ()

    @abstractmethod
    def multiplied(self, i: int) -> Iterator[str]:
        """Add their products with the unit's words to the sums."""

    def start(self) -> Iterator[str]:
        """What all tiles share."""
        yield from (f"var {name} = 0.0;" for name in self.sums.once)

    def tile_end(self) -> Iterator[str]:
        """What a tile's sums need besides."""
        yield from ()

    lhs_first: ClassVar[bool] = False
    """Whether its numbers are asked for before words are."""

    # --- sizes ---

    @property
    def rows(self) -> int:
        return self.product.static_rows or 0

    @property
    def sums(self) -> Sums:
        squares = tuple(f"squares{m}" for m in range(self.rows)) if self.product.gain is not None else ()
        return Sums(len(self.names) * self.rows * self.columns, self.tiles, squares, self.threads, self.subgroups)

    def sum(self, weight: int, row: int, column: int) -> str:
        return f"z{(weight * self.rows + row) * self.columns + column}"

    @property
    def steps(self) -> int:
        """Of the inner dimension in a unit."""
        return self.weights.steps * self.span

    @property
    def units(self) -> int:
        """Of a column."""
        return self.weights.units // self.span

    @property
    def covered(self) -> int:
        """Steps of the inner dimension in all units."""
        return self.units * self.steps

    @property
    def vectors(self) -> int:
        """Of four numbers of a row in a unit."""
        return self.steps // 4

    @property
    def max_kept(self) -> int:
        """Numbers of lhs that a thread keeps: more do not fit the registers beside words and sums."""
        return MAX_KEPT

    @property
    def keeps_lhs(self) -> bool:
        """Whether a thread loads all its units at once and has registers for what it multiplies them by."""
        units = -(-self.units // self.threads)
        return units <= self.unroll and units * self.rows * self.steps <= self.max_kept

    # --- lhs ---

    @property
    def x(self) -> Vectors | Groups:
        """Rows of lhs."""
        g = self.product
        return Vectors(g, self.device, "x", 0, g.lhs_inner, g.rows.lhs, self.covered)

    @property
    def gain(self) -> Vectors | None:
        g = self.product
        if g.gain is None:
            return None
        (step,) = g.problem.operand(g.gain).element_strides()
        return Vectors(g, self.device, "gain", g.gain, step, 0, self.covered)

    def loaded(self, i: int, to: str = "x") -> Iterator[str]:
        """`x{i}_{m}_{j}`: the numbers of row m for unit `i`, four at a time, times the gain, their squares added up."""
        for j in range(self.vectors):
            place = f"{self.vectors}u * u{i} + {j}u"
            if self.product.gain is None:
                for m in range(self.rows):
                    yield f"{to}{i}_{m}_{j} = x_four({m}u, {place});"
                continue
            yield f"let g{i}_{j} = gain_four(0u, {place});"
            for m in range(self.rows):
                yield f"let l{i}_{m}_{j} = x_four({m}u, {place}); {to}{i}_{m}_{j} = l{i}_{m}_{j} * g{i}_{j};"
                yield f"squares{m} += dot(l{i}_{m}_{j}, l{i}_{m}_{j});"

    # --- weights ---

    def words(self, i: int) -> Iterator[tuple[str, str, str]]:
        """Variables for the words of unit `i` and their scales, their types and values."""
        w = self.weights
        for n, name in enumerate(self.names):
            if isinstance(w, Rows):
                kind = "vec4<f32>" if w.dtype == "f32" else "vec4<u32>"
                for c in range(self.columns):
                    yield f"w{i}_{n}_{c}", kind, f"{name}[start{c} + u{i}]"
                continue
            for q in range(self.columns // QUAD):
                for s in range(self.span):
                    yield f"w{i}_{n}_{q}_{s}", "vec4<u32>", f"{name}[start{q} + {self.span}u * u{i} + {s}u]"
                scale = f"{name}_scales[scale{q} + u{i} / {w.group_units // self.span}u]"
                yield f"s{i}_{n}_{q}", "vec2<u32>", scale

    def word(self, i: int, weight: int, column: int, part: int = 0) -> str:
        """A u32 that was loaded of a quantised column for unit `i`."""
        q, r = divmod(column, QUAD)
        return f"w{i}_{weight}_{q}_{part}.{'xyzw'[r]}"

    def scale(self, i: int, weight: int, column: int) -> str:
        """The scale of a quantised column's unit `i` as f32."""
        q, r = divmod(column, QUAD)
        return f"unpack2x16float(s{i}_{weight}_{q}.{'xy'[r // 2]}).{'xy'[r % 2]}"

    def column(self, tile: str) -> str:
        """The first of a tile."""
        return f"({FLAT} * {self.tiles}u + {tile}) * {self.columns}u"

    def place(self, piece: Piece, tile: str) -> Iterator[str]:
        """Where a tile's weights start."""
        w = self.weights
        yield f"let column0 = {self.column(tile)};"
        if isinstance(w, Rows):
            for c in range(self.columns):
                yield f"let start{c} = min(column0 + {c}u, columns - 1u) * {w.units}u;"
            return
        last = w.quads - 1 if piece.whole else piece.columns // QUAD - 1
        for q in range(self.columns // QUAD):
            yield f"let quad{q} = min(column0 / {QUAD}u + {q}u, {last}u);"
            yield f"let start{q} = quad{q} * {w.units}u; let scale{q} = quad{q} * {w.groups}u;"

    # --- tiles ---

    def body(self, piece: Piece) -> Iterator[str]:
        yield from self.start()
        yield from self.several_tiles(piece) if self.keeps_lhs else self.one_tile(piece)
        yield from self.sums.of_all()

    def one_tile(self, piece: Piece) -> Iterator[str]:
        """lhs is read again by each workgroup, `unroll` units after the other."""
        yield from self.place(piece, "0u")
        yield from self.zeros()
        full, left = divmod(self.units, self.threads)
        loops = full // self.unroll
        if loops > 1:
            step = self.unroll * self.threads
            yield f"for (var unit = t; unit < {loops * step}u; unit += {step}u) {{"
            yield from self.together([f"unit + {i * self.threads}u" for i in range(self.unroll)])
            yield "}"
        for start in range(loops * self.unroll if loops > 1 else 0, full, self.unroll):
            yield "{"
            own = range(start, min(start + self.unroll, full))
            yield from self.together([f"t + {i * self.threads}u" for i in own])
            yield "}"
        if left:
            yield f"if (t < {left}u) {{"
            yield from self.together([f"t + {full * self.threads}u"])
            yield "}"
        yield from self.tile_end()
        yield from self.sums.of_tile("0u")

    def together(self, units: list[str]) -> Iterator[str]:
        """Units whose words are all loaded first."""

        def numbers(i: int) -> Iterator[str]:
            yield from (f"var {name}: {kind};" for name, kind in self.lhs(i))
            yield from self.numbers(i)

        for i, unit in enumerate(units):
            yield f"let u{i} = {unit};"
            if self.lhs_first:
                yield from numbers(i)
            yield from (f"let {name} = {value};" for name, _, value in self.words(i))
        for i in range(len(units)):
            if not self.lhs_first:
                yield from numbers(i)
            yield from self.prepared(i)
            yield from self.multiplied(i)

    def several_tiles(self, piece: Piece) -> Iterator[str]:
        """lhs stays in registers. The next tile's words are asked for as soon as those of one are used."""
        full, left = divmod(self.units, self.threads)
        guards = ["{"] * full + ([f"if (t < {left}u) {{"] if left else [])

        def fetched(tile: str) -> Iterator[str]:
            yield from self.place(piece, tile)
            for i, guard in enumerate(guards):
                yield guard
                yield from (f"{name} = {value};" for name, _, value in self.words(i))
                yield "}"

        def numbers() -> Iterator[str]:
            for i, guard in enumerate(guards):
                yield from (f"var {name}: {kind};" for name, kind in self.lhs(i))
                yield guard
                yield from self.numbers(i)
                yield "}"

        for i in range(len(guards)):
            yield f"let u{i} = t + {i * self.threads}u;"
            yield from (f"var {name}: {kind};" for name, kind, _ in self.words(i))
        if self.lhs_first:
            yield from numbers()
        yield "{"
        yield from fetched("0u")
        yield "}"
        if not self.lhs_first:
            yield from numbers()
        for i, guard in enumerate(guards):
            if lines := list(self.prepared(i)):
                yield from (guard, *lines, "}")
        yield f"for (var tile = 0u; tile < {self.tiles}u; tile++) {{" if self.tiles > 1 else "{ let tile = 0u;"
        yield from self.zeros()
        for i, guard in enumerate(guards):
            yield guard
            yield from self.multiplied(i)
            yield "}"
        yield "{"
        yield from self.place(piece, "tile")
        yield from self.tile_end()
        yield "}"
        if self.tiles > 1:
            yield f"if (tile + 1u < {self.tiles}u) {{"
            yield from fetched("tile + 1u")
            yield "}"
        yield from self.sums.of_tile("tile")
        yield "}"

    def zeros(self) -> Iterator[str]:
        yield from (f"var z{i} = 0.0;" for i in range(self.sums.each))

    # --- the result ---

    def stores(self, result: Result) -> Iterator[str]:
        """Each thread finishes one column, or four, of one row."""
        g, v, n = self.product, result.vector, self.sums.each // len(self.names)
        each, across = self.rows * self.columns // v, self.columns // v
        yield f"for (var i = t; i < {self.tiles * each}u; i += {self.threads}u) {{"
        yield f"let tile = i / {each}u; let row = i % {each}u / {across}u; let own = i % {across}u * {v}u; let batch = 0u;"
        yield f"let column = {self.column('tile')} + own;"
        yield "if (column < columns) {"
        scaled = ""
        if g.gain is not None:
            mean = f"total({self.sums.each * self.tiles}u + row, ids) / {g.inner}.0"
            yield f"let scale = 1.0 / sqrt({mean} + {float(str(g.problem.attr('eps')))!r});"
            scaled = " * scale"
        values = []
        for e in range(v):
            place = f"tile * {self.sums.each}u + row * {self.columns}u + own + {e}u"
            sums = [f"total({place} + {i * n}u, ids){scaled}" for i in range(len(self.names))]
            values.append(result.finished(sums, "row", f"first + column + {e}u"))
        value = values[0] if v == 1 else f"vec4<f32>({', '.join(values)})"
        yield f"store(batch, row, first + column, {value});"
        yield "} }"

    def dispatch(self, piece: Piece) -> Dispatch:
        g = self.product
        dtypes = {t.dtype for t in (*g.problem.operands, *g.problem.results) if t is not None}
        result = Result(g, self.device, 1 if g.problem.results[0].dtype == "f32" else 4)
        word = "vec4<f32>" if self.weights.dtype == "f32" else "vec4<u32>"
        weights = [self.weights.bindings(n, i, piece, word) for n, i in zip(self.names, g.rhs, strict=True)]
        vectors = [v for v in (self.x, self.gain) if v is not None]
        bindings = [*(v.binding for v in vectors), *(b for found in weights for b in found), *result.bindings]
        columns = min(piece.columns, g.columns - piece.first)
        numbers: tuple[tuple[str, Size], ...] = ()
        place = f"let first = 0u; let columns = {columns}u;"
        if not piece.whole:
            numbers = (("first", piece.first), ("columns", columns))
            place = "let first = p.first; let columns = p.columns;"
        lines = [
            SUBGROUP_IDS if self.subgroups else IDS,
            HALVES if {"bf16", "f16"} & dtypes else "",
            self.functions,
            *(v.function for v in vectors),
            result.functions,
            self.sums.functions,
            f"@compute @workgroup_size({self.threads})",
            "fn main(ids: Ids) {",
            "let t = ids.thread;",
            place,
            *self.body(piece),
            *self.stores(result),
            "}",
        ]
        return Dispatch("\n".join(lines), tuple(bindings), grid(-(-columns // (self.columns * self.tiles))), numbers)
