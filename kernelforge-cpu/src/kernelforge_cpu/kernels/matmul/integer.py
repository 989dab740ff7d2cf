"""Integer products: activations in 8 bits (`q8a`) times weights in 8 or 4 bits.

The products of a group are summed exactly, in integers; the sum of a group is scaled by both scales and added up in f32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT, GROUP, WEIGHT_FORMATS
from kernelforge.variant import ConfigSpace, Reject
from kernelforge_cpu.emit import PTR, Pointer
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_offsets
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.matmul.config import UNKNOWN_L2, lanes, registers, static_rows
from kernelforge_cpu.kernels.matmul.dot import Dot, NeonDot, PairDot, VnniDot
from kernelforge_cpu.kernels.matmul.geometry import LHS, OUT, RESIDUAL, geometry
from kernelforge_cpu.kernels.matmul.product import Operands, Product
from kernelforge_cpu.kernels.matmul.tile import LINE, Tile
from kernelforge_cpu.kernels.matmul.vectorized import FLOATS, shared_parts, takes_rows
from kernelforge_cpu.kernels.matmul.words import WORD, Words
from kernelforge_cpu.kernels.quantize import GROUP_BYTES, VALUES, ZEROS
from kernelforge_cpu.ssa import BITS, vec

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Builder, Value
    from kernelforge_cpu.kernels.axes import Size

ROWS = (1, 2, 3, 4, 5, 6, 8)
AHEAD = (512, 1024, 2048)
"""Bytes by which weights that come from memory may be prefetched."""


def takes_integer(problem: Problem, device: DeviceInfo) -> Verdict:
    """What all of these variants take."""
    g = geometry(problem)
    for i, t in enumerate((*problem.operands, *problem.results)):
        if t is None:
            continue
        if i == 0:
            if t.dtype != ACTIVATION_FORMAT:
                return Reject(f"takes activations in 8 bits ({ACTIVATION_FORMAT}), not {t.dtype}")
        elif i in g.rhs:
            if t.dtype not in WEIGHT_FORMATS or not t.constant or t.rank > 2:
                return Reject(f"takes constant quantised weights of rank 2, not {t}")
        elif t.dtype not in FLOATS:
            return Reject(f"takes {', '.join(FLOATS)}, not {t.dtype}")
    return takes_rows(problem, g)


def takes_pairs(problem: Problem, device: DeviceInfo) -> Verdict:
    needed = {4: "ssse3", 8: "avx2", 16: "avx512bw"}[lanes(device)]
    if needed not in device.features:
        return Reject(f"needs {needed}, which this CPU does not have")
    return takes_integer(problem, device)


def takes_vnni(problem: Problem, device: DeviceInfo) -> Verdict:
    if not device.features & {"avx512_vnni", "avx_vnni"}:
        return Reject("needs AVX-512 VNNI or AVX-VNNI, which this CPU does not have")
    return takes_integer(problem, device)


def takes_dotprod(problem: Problem, device: DeviceInfo) -> Verdict:
    if "asimddp" not in device.features:
        return Reject("needs the dot product instructions of Armv8.2, which this CPU does not have")
    return takes_integer(problem, device)


def integer_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`rows` x `panels` is the register tile, `group` the number of tiles side by side that share one pass over the rows
    of lhs, `ahead` how far weights are prefetched where they are read once."""
    g = geometry(problem)
    rows = static_rows(g)
    most = ROWS[-1]
    low = rows is not None and rows <= most
    panels = (2, 4) if len(g.rhs) == 2 else (1, 2, 4)

    def sums(c: Config) -> int:
        return int(c["rows"]) * int(c["panels"])

    return ConfigSpace(
        (
            ("rows", tuple(r for r in ROWS if not low or r <= max(1, rows or 1))),
            ("panels", panels),
            ("group", (1,) if low else (1, 2, 4, 8)),
            ("ahead", AHEAD),
        ),
        (("the tile needs more registers than there are", lambda c: sums(c) <= registers(device)),),
    )


def integer_default(problem: Problem, device: DeviceInfo) -> Config:
    """One pass over the weights for few rows, panel by panel as they lie in memory."""
    g = geometry(problem)
    space = integer_space(problem, device)
    parameters = {name: [int(v) for v in values] for name, values in space.parameters}
    rows = static_rows(g)
    panels = parameters["panels"][0]
    height = 4 if rows is None or rows > ROWS[-1] else max(1, rows)
    half = device.limit("l2_bytes", UNKNOWN_L2) // 2
    tile = problem.operand(1).bytes_of(int(g.inner) * lanes(device) * panels)
    group = max(n for n in parameters["group"] if n == 1 or n * tile <= half)
    return {"rows": min(height, parameters["rows"][-1]), "panels": panels, "group": group, "ahead": 1024}


def build_pairs(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _build(PairDot, problem, config, device)


def build_vnni(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _build(VnniDot, problem, config, device)


def build_dotprod(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _build(NeonDot, problem, config, device)


def _build(dot: type[Dot], problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    g = geometry(problem)
    rows, panels, group, ahead = (int(config[name]) for name in ("rows", "panels", "group", "ahead"))
    dtype = problem.operand(g.rhs[0]).dtype
    tile = Tile(rows, panels, 1, k.lanes, 1, registers(device))
    layout = Words(dtype, k.lanes, int(g.columns), int(g.inner))
    rhs = [k.buffer(i, "i8") for i in g.rhs]
    IntegerProduct(k, problem, g, tile, max(1, int(g.inner)), group, rhs, layout, dot(dtype, k.lanes), ahead).emit()
    return NativeKernel((Phase(k.name, shared_parts(problem, g, tile)),), k.text(), dict.fromkeys(g.rhs, layout.pack))


@dataclass(frozen=True)
class IntegerProduct(Product):
    """The loops of `Product` around tiles of integer products."""

    layout: Words
    dot: Dot
    ahead: int

    def operands(self, batch: Value) -> Operands:
        k, g = self.k, self.g
        offsets = emit_offsets(k, self.problem, g.batches, batch, len(g.rows.strides))
        residual = None
        if g.residual is not None:
            residual = k.buffer(g.residual, self.problem.operand(g.residual).dtype).at(offsets[RESIDUAL])
        lhs = k.buffer(0, "i8").at(offsets[LHS] // GROUP * GROUP_BYTES)
        return Operands(lhs, tuple(self.rhs), k.buffer(g.out, self.problem.results[0].dtype).at(offsets[OUT]), residual)

    @property
    def row_bytes(self) -> int:
        """From row to row of lhs: activations lie row by row without gaps."""
        stride: Size = self.g.rows.strides[LHS]
        assert not stride.names
        return stride.number // GROUP * GROUP_BYTES

    def emit_tile(
        self, at: Operands, row: Value, count: Value, panel: Value, end: Value, step: Value, sums: Pointer
    ) -> None:
        k, tile = self.k, self.tile
        lhs = at.lhs.at(row * self.row_bytes)
        numbers = [panel, *(k.min(panel + i, end - 1) for i in range(1, self.advance))]
        panels = [p.at(i * self.layout.panel_bytes) for p in at.rhs for i in numbers]
        rows = static_rows(self.g)
        heights = tile.heights(rows)
        for height in heights:
            with k.if_(count.eq(height)) if len(heights) > 1 else nullcontext():
                self.emit_sums(height, lhs, panels, sums, streamed=height < tile.rows or height == rows)

    def emit_sums(self, rows: int, lhs: Pointer, panels: Sequence[Pointer], out: Pointer, *, streamed: bool) -> None:
        """As `tile.emit_products`."""
        k = self.k

        def write(b: Builder, left: Value, sums: Value, *rest: Value) -> list[Value]:
            x, own = Pointer(b, left.name, "i8"), [Pointer(b, p.name, "i8") for p in rest]
            for i, found in enumerate(self.sums(b, rows, x, own, streamed)):
                Pointer(b, sums.name, "f32").store(found, i * self.tile.lanes)
            return []

        types = [PTR] * (2 + len(panels))
        k.call(k.function(f"{k.name}_rows{rows}", types, write, inline=False), lhs, out, *panels)

    def sums(self, k: Builder, rows: int, lhs: Pointer, panels: Sequence[Pointer], streamed: bool) -> list[Value]:
        """Row by row, the vectors of sums of all panels."""
        layout, dot, width = self.layout, self.dot, self.tile.lanes
        count = rows * len(panels)
        with k.for_(0, layout.groups, 1, [k.f32(0.0, width)] * count) as loop:
            left = lhs.at(loop.i * GROUP_BYTES)
            lefts = [left.at(r * self.row_bytes) for r in range(rows)]
            values = [p.at(loop.i * layout.group_bytes).at(layout.scale_bytes) for p in panels]
            if streamed:
                for start in values:
                    for line in range(0, layout.group_bytes, LINE):
                        start.prefetch(self.ahead + line)
            zeros = [_repeated(k, x.at(ZEROS), width, "i16") for x in lefts]
            own = [dot.start(k, z) for z in zeros for _ in panels]
            for word in range(layout.words):
                factors = [dot.weights(k, start.load(word * width * WORD, WORD * width)) for start in values]
                for r, x in enumerate(lefts):
                    for half in range(len(factors[0])):
                        four = _repeated(k, x.at(VALUES + WORD * word + GROUP // 2 * half), width, "i8")
                        for i, weights in enumerate(factors, r * len(panels)):
                            own[i] = dot.step(k, own[i], weights[half], four)
            scales = [p.of("f16").at(loop.i * width).load_f32(0, width) for p in panels]
            done: list[Value] = []
            for r, x in enumerate(lefts):
                scale = k.broadcast(x.of("f32").load(), width)
                for own_scale in scales:
                    found = own[len(done)]
                    assert found is not None
                    whole = k.convert(dot.finish(k, found, zeros[r]), "f32")
                    done.append(k.fma(whole, own_scale * scale, loop.values[len(done)]))
            loop.yield_(*done)
        return loop.results


def _repeated(k: Builder, at: Pointer, lanes: int, element: str) -> Value:
    """The 32 bits there, in every one of `lanes` lanes, as elements of a type."""
    word = k.broadcast(at.of("i32").load(), lanes)
    return k.bitcast(word, vec(lanes * 32 // BITS[element], element))
