"""The text of a GEMV: the threads of a workgroup share the inner dimension of a few columns.

Every weight is read once, in words of 16 bytes that lie side by side for neighbouring threads: the speed is that of memory as
long as enough of them are under way, and that of unpacking for four bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_metal.kernel import Dispatch, Size
from kernelforge_metal.kernels.matmul.numbers import Q4, Q8, floats
from kernelforge_metal.kernels.matmul.result import Result
from kernelforge_metal.kernels.matmul.vectors import Vectors
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads, Rows
from kernelforge_metal.wgsl import FLAT, HALVES, IDS, SUBGROUP_IDS, grid

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_metal.kernels.matmul.geometry import Product
    from kernelforge_metal.kernels.matmul.weights import Piece, Weights

SMALLEST_SUBGROUP = 4


def parts_of(threads: int, *, subgroups: bool) -> int:
    """How many partial results of each sum are in workgroup memory."""
    return threads // SMALLEST_SUBGROUP if subgroups else threads


@dataclass(frozen=True)
class Gemv:
    """The text of a GEMV kernel."""

    product: Product
    weights: Weights
    names: tuple[str, ...]
    """Of the weights' arrays: one, or gate and up."""
    columns: int
    threads: int
    unroll: int
    subgroups: bool
    device: DeviceInfo

    @property
    def rows(self) -> int:
        return self.product.static_rows or 0

    @property
    def sums(self) -> int:
        """Of a thread: for each weight, row and column, then the squares of each row that is normalised."""
        return self.squares + (0 if self.product.gain is None else self.rows)

    @property
    def squares(self) -> int:
        """The number of the first row's."""
        return len(self.names) * self.rows * self.columns

    def sum(self, weight: int, row: int, column: int) -> str:
        return f"z{(weight * self.rows + row) * self.columns + column}"

    @property
    def functions(self) -> str:
        """Of the weights' numbers."""
        return {"q8": Q8, "q4": Q4}.get(self.weights.dtype, "")

    # --- lhs ---

    @property
    def lhs(self) -> Vectors:
        g = self.product
        return Vectors(g, self.device, "x", 0, g.lhs_inner, g.rows.lhs, self.covered)

    @property
    def gain(self) -> Vectors | None:
        g = self.product
        if g.gain is None:
            return None
        (step,) = g.problem.operand(g.gain).element_strides()
        return Vectors(g, self.device, "gain", g.gain, step, 0, self.covered)

    @property
    def covered(self) -> int:
        """Steps of the inner dimension in all units."""
        return self.weights.units * self.weights.steps

    @property
    def vectors(self) -> int:
        """Of four numbers of a row in a unit."""
        return self.weights.steps // 4

    def numbers(self, i: int) -> Iterator[str]:
        """`x{i}_{m}_{j}`: the numbers of row m that the weights of unit `i` are multiplied by, four at a time."""
        for j in range(self.vectors):
            place = f"{self.vectors}u * u{i} + {j}u"
            if self.product.gain is None:
                for m in range(self.rows):
                    yield f"let x{i}_{m}_{j} = x_four({m}u, {place});"
                continue
            yield f"let g{i}_{j} = gain_four(0u, {place});"
            for m in range(self.rows):
                yield f"let l{i}_{m}_{j} = x_four({m}u, {place}); let x{i}_{m}_{j} = l{i}_{m}_{j} * g{i}_{j};"
                yield f"z{self.squares + m} += dot(l{i}_{m}_{j}, l{i}_{m}_{j});"

    # --- the sums ---

    def products(self) -> Iterator[str]:
        """All units of the columns: those of a thread are `threads` apart."""
        for i in range(self.sums):
            yield f"var z{i} = 0.0;"
        full, left = divmod(self.weights.units, self.threads)
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

    def together(self, units: list[str]) -> Iterator[str]:
        """Units whose words are all loaded first."""
        one = self.quads if isinstance(self.weights, Quads) else self.floats
        for i, unit in enumerate(units):
            yield f"let u{i} = {unit};"
            yield from self.loads(i)
        for i in range(len(units)):
            yield from one(i)

    def loads(self, i: int) -> Iterator[str]:
        w = self.weights
        for n, name in enumerate(self.names):
            if isinstance(w, Rows):
                for c in range(self.columns):
                    yield f"let w{i}_{n}_{c} = {name}[start{c} + u{i}];"
                continue
            for q in range(self.columns // QUAD):
                yield f"let w{i}_{n}_{q} = {name}[start{q} + u{i}];"
                yield f"let s{i}_{n}_{q} = {name}_scales[scale{q} + u{i} / {w.group_units}u];"

    def floats(self, i: int) -> Iterator[str]:
        yield from self.numbers(i)
        dtype = self.weights.dtype
        for n in range(len(self.names)):
            for c in range(self.columns):
                word = f"w{i}_{n}_{c}"
                parts = [word] if dtype == "f32" else [floats(f"{word}.xy", dtype), floats(f"{word}.zw", dtype)]
                for m in range(self.rows):
                    for j, part in enumerate(parts):
                        yield f"{self.sum(n, m, c)} += dot(x{i}_{m}_{j}, {part});"

    def quads(self, i: int) -> Iterator[str]:
        yield from self.numbers(i)
        for n in range(len(self.names)):
            for c in range(self.columns):
                word, scale = self.word(i, n, c)
                yield "{"
                if self.vectors == 1:
                    yield f"let a = q8_numbers({word});"
                else:
                    for j in range(4):
                        yield f"let h{j} = q4_numbers({word} >> {4 * j}u);"
                    yield "let a = vec4<f32>(h0.x, h2.x, h0.y, h2.y); let b = vec4<f32>(h1.x, h3.x, h1.y, h3.y);"
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    product = f"dot(x{i}_{m}_0, a)" + (f" + dot(x{i}_{m}_1, b)" if self.vectors == 2 else "")
                    yield f"{z} = fma({scale}, {product}, {z});"
                yield "}"

    def word(self, i: int, weight: int, column: int) -> tuple[str, str]:
        """What was loaded of a quantised column for unit `i`: a u32, and the scale as f32."""
        q, r = divmod(column, QUAD)
        loaded = f"{i}_{weight}_{q}"
        return f"w{loaded}.{'xyzw'[r]}", f"unpack2x16float(s{loaded}.{'xy'[r // 2]}).{'xy'[r % 2]}"

    # --- the sum of all threads' ---

    @property
    def shared(self) -> str:
        """`parts`, and `total(i, ids)`: sum `i` of all threads."""
        more = (
            f"  for (var s = 1u; s < ids.subgroups; s++) {{ sum += parts[s * {self.sums}u + i]; }}\n"
            if self.subgroups
            else ""
        )
        size = self.sums * parts_of(self.threads, subgroups=self.subgroups)
        return (
            f"var<workgroup> parts: array<f32, {size}>;\n"
            f"fn total(i: u32, ids: Ids) -> f32 {{\n  var sum = parts[i];\n{more}  return sum;\n}}\n"
        )

    def reduction(self) -> Iterator[str]:
        n, each = self.sums, self.squares
        if self.subgroups:
            halved = each if each & (each - 1) == 0 else 0
            if halved:
                yield f"if (ids.lanes >= {halved}u && ids.subgroups * ids.lanes == {self.threads}u) {{"
                yield from self.halving(halved)
                yield "} else {"
                yield from self.adding(range(halved))
                yield "}"
            yield from self.adding(range(halved, n))
        else:
            for i in range(n):
                yield f"parts[t * {n}u + {i}u] = z{i};"
            yield f"for (var half = {self.threads // 2}u; half > 0u; half >>= 1u) {{"
            yield "workgroupBarrier();"
            yield f"for (var i = t * {n}u; t < half && i < (t + 1u) * {n}u; i++) {{"
            yield f"parts[i] += parts[i + half * {n}u];"
            yield "}"
            yield "}"
        yield "workgroupBarrier();"

    def adding(self, sums: range) -> Iterator[str]:
        """Each sum across the subgroup by itself."""
        for i in sums:
            yield f"z{i} = subgroupAdd(z{i});"
        if sums:
            yield "if (ids.lane == 0u) {"
            for i in sums:
                yield f"parts[ids.subgroup * {self.sums}u + {i}u] = z{i};"
            yield "}"

    def halving(self, n: int) -> Iterator[str]:
        """The first `n` sums, a power of two, across a full subgroup of at least as many lanes: two lanes exchange halves of what
        they have, until each has one sum, which is that of its number. 16 sums of 32 lanes take 16 exchanges in place of 80."""
        half = n // 2
        while half:
            yield f"let upper{half} = (ids.lane & {half}u) != 0u;"
            for i in range(half):
                kept, given = f"z{i}, z{i + half}, upper{half}", f"z{i + half}, z{i}, upper{half}"
                yield f"z{i} = select({kept}) + subgroupShuffleXor(select({given}), {half}u);"
            half //= 2
        yield f"for (var apart = {n}u; apart < ids.lanes; apart *= 2u) {{ z0 += subgroupShuffleXor(z0, apart); }}"
        yield f"if (ids.lane < {n}u) {{ parts[ids.subgroup * {self.sums}u + ids.lane] = z0; }}"

    def stores(self, result: Result) -> Iterator[str]:
        """Each thread finishes one column, or four, of one row."""
        g, v, each = self.product, result.vector, self.rows * self.columns
        yield f"for (var i = t; i < {each // v}u; i += {self.threads}u) {{"
        yield f"let row = i / {self.columns // v}u; let own = i % {self.columns // v}u * {v}u; let batch = 0u;"
        yield "if (column0 + own < columns) {"
        scaled = ""
        if g.gain is not None:
            mean = f"total({self.squares}u + row, ids) / {g.inner}.0"
            yield f"let scale = 1.0 / sqrt({mean} + {float(str(g.problem.attr('eps')))!r});"
            scaled = " * scale"
        values = []
        for j in range(v):
            place = f"row * {self.columns}u + own + {j}u"
            sums = [f"total({place} + {n * each}u, ids){scaled}" for n in range(len(self.names))]
            values.append(result.finished(sums, "row", f"first + column0 + own + {j}u"))
        value = values[0] if v == 1 else f"vec4<f32>({', '.join(values)})"
        yield f"store(batch, row, first + column0 + own, {value});"
        yield "} }"

    def starts(self, piece: Piece) -> Iterator[str]:
        w = self.weights
        if isinstance(w, Rows):
            for c in range(self.columns):
                yield f"let start{c} = min(column0 + {c}u, columns - 1u) * {w.units}u;"
            return
        last = w.quads - 1 if piece.whole else piece.columns // QUAD - 1
        for q in range(self.columns // QUAD):
            yield f"let quad{q} = min(column0 / {QUAD}u + {q}u, {last}u);"
            yield f"let start{q} = quad{q} * {w.units}u; let scale{q} = quad{q} * {w.groups}u;"

    def dispatch(self, piece: Piece) -> Dispatch:
        g = self.product
        dtypes = {t.dtype for t in (*g.problem.operands, *g.problem.results) if t is not None}
        narrow = g.problem.results[0].dtype != "f32"
        result = Result(g, self.device, 4 if narrow else 1)
        word = "vec4<f32>" if self.weights.dtype == "f32" else "vec4<u32>"
        weights = [self.weights.bindings(n, i, piece, word) for n, i in zip(self.names, g.rhs, strict=True)]
        vectors = [v for v in (self.lhs, self.gain) if v is not None]
        bindings = [*(v.binding for v in vectors), *(b for found in weights for b in found), *result.bindings]
        columns = min(piece.columns, g.columns - piece.first)
        numbers: tuple[tuple[str, Size], ...] = ()
        place = f"let first = 0u; let columns = {columns}u;"
        if not piece.whole:
            numbers = (("first", piece.first), ("columns", columns))
            place = "let first = p.first; let columns = p.columns;"
        lines = [
            SUBGROUP_IDS if self.subgroups else IDS,
            HALVES if {"bf16", "f16"} & set(dtypes) else "",
            self.functions,
            *(v.function for v in vectors),
            result.functions,
            self.shared,
            f"@compute @workgroup_size({self.threads})",
            "fn main(ids: Ids) {",
            "let t = ids.thread;",
            place,
            f"let column0 = {FLAT} * {self.columns}u;",
            *self.starts(piece),
            *self.products(),
            *self.reduction(),
            *self.stores(result),
            "}",
        ]
        return Dispatch("\n".join(lines), tuple(bindings), grid(-(-columns // self.columns)), numbers)
