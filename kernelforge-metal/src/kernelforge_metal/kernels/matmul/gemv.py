"""A few rows times a packed weight: the threads of a workgroup share the inner dimension of a few columns.

Every weight is read once, in words of 16 bytes that lie side by side for neighbouring threads: the speed is that of memory as
long as enough of them are under way, and that of unpacking for four bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal.kernel import Dispatch, GpuKernel, Size
from kernelforge_metal.kernels.matmul.common import takes_products
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.numbers import Q4, Q8, floats
from kernelforge_metal.kernels.matmul.result import Result, stored_columns
from kernelforge_metal.kernels.matmul.vectors import Vectors
from kernelforge_metal.kernels.matmul.weights import OCTETS, QUAD, Quads, Rows, pieces, weights_of
from kernelforge_metal.wgsl import BF16, FLAT, IDS, SUBGROUP, SUBGROUP_IDS, grid

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernels.matmul.geometry import Product
    from kernelforge_metal.kernels.matmul.weights import Piece, Weights

MAX_ROWS = 8
"""With more, tiles in workgroup memory are faster."""
MAX_SUMS = 32
"""Of a thread: more do not fit the registers beside the words that are under way."""
MANY_COLUMNS = 4096
"""From which on a workgroup may take more of them and a large GPU still has enough workgroups."""
SMALLEST_SUBGROUP = 4


def takes_gemv(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    verdict = takes_products(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    g = product_of(problem)
    if not problem.operand(g.rhs[0]).constant:
        return Reject("takes a constant right-hand side")
    if g.static_rows is None or g.batches:
        return Reject("takes one matrix with a known number of rows")
    if not g.columns:
        return Reject("takes at least one column")
    if g.gain is not None and not g.inner:
        return Reject("takes rows of at least one element")
    if not 0 < g.static_rows <= MAX_ROWS:
        return Reject(f"takes 1 to {MAX_ROWS} rows, not {g.static_rows}")
    return Accept()


def takes_gemv_subgroups(problem: Problem, device: DeviceInfo) -> Verdict:
    if SUBGROUP not in device.features:
        return Reject("the device has no subgroups")
    return takes_gemv(problem, device)


def gemv_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`columns` of a workgroup, its `threads`, and how many units a thread loads before it multiplies (`unroll`)."""
    g = product_of(problem)
    sums = len(g.rhs) * max(1, g.static_rows or 1)
    quads, stored = problem.operand(g.rhs[0]).quantised, stored_columns(g)
    most = device.limit("max-compute-invocations-per-workgroup", 256)
    least = QUAD if quads or (stored == 4 and problem.results[0].dtype != "f32") else 1
    return ConfigSpace(
        (
            ("columns", tuple(c for c in (1, 2, 4, 8) if c >= least)),
            ("threads", tuple(t for t in (32, 64, 128, 256) if t <= most)),
            ("unroll", (1, 2, 4)),
        ),
        (
            (
                "the sums do not fit the registers",
                lambda c: c["columns"] == least or int(c["columns"]) * sums <= MAX_SUMS,
            ),
            (
                "too many words are under way",
                lambda c: c["unroll"] == 1 or int(c["columns"]) * int(c["unroll"]) * len(g.rhs) <= 16,
            ),
        ),
    )


def gemv_default(problem: Problem, device: DeviceInfo) -> Config:
    """As many threads as leave each two words to load of every column, of quantised weights one; more columns of large
    quantised weights, so that numbers of lhs are read less often."""
    g = product_of(problem)
    space = gemv_space(problem, device)
    parameters = dict(space.parameters)
    columns, threads = int(parameters["columns"][0]), [int(t) for t in parameters["threads"]]
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    quads = isinstance(weights, Quads)
    fitting = max((t for t in threads if t * (1 if quads else 2) <= weights.units), default=threads[0])
    if quads and g.columns >= MANY_COLUMNS and weights.units >= 2 * fitting and len(g.rhs) == 1:
        columns *= 2
    most = min(max(1, weights.units // fitting), 4 if quads and columns == QUAD else 2)
    chosen = [{"columns": c, "threads": fitting, "unroll": u} for c in (columns, QUAD) for u in (4, 2, 1) if u <= most]
    return next((c for c in chosen if c in space), next(iter(space)))


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
        return self.weights.units * (OCTETS if isinstance(self.weights, Quads) else self.weights.steps)

    def numbers(self, i: int, places: Sequence[str]) -> Iterator[str]:
        """`x{i}_{m}_{j}`: the four numbers of row m at each place, as they are multiplied by the weights."""
        for j, place in enumerate(places):
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
                if w.words == 1:
                    yield f"let w{i}_{n}_{q} = {name}[start{q} + u{i}];"
                else:
                    yield f"let w{i}_{n}_{q} = {name}[start{q} + u{i} + (u{i} & ~7u)];"
                    yield f"let v{i}_{n}_{q} = {name}[start{q} + u{i} + (u{i} & ~7u) + {OCTETS}u];"
                yield f"let s{i}_{n}_{q} = {name}_scales[scale{q} + (u{i} >> 3u)];"

    def floats(self, i: int) -> Iterator[str]:
        dtype = self.weights.dtype
        vectors = 1 if dtype == "f32" else 2
        yield from self.numbers(i, [f"{vectors}u * u{i} + {j}u" for j in range(vectors)])
        for n in range(len(self.names)):
            for c in range(self.columns):
                word = f"w{i}_{n}_{c}"
                parts = [word] if dtype == "f32" else [floats(f"{word}.xy", dtype), floats(f"{word}.zw", dtype)]
                for m in range(self.rows):
                    for j, part in enumerate(parts):
                        yield f"{self.sum(n, m, c)} += dot(x{i}_{m}_{j}, {part});"

    def quads(self, i: int) -> Iterator[str]:
        yield from self.numbers(i, [f"u{i} + (u{i} & ~7u) + {j * OCTETS}u" for j in range(2)])
        for n in range(len(self.names)):
            for c in range(self.columns):
                q, r = divmod(c, QUAD)
                word, lane, half = f"{i}_{n}_{q}", "xyzw"[r], "xy"[r % 2]
                yield "{"
                if self.weights.dtype == "q8":
                    yield f"let a = q8_numbers(w{word}.{lane}); let b = q8_numbers(v{word}.{lane});"
                else:
                    for j in range(4):
                        yield f"let h{j} = q4_numbers(w{word}.{lane} >> {4 * j}u);"
                    yield "let a = vec4<f32>(h0.x, h1.x, h2.x, h3.x); let b = vec4<f32>(h0.y, h1.y, h2.y, h3.y);"
                yield f"let sa = unpack2x16float(s{word}.{'xy'[r // 2]}).{half};"
                yield f"let sb = unpack2x16float(s{word}.{'zw'[r // 2]}).{half};"
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    yield f"{z} = fma(sa, dot(x{i}_{m}_0, a), fma(sb, dot(x{i}_{m}_1, b), {z}));"
                yield "}"

    # --- the sum of all threads' ---

    @property
    def shared(self) -> str:
        """`parts`, and `total(i, ids)`: sum `i` of all threads."""
        parts = self.threads // SMALLEST_SUBGROUP if self.subgroups else 1
        more = (
            f"  for (var s = 1u; s < ids.subgroups; s++) {{ sum += parts[s * {self.sums}u + i]; }}\n"
            if self.subgroups
            else ""
        )
        size = self.sums * (parts if self.subgroups else self.threads)
        return (
            f"var<workgroup> parts: array<f32, {size}>;\n"
            f"fn total(i: u32, ids: Ids) -> f32 {{\n  var sum = parts[i];\n{more}  return sum;\n}}\n"
        )

    def reduction(self) -> Iterator[str]:
        n = self.sums
        if self.subgroups:
            for i in range(n):
                yield f"z{i} = subgroupAdd(z{i});"
            yield "if (ids.lane == 0u) {"
            for i in range(n):
                yield f"parts[ids.subgroup * {n}u + {i}u] = z{i};"
            yield "}"
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
            yield f"let start{q} = quad{q} * {w.units * w.words}u; let scale{q} = quad{q} * {w.pairs}u;"

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
            BF16 if "bf16" in dtypes else "",
            {"q8": Q8, "q4": Q4}.get(self.weights.dtype, ""),
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


def build_gemv(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(problem, config, device, subgroups=False)


def build_gemv_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(problem, config, device, subgroups=True)


def _build(problem: Problem, config: Config, device: DeviceInfo, *, subgroups: bool) -> GpuKernel:
    g = product_of(problem)
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    columns, threads, unroll = (int(config[name]) for name in ("columns", "threads", "unroll"))
    names = ("w",) if len(g.rhs) == 1 else ("gate", "up")
    kernel = Gemv(g, weights, names, columns, threads, unroll, subgroups, device)
    pack = weights.packs(transposed=g.transpose_rhs)
    dispatches = tuple(kernel.dispatch(piece) for piece in pieces(weights, device))
    return GpuKernel(dispatches, {} if pack is None else dict.fromkeys(g.rhs, pack))
