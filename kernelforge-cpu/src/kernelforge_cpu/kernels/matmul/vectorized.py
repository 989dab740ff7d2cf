"""`vectorized`: matmul and glu_matmul with packed right-hand sides and register tiles, emitted as MLIR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import ONE, Size, size_of
from kernelforge_cpu.kernels.cores import in_flight, reads_far
from kernelforge_cpu.kernels.matmul.config import registers, unroll
from kernelforge_cpu.kernels.matmul.geometry import geometry, tensors
from kernelforge_cpu.kernels.matmul.panels import Panels, emit_pack
from kernelforge_cpu.kernels.matmul.tile import Tile

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.kernel import Count
    from kernelforge_cpu.kernels.matmul.geometry import Geometry

FLOATS = ("f32", "bf16", "f16")

PART_FLOPS = 400_000
"""Work of about 4 us, under which a part costs more than it saves."""
PART_BYTES = 48 * 1024
"""The same for work that waits for memory."""
PARTS_PER_THREAD = 4
"""Parts are claimed as threads get free: a few each even out what they do not do at equal speed."""
MOST_PARTS_PER_THREAD = 2 * PARTS_PER_THREAD
"""Where parts would not be even: the smaller they are, the shorter is the wait for the last one."""
UNITS_PER_PART = 4
"""Blocks of rows are made small enough for this many units of work in a part, so that parts are about equal."""


def takes_matmul(problem: Problem, device: DeviceInfo) -> Verdict:
    g = geometry(problem)
    for t in tensors(problem):
        if t.dtype not in FLOATS:
            return Reject(f"takes {', '.join(FLOATS)}, not {t.dtype}")
    return takes_rows(problem, g)


def takes_rows(problem: Problem, g: Geometry) -> Verdict:
    """Whether sizes are known and rows contiguous where the kernels want it."""
    for name, size in (("inner dimension", g.inner), ("number of columns", g.columns)):
        if isinstance(size, str):
            return Reject(f"takes a static {name}, not {size}")
    by_rows = [problem.results[0], *(problem.operand(i) for i in (g.bias, g.residual) if i is not None)]
    for t in by_rows:
        if t.strides is not None and t.strides[-1] != 1 and t.shape[-1] != 1:
            return Reject(f"takes a bias, residual and result whose last axis has stride 1, not {t}")
    return Accept()


def build_matmul(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """One phase; before it one that packs the right-hand sides that are no constants."""
    from kernelforge_cpu.emit import KernelBuilder, module_text
    from kernelforge_cpu.kernels.common import new_kernel
    from kernelforge_cpu.kernels.matmul.product import Product

    k = new_kernel(problem, config, device)
    g = geometry(problem)
    rows, panels, vectors, kc, group = (int(config[name]) for name in ("rows", "panels", "vectors", "kc", "group"))
    once = config["widen"] == "once"
    dtype = problem.operand(g.rhs[0]).dtype
    tile = Tile(
        rows, panels, vectors, k.lanes, unroll(dtype, device), registers(device), in_flight(device), reads_far(device)
    )
    multiply = Phase(k.name, shared_parts(problem, g, tile, across=max(1, panels // len(g.rhs))))
    constant = [i for i in g.rhs if problem.operand(i).constant]
    layout = Panels(vectors, k.lanes, dtype)
    packs = {i: layout.pack(g.transpose_rhs) for i in constant}
    if len(constant) == len(g.rhs):

        def text() -> str:
            Product(k, problem, g, tile, kc, group, [k.buffer(i, dtype) for i in g.rhs], widen_once=once).emit()
            return k.text()

        return NativeKernel((multiply,), text, packs)

    pack = KernelBuilder(f"{k.name}_pack", k.target)
    size = _packed_bytes(problem, g, tile)
    # Two of them (gate and up) have no batches: the size of the first is a number.
    at = {i: size.number * n for n, i in enumerate(i for i in g.rhs if i not in constant)}
    scratch = g.out + 1
    for i, start in at.items():
        emit_pack(pack, problem, i, g.transpose_rhs, layout, pack.buffer(scratch, "i8").at(start).of(dtype))
    rhs = [k.buffer(scratch, "i8").at(at[i]).of(dtype) if i in at else k.buffer(i, dtype) for i in g.rhs]
    Product(k, problem, g, tile, kc, group, rhs, widen_once=once).emit()

    def scratch_bytes(dims: Sequence[int], threads: int) -> int:
        return len(at) * size.evaluate(dict(zip(problem.dims, dims, strict=True)))

    def pack_parts(dims: Sequence[int], threads: int) -> int:
        return max(1, min(threads, scratch_bytes(dims, threads) // PART_BYTES))

    return NativeKernel((Phase(pack.name, pack_parts), multiply), module_text(pack, k), packs, scratch=scratch_bytes)


def _packed_bytes(problem: Problem, g: Geometry, tile: Tile) -> Size:
    """Of one right-hand operand, in whole cache lines."""
    rhs = problem.operand(g.rhs[0])
    panels = -(-int(g.columns) // tile.width)
    matrix = panels * tile.width * int(g.inner) * rhs.itemsize
    return Size(-(-matrix // 64) * 64).times(size_of(*rhs.shape[:-2]))


def shared_parts(
    problem: Problem,
    g: Geometry,
    tile: Tile,
    single_row_parts: int = PARTS_PER_THREAD,
    *,
    across: int = 1,
    most_parts: int = MOST_PARTS_PER_THREAD,
) -> Count:
    """`single_row_parts` a thread where there is one row, `most_parts` where parts would not be even. Panels of a single tile
    of rows are done `across` at a time."""
    inner, columns = int(g.inner), int(g.columns)
    flops, matrix = 2 * len(g.rhs) * inner * columns, problem.operand(g.rhs[0]).bytes_of(inner * columns)
    panels = -(-columns // tile.width)
    batches = ONE
    for axis in g.batches:
        batches = batches.times(axis.extent)

    def parts(dims: Sequence[int], threads: int) -> int:
        sizes = dict(zip(problem.dims, dims, strict=True))
        rows, products = g.rows.extent.evaluate(sizes), batches.evaluate(sizes)
        work = products * max(flops * rows // PART_FLOPS, len(g.rhs) * matrix // PART_BYTES)
        units = products * panels * -(-rows // tile.rows)
        most = (single_row_parts if rows == 1 else PARTS_PER_THREAD) * threads
        strips = max(1, -(-panels // across))
        if rows > tile.rows and strips * -(-most * UNITS_PER_PART // strips) % most:
            most = most_parts * threads
        wanted = max(1, min(work, units, most))
        if wanted < threads:
            return wanted
        wanted -= wanted % threads
        if across == 1 or products > 1 or rows > tile.rows:
            return wanted
        # A part that ends within a tile does as much as one that ends with it.
        tiles = {n: n // threads * -(-panels // (n * across)) for n in range(threads, wanted + 1, threads)}
        return min(tiles, key=lambda n: (tiles[n], -n))

    return parts
