"""Integer products: activations in 8 bits (`q8a`) times weights in 8 or 4 bits.

The products of a group are summed exactly, in integers; the sum of a group is scaled by both scales and added up in f32.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT, GROUP, WEIGHT_FORMATS
from kernelforge.variant import ConfigSpace, Reject
from kernelforge_cpu.emit import I64, PTR, Pointer
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_offsets
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.cores import LINE, in_flight, reads_far
from kernelforge_cpu.kernels.matmul.config import UNKNOWN_L2, lanes, registers, static_rows
from kernelforge_cpu.kernels.matmul.dot import Dot, NeonDot, PairDot, VnniDot
from kernelforge_cpu.kernels.matmul.geometry import LHS, OUT, RESIDUAL, geometry
from kernelforge_cpu.kernels.matmul.product import Operands, Product
from kernelforge_cpu.kernels.matmul.tile import Tile
from kernelforge_cpu.kernels.matmul.vectorized import FLOATS, PARTS_PER_THREAD, shared_parts, takes_rows
from kernelforge_cpu.kernels.matmul.words import WORD, Words
from kernelforge_cpu.kernels.quantize import GROUP_BYTES, VALUES, ZEROS
from kernelforge_cpu.ssa import BITS, vec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Builder, Value
    from kernelforge_cpu.kernels.axes import Size

ROWS = (3, 4, 5, 6)
TALL = 8
"""Rows of a tall tile, with AVX2: see `kernelforge_cpu.kernels.matmul.tall`."""
TALL_GROUP = 16
"""Panels side by side of tall tiles."""
LEAST_ROWS = 48
"""Of tall tiles: below, spreading weights out costs more than it saves."""
BEST_ROWS = {"q4": 3, "q8": 4}
"""As many as 16 registers hold beside the weights: from there on LLVM's spills cost more than the loads that they save."""
AHEAD = (1024, 2048, 4096, 8192, 16384)
"""Bytes of weights from memory that may be asked for ahead of use, over all streams together."""
SINGLE_ROW_PARTS = 2
"""Per thread: memory is read fastest in long stretches."""
STREAMS = (1, 2, 4)
"""Panels that a single row may multiply side by side: where little can be asked for ahead, one stream of reads does not fill
the memory's queues."""


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
    """`rows` of lhs are multiplied by `group` panels side by side before the next rows; weights that are read once are
    asked for `ahead` bytes before, those of a single row in so many `streams`."""
    rows = static_rows(geometry(problem))
    low = rows is not None and rows < ROWS[0]
    own = () if rows is None or rows > ROWS[-1] else (max(1, rows),)
    return ConfigSpace(
        (
            ("rows", own if low else tuple(sorted({*ROWS, *own}))),
            ("group", (16, 64, 256) if low else (4, 16, 32)),
            ("ahead", AHEAD),
            ("streams", (1,) if rows is not None and rows > 1 else STREAMS),
        )
    )


def pairs_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """With AVX2 also tall tiles."""
    space, rows = integer_space(problem, device), static_rows(geometry(problem))
    if lanes(device) != 8 or (rows is not None and rows < LEAST_ROWS):
        return space
    parameters = dict(space.parameters)
    parameters |= {"rows": (*parameters["rows"], TALL), "group": (4, 8, 16, 32)}
    return ConfigSpace(tuple(parameters.items()))


def integer_default(problem: Problem, device: DeviceInfo) -> Config:
    """Few rows: one pass over the weights, panel by panel as they lie in memory. Many: panels that fill half of L2."""
    g = geometry(problem)
    parameters = dict(integer_space(problem, device).parameters)
    groups = [int(v) for v in parameters["group"]]
    streams = int(parameters["streams"][0 if reads_far(device) else -1])
    rest = {"ahead": in_flight(device), "streams": streams}
    rows = static_rows(g)
    if rows is not None and rows <= ROWS[-1]:
        return {"rows": max(1, rows), "group": groups[-1], **rest}
    panel = len(g.rhs) * problem.operand(1).bytes_of(int(g.inner) * lanes(device))
    half = device.limit("l2_bytes", UNKNOWN_L2) // 2
    group = max(n for n in groups if n == groups[0] or n * panel <= half)
    height = ROWS[-1] if registers(device) == 32 else BEST_ROWS[problem.operand(1).dtype]
    return {"rows": height, "group": group, **rest}


def pairs_default(problem: Problem, device: DeviceInfo) -> Config:
    space, config = pairs_space(problem, device), integer_default(problem, device)
    tall = {**config, "rows": TALL, "group": TALL_GROUP // len(geometry(problem).rhs)}
    return tall if tall in space else config


def build_pairs(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    if int(config["rows"]) == TALL:
        return _build_tall(problem, config, device)
    return _build(PairDot, problem, config, device)


def build_vnni(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _build(VnniDot, problem, config, device)


def build_dotprod(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return _build(NeonDot, problem, config, device)


def _build(dot: type[Dot], problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    g = geometry(problem)
    rows, group, ahead, streams = (int(config[name]) for name in ("rows", "group", "ahead", "streams"))
    dtype = problem.operand(g.rhs[0]).dtype
    tile = Tile(rows, len(g.rhs), 1, k.lanes, 1, registers(device), ahead)
    layout = Words(dtype, k.lanes, int(g.columns), int(g.inner))

    def text() -> str:
        rhs = [k.buffer(i, "i8") for i in g.rhs]
        IntegerProduct(k, problem, g, tile, int(g.inner), group, rhs, layout, dot(dtype, k.lanes), streams).emit()
        return k.text()

    return NativeKernel(
        (Phase(k.name, shared_parts(problem, g, tile, SINGLE_ROW_PARTS)),), text, dict.fromkeys(g.rhs, layout.pack)
    )


def _build_tall(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    from kernelforge_cpu.kernels.matmul.tall import TallProduct

    k = new_kernel(problem, config, device)
    g = geometry(problem)
    group, ahead, streams = (int(config[name]) for name in ("group", "ahead", "streams"))
    dtype = problem.operand(g.rhs[0]).dtype
    # Fewer rows are done as without it.
    tile = Tile(BEST_ROWS[dtype], len(g.rhs), 1, k.lanes, 1, registers(device), ahead)
    layout = Words(dtype, k.lanes, int(g.columns), int(g.inner))
    rhs = [k.buffer(i, "i8") for i in g.rhs]
    scratch = k.buffer(g.out + 1, "i8")
    product = TallProduct(
        k, problem, g, tile, int(g.inner), group, rhs, layout, PairDot(dtype, k.lanes), streams, scratch
    )
    # More parts are blocks of fewer rows, for each of which the weights are spread out again.
    parts = shared_parts(problem, g, tile, SINGLE_ROW_PARTS, most_parts=PARTS_PER_THREAD)

    def text() -> str:
        product.emit()
        return k.text()

    def scratch_bytes(dims: Sequence[int], threads: int) -> int:
        return PARTS_PER_THREAD * threads * product.part_bytes

    return NativeKernel((Phase(k.name, parts),), text, dict.fromkeys(g.rhs, layout.pack), scratch=scratch_bytes)


@dataclass(frozen=True)
class IntegerProduct(Product):
    """The loops of `Product` around tiles of integer products: a tile of rows times a panel, panel after panel of a group,
    before the next rows."""

    layout: Words
    dot: Dot
    streams: int

    @property
    def steps(self) -> int:
        """The result is written once."""
        return 1

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

    def emit_block(self, at: Operands, row0: Value, row1: Value, first: Value, last: Value) -> None:
        k, tile, low = self.k, self.tile, self.tile.low
        memory = k.alloca("f32", tile.rows * tile.panels * tile.width * self.group)
        full = (row1 - row0) // tile.rows
        rest = row1 - row0 - full * tile.rows
        rows = static_rows(self.g)
        heights = tile.heights(rows)
        with k.for_(first, last, self.group) as side, k.for_(0, full + (rest + (low - 1)) // low) as down:
            whole = down.i.lt(full)
            row = row0 + k.select(whole, down.i * tile.rows, full * tile.rows + (down.i - full) * low)
            count = k.select(whole, k.i64(tile.rows), k.min(low, row1 - row))
            end = k.min(side.i + self.group, last)
            for height in heights:
                with k.if_(count.eq(height)) if len(heights) > 1 else nullcontext():
                    streamed = height < tile.rows or height == rows
                    lhs = at.lhs.at(row * self.row_bytes)
                    panels = [rhs.at(side.i * self.layout.panel_bytes) for rhs in at.rhs]
                    # Gate and up of many rows one after the other, each with all registers.
                    for own in [panels] if rows == 1 else [[p] for p in panels]:
                        sums = memory.at(panels.index(own[0]) * tile.width)
                        self.emit_panels(height, lhs, own, end - side.i, sums, streamed=streamed)
            with k.for_(side.i, end) as across:
                sums = memory.at((across.i - side.i) * (count * (tile.panels * tile.width)))
                self.emit_epilogue(at, row, count, across.i, end, k.i64(0), sums)

    def emit_panels(
        self, rows: int, lhs: Pointer, panels: Sequence[Pointer], count: Value, out: Pointer, *, streamed: bool
    ) -> None:
        """out[panel][row][rhs][:] of `rows` rows and `count` panels, f32; `out` begins at the first right-hand side's."""
        k, step, nbytes = self.k, self.tile.panels * self.tile.width, self.layout.panel_bytes
        streams = max(1, self.streams // len(panels)) if rows == 1 and streamed else 1

        def write(b: Builder, left: Value, sums: Value, n: Value, *weights: Value) -> list[Value]:
            x, found = Pointer(b, left.name, "i8"), Pointer(b, sums.name, "f32")
            starts = [Pointer(b, w.name, "i8") for w in weights]
            each = n if streams == 1 else n // streams

            def several(numbers: Sequence[Value]) -> None:
                own = [p.at(i * nbytes) for i in numbers for p in starts]
                totals = iter(self.sums(b, rows, x, own, streamed))
                for i in numbers:
                    for number in range(len(starts)):
                        for r in range(rows):
                            found.at(i * (rows * step)).store(next(totals), r * step + number * self.tile.width)

            with b.for_(0, each) as loop:
                several([loop.i + each * s if s else loop.i for s in range(streams)])
            if streams > 1:
                with b.for_(each * streams, n) as loop:
                    several([loop.i])
            return []

        name, params = f"{k.name}_rows{rows}", (PTR, PTR, I64, *(PTR for _ in panels))
        k.call(k.function(name, params, write, inline=False), lhs, out, count, *panels)

    def sums(self, k: Builder, rows: int, lhs: Pointer, panels: Sequence[Pointer], streamed: bool) -> list[Value]:
        """Of each panel and each row."""
        layout, dot, width = self.layout, self.dot, self.tile.lanes
        vector, share = WORD * width, -(-layout.panel_bytes // max(1, layout.groups))
        with k.for_(0, layout.groups, 1, [k.f32(0.0, width)] * (len(panels) * rows)) as loop:
            left = [lhs.at(loop.i * GROUP_BYTES).at(r * self.row_bytes) for r in range(rows)]
            values = [p.at(loop.i * layout.group_bytes).at(layout.scale_bytes) for p in panels]
            if streamed:
                # Evenly, over scales and values alike, so that each line of what follows in memory is asked for once.
                for p, line in product(panels, range(0, share, LINE)):
                    p.at(loop.i * share).prefetch(self.tile.ahead // len(panels) + line)
            zeros = [_repeated(k, x.at(ZEROS), width, "i16") for x in left]
            own = [[dot.start(k, z) for z in zeros] for _ in panels]
            for word in range(layout.words):
                weights = [dot.weights(k, v.load(word * vector, vector)) for v in values]
                for half, of_panels in enumerate(zip(*weights, strict=True)):
                    at = VALUES + WORD * word + GROUP // 2 * half
                    for r, x in enumerate(left):
                        repeated = _repeated(k, x.at(at), width, "i8")
                        for found, w in zip(own, of_panels, strict=True):
                            found[r] = dot.step(k, found[r], w, repeated)
            done: list[Value] = []
            totals = iter(loop.values)
            for p, of_rows in zip(panels, own, strict=True):
                scale = p.of("f16").at(loop.i * width).load_f32(0, width)
                for x, one, zero in zip(left, of_rows, zeros, strict=True):
                    assert one is not None
                    whole = k.convert(dot.finish(k, one, zero), "f32")
                    factor = scale * k.broadcast(x.of("f32").load(), width)
                    done.append(k.fma(whole, factor, next(totals)))
            loop.yield_(*done)
        return loop.results


def _repeated(k: Builder, at: Pointer, lanes: int, element: str) -> Value:
    """The 32 bits there, in every one of `lanes` lanes, as elements of a type."""
    word = k.broadcast(at.of("i32").load(), lanes)
    return k.bitcast(word, vec(lanes * 32 // BITS[element], element))
