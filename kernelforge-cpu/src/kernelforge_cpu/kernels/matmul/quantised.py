"""`vectorized` matmul and glu_matmul for quantised weights: widened to f32 in registers, products and sums in f32.

A weight d * v is exact in f32. Low tiles multiply by v alone and scale the sums of a group; in high ones, where the weights
are widened for many rows, each weight is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge.variant import ConfigSpace, Reject
from kernelforge_cpu.emit import I64, PTR, Pointer
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_size
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.cores import LINE, in_flight
from kernelforge_cpu.kernels.matmul.config import BEST_ROWS, BLOCKS, ROWS, UNKNOWN_L2, lanes, registers, static_rows
from kernelforge_cpu.kernels.matmul.geometry import LHS, geometry
from kernelforge_cpu.kernels.matmul.groups import OCTET, Groups
from kernelforge_cpu.kernels.matmul.product import Product
from kernelforge_cpu.kernels.matmul.tile import Tile
from kernelforge_cpu.kernels.matmul.vectorized import FLOATS, shared_parts, takes_rows

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Builder, Value
    from kernelforge_cpu.kernels.matmul.product import Operands, Widened

OCTETS = GROUP // OCTET
UNROLLED = 128
"""Multiply-adds up to which the loop over a group is written out."""
CHAINS = 4
"""Independent sums that hide most of the latency of a multiply-add."""


def takes_quantised(problem: Problem, device: DeviceInfo) -> Verdict:
    g = geometry(problem)
    for i, t in enumerate((*problem.operands, *problem.results)):
        if t is None:
            continue
        if i in g.rhs:
            if not t.quantised:
                return Reject(f"takes quantised weights, not {t.dtype}")
            if not t.constant or t.rank > 2:
                return Reject(f"takes constant weights of rank 2, not {t}")
        elif t.dtype not in FLOATS:
            return Reject(f"takes {', '.join(FLOATS)}, not {t.dtype}")
    return takes_rows(problem, g)


def quantised_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """As `matmul_space`. A panel of a whole number of vectors, any number of rows."""
    g = geometry(problem)
    inner, columns, rows = int(g.inner), int(g.columns), static_rows(g)
    low = rows is not None and rows < ROWS[0]
    own = () if rows is None or rows > ROWS[-1] else (max(1, rows),)
    blocked = problem.results[0].dtype == "f32" and len(g.rhs) == 1 and not low
    vectors = [v for v in (1, 2) if v == 1 or (v - 1) * lanes(device) < columns]

    def registers_used(c: Config) -> int:
        width = int(c["panels"]) * int(c["vectors"])
        return (int(c["rows"]) + 1) * width + 1

    return ConfigSpace(
        (
            ("rows", own if low else tuple(sorted({*ROWS, *own}))),
            ("panels", (2,) if len(g.rhs) == 2 else (1, 2)),
            ("vectors", tuple(vectors)),
            ("kc", (*(b for b in BLOCKS if blocked and b < inner), max(GROUP, inner))),
            ("group", (1,) if low else (1, 2, 4)),
        ),
        (("the tile needs more registers than there are", lambda c: registers_used(c) <= registers(device)),),
    )


def quantised_default(problem: Problem, device: DeviceInfo) -> Config:
    """As `matmul_default`: the panel width depends on the device and the number of columns alone."""
    g = geometry(problem)
    space = quantised_space(problem, device)
    parameters = {name: [int(v) for v in values] for name, values in space.parameters}
    vectors = min(2 if registers(device) == 32 else 1, parameters["vectors"][-1])
    width = vectors * lanes(device)
    panels = 2 if len(g.rhs) == 2 or int(g.columns) > width else 1

    def config(rows: int, kc: int, group: int) -> Config:
        return dict(zip(parameters, (rows, panels, vectors, kc, group), strict=True))

    rows = static_rows(g)
    if rows is not None and rows <= ROWS[-1] and (once := config(max(1, rows), parameters["kc"][-1], 1)) in space:
        return once
    half = device.limit("l2_bytes", UNKNOWN_L2) // 2
    weight = problem.operand(g.rhs[0])
    fitting = [b for b in parameters["kc"] if weight.bytes_of(b * panels * width) <= half]
    kc = fitting[-1] if fitting else parameters["kc"][0]
    group = max(n for n in parameters["group"] if n == 1 or n * weight.bytes_of(kc * panels * width) <= half)
    legal = [r for r in parameters["rows"] if config(r, kc, group) in space]
    return config(max((r for r in legal if r <= BEST_ROWS), default=legal[0]), kc, group)


def build_quantised(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    g = geometry(problem)
    rows, panels, vectors, kc, group = (int(config[name]) for name in ("rows", "panels", "vectors", "kc", "group"))
    tile = Tile(rows, panels, vectors, k.lanes, 1, registers(device), in_flight(device))
    layout = Groups(problem.operand(g.rhs[0]).dtype, vectors, k.lanes, int(g.columns), int(g.inner))

    def text() -> str:
        rhs = [k.buffer(i, "i8") for i in g.rhs]
        QuantisedProduct(k, problem, g, tile, kc, group, rhs, layout).emit()
        return k.text()

    packs = dict.fromkeys(g.rhs, layout.pack)
    return NativeKernel((Phase(k.name, shared_parts(problem, g, tile)),), text, packs)


@dataclass(frozen=True)
class QuantisedProduct(Product):
    """The same loops around tiles of quantised weights."""

    layout: Groups

    def emit_tile(
        self,
        at: Operands,
        row: Value,
        count: Value,
        panel: Value,
        end: Value,
        step: Value,
        sums: Pointer,
        wide: Widened | None,
    ) -> None:
        k, g, tile, layout = self.k, self.g, self.tile, self.layout
        steps = emit_size(k, self.problem, g.rows.strides[LHS]), emit_size(k, self.problem, g.inner_step)
        lhs = at.lhs.at(row * steps[0]).at(step * self.kc * steps[1])
        block = self.kc // GROUP
        first = step * block
        n = k.i64(layout.groups) if self.steps == 1 else k.min(layout.groups - first, block)
        numbers = [panel, *(k.min(panel + i, end - 1) for i in range(1, self.advance))]
        starts = [(p, i * layout.groups + first) for p in at.rhs for i in numbers]
        groups = [p.at(i * layout.group_bytes) for p, i in starts]
        scales = [p.at(layout.scales).of("f16").at(i * layout.width) for p, i in starts]
        rows = static_rows(g)
        heights = tile.heights(rows)
        for height in heights:
            with k.if_(count.eq(height)) if len(heights) > 1 else nullcontext():
                self.emit_sums(height, lhs, steps, groups, scales, n, sums, height < tile.rows or height == rows)

    def emit_sums(
        self,
        rows: int,
        lhs: Pointer,
        steps: tuple[Value, Value],
        groups: Sequence[Pointer],
        scales: Sequence[Pointer],
        n: Value,
        out: Pointer,
        streamed: bool,
    ) -> None:
        """As `tile.emit_products`, over `n` groups of each panel."""
        k, count = self.k, len(groups)
        numbers = (*steps, n)
        passed = [v for v in numbers if v.const is None]

        def write(b: Builder, left: Value, sums: Value, *rest: Value) -> list[Value]:
            own = [Pointer(b, v.name, "i8") for v in rest[:count]]
            factors = [Pointer(b, v.name, "f16") for v in rest[count : 2 * count]]
            variables = iter(rest[2 * count :])
            row, inner, total = (next(variables) if v.const is None else b.i64(int(v.const)) for v in numbers)
            x = Pointer(b, left.name, lhs.element)
            for i, found in enumerate(self.sums(b, rows, x, (row, inner), own, factors, total, streamed)):
                Pointer(b, sums.name, "f32").store(found, i * self.tile.lanes)
            return []

        types = [PTR] * (2 + 2 * count) + [I64] * len(passed)
        name = f"{k.name}_rows{rows}"
        k.call(k.function(name, types, write, inline=False), lhs, out, *groups, *scales, *passed)

    def sums(
        self,
        k: Builder,
        rows: int,
        lhs: Pointer,
        steps: tuple[Value, Value],
        groups: Sequence[Pointer],
        scales: Sequence[Pointer],
        n: Value,
        streamed: bool,
    ) -> list[Value]:
        """Row by row, the vectors of sums of all panels."""
        tile, layout = self.tile, self.layout
        row_step, inner_step = steps
        vectors = len(groups) * tile.vectors
        count = rows * vectors
        late = 2 * count + vectors + 1 <= tile.registers  # the scales come after the sums of a group
        chains = max(1, CHAINS // count) if late else 1

        def octet(index: Value, g: Value, factors: Sequence[Value], own: Sequence[Value]) -> list[Value]:
            """The sums after eight more steps."""
            sums = list(own)
            left = lhs.at((g * GROUP + index * layout.stride) * inner_step)
            read = [layout.load_octet(k, p.at(g * layout.group_bytes), index) for p in groups]
            for i in range(OCTET):
                weights = [w for panel in read for w in panel[i]]
                if not late:
                    weights = [w * f for w, f in zip(weights, factors, strict=True)]
                at = i % chains * count
                for r in range(rows):
                    x = k.broadcast(left.load_f32(row_step * r + inner_step * layout.step(i)), tile.lanes)
                    for w in weights:
                        sums[at] = k.fma(x, w, sums[at])
                        at += 1
            return sums

        zero = k.f32(0.0, tile.lanes)
        with k.for_(0, n, 1, [zero] * count) as loop:
            if streamed:
                for p in groups:
                    for line in range(0, layout.group_bytes, LINE):
                        p.at(loop.i * layout.group_bytes).prefetch(tile.ahead // len(groups) + line)
            starts = [p.at(loop.i * layout.width) for p in scales]
            factors = [p.load_f32(v * tile.lanes, tile.lanes) for p in starts for v in range(tile.vectors)]
            own = [zero] * (count * chains) if late else loop.values
            if count * GROUP <= UNROLLED:
                for i in range(OCTETS):
                    own = octet(k.i64(i), loop.i, factors, own)
            else:
                with k.for_(0, OCTETS, 1, own) as inner:
                    inner.yield_(*octet(inner.i, loop.i, factors, inner.values))
                own = inner.results
            if late:
                for c in range(1, chains):
                    own[:count] = [a + b for a, b in zip(own, own[c * count :], strict=False)][:count]
                own = [k.fma(own[i], factors[i % vectors], total) for i, total in enumerate(loop.values)]
            loop.yield_(*own)
        return loop.results
