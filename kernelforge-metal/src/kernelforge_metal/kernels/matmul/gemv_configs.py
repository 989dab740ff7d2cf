"""What a GEMV can be tuned by, and its default configs."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge.variant import ConfigSpace
from kernelforge_metal.kernels.matmul.gemv_products import ByteGemv, Bytes, FloatGemv, IntegerGemv, QuantisingGemv
from kernelforge_metal.kernels.matmul.gemv_sums import NARROWEST
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.result import stored_columns
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads, weights_of

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_metal.kernels.matmul.gemv_kernel import Gemv
    from kernelforge_metal.kernels.matmul.geometry import Product

MAX_SUMS = 32
"""Of a thread: more do not fit the registers beside the words that are under way."""
MAX_WORDS = 16
"""Of 16 bytes that a thread has under way: more leave too few registers to the other threads."""
UNROLL = (1, 2, 4)
"""Units that a thread has at once."""
SPANS = (1, 2)
"""Words that make a unit where lhs is multiplied as bytes."""
MAX_TILES = 16
"""Of a workgroup: the sums of more fill its memory."""
WORKGROUPS = (128, 256, 512, 1024)
"""That may share the columns: one to eight for each processor of a large GPU."""
AT_WORK = 1 << 17
"""Threads that a large GPU has room for at once."""
MANY_COLUMNS = 4096
"""From which on a workgroup may take more of them and a large GPU still has enough workgroups."""
ENOUGH, MANY = 128, 4096
"""Workgroups: one for each processor of a large GPU, and so many that the next ones are always at hand."""


def kernel_of(kind: type[Gemv], g: Product, config: Config, device: DeviceInfo, *, subgroups: bool) -> Gemv:
    """The text of a kernel with a config."""
    weights = weights_of(g.problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    columns, tiles, threads, unroll = (int(config[name]) for name in ("columns", "tiles", "threads", "unroll"))
    names = ("w",) if len(g.rhs) == 1 else ("gate", "up")
    span = int(config.get("span", 1))
    return kind(g, weights, names, columns, threads, unroll, tiles, subgroups, device, span)


def gemv_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`columns` of a tile, `tiles` of a workgroup, its `threads`, and how many units a thread loads before it multiplies
    (`unroll`)."""
    return _space(FloatGemv, problem, device, subgroups=True)


def gemv_shared_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """The same, without subgroups."""
    return _space(FloatGemv, problem, device, subgroups=False)


def integers_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return _space(IntegerGemv, problem, device, subgroups=True)


def integers_shared_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return _space(IntegerGemv, problem, device, subgroups=False)


def bytes_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """Besides, how many words of a quad side by side a thread takes as one unit (`span`)."""
    return _space(ByteGemv, problem, device, subgroups=True)


def bytes_shared_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return _space(ByteGemv, problem, device, subgroups=False)


def quantising_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """As of bytes."""
    return _space(QuantisingGemv, problem, device, subgroups=True)


def _space(kind: type[Gemv], problem: Problem, device: DeviceInfo, *, subgroups: bool) -> ConfigSpace:
    g = product_of(problem)
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    quads = isinstance(weights, Quads)
    least = QUAD if quads or (stored_columns(g) == 4 and problem.results[0].dtype != "f32") else 1
    columns = [c for c in (1, 2, 4, 8, 16) if least <= c <= (16 if quads else 8)]
    tiles = {-(-g.columns // (c * workgroups)) for c in columns for workgroups in WORKGROUPS}
    most = device.limit("max-compute-invocations-per-workgroup", 256)
    of_bytes = issubclass(kind, Bytes)
    spans: tuple[int, ...] = SPANS if of_bytes else (1,)
    if kind is QuantisingGemv:  # the threads of a group are in one subgroup
        spans = tuple(s for s in spans if s * weights.steps * NARROWEST >= GROUP)
    shares = {(weights.units // span, u) for span in spans for u in UNROLL} if subgroups else set()
    exact = {_warps(n, u) if of_bytes else n // u for n, u in shares}
    threads = {2**i for i in range(5, 11)} | exact
    memory = device.limit("max-compute-workgroup-storage-size", 16384)

    def kernel(config: Config) -> Gemv:
        return kernel_of(kind, g, config, device, subgroups=subgroups)

    def words(config: Config) -> int:
        each = int(config["columns"]) // (QUAD if quads else 1) * int(config.get("span", 1))
        return each * int(config["unroll"]) * len(g.rhs)

    return ConfigSpace(
        (
            ("columns", tuple(columns)),
            ("tiles", tuple(sorted({1, 2, 4, 8, 16} | {n for n in tiles if n <= MAX_TILES}))),
            ("threads", tuple(sorted(t for t in threads if t % 32 == 0 and 32 <= t <= most))),
            ("unroll", UNROLL),
            *((("span", spans),) if of_bytes else ()),
        ),
        (
            ("the sums do not fit the registers", lambda c: c["columns"] == least or kernel(c).sums.each <= MAX_SUMS),
            ("too many words are under way", lambda c: c["unroll"] == c.get("span", 1) == 1 or words(c) <= MAX_WORDS),
            ("lhs does not stay in registers for the next tile", lambda c: c["tiles"] == 1 or kernel(c).keeps_lhs),
            ("the sums do not fit workgroup memory", lambda c: kernel(c).sums.nbytes <= memory),
        ),
    )


def gemv_default(problem: Problem, device: DeviceInfo) -> Config:
    return _float_default(problem, gemv_space(problem, device))


def gemv_shared_default(problem: Problem, device: DeviceInfo) -> Config:
    return _float_default(problem, gemv_shared_space(problem, device))


def _float_default(problem: Problem, space: ConfigSpace) -> Config:
    """As many threads as leave each two words to load of every column, of quantised weights one; more columns of large weights,
    so that numbers of lhs are read less often, and beside a gain. One row of lhs stays in registers where 16 bits are multiplied
    by it; beside large weights of f32, threads share two columns. Measured on NVIDIA's H100 and H200."""
    g = product_of(problem)
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    if weights.dtype == "f32" and g.static_rows == 1 and len(g.rhs) == 1 and g.gain is None:
        wide: Config = {"columns": 2, "tiles": 1, "threads": 512, "unroll": 2}
        if g.columns >= MANY_COLUMNS and weights.units >= 1024 and wide in space:
            return wide
    if weights.dtype in ("f16", "bf16") and g.static_rows == 1:
        half = weights.units // 2
        whole = {"columns": 4 // len(g.rhs), "tiles": 1, "threads": weights.units, "unroll": 1}
        halves = {"columns": 2, "tiles": tiles_of(g.columns, 2, half), "threads": half, "unroll": 2}
        for config, least in ((whole, 128), (halves, 512)):
            if least <= int(config["threads"]) <= 512 and config in space:
                return config
    parameters = dict(space.parameters)
    columns, threads = int(parameters["columns"][0]), [int(t) for t in parameters["threads"]]
    threads = [t for t in threads if t & (t - 1) == 0 and t <= 256]
    quads = isinstance(weights, Quads)
    fitting = max((t for t in threads if t * (1 if quads else 2) <= weights.units), default=threads[0])
    if quads and g.columns >= MANY_COLUMNS and weights.units >= 2 * fitting and len(g.rhs) == 1:
        columns *= 2
    if len(g.rhs) == 1 and (g.gain is not None or (weights.dtype in ("f16", "bf16") and g.columns >= MANY_COLUMNS)):
        columns = max(columns, 2)  # the cache delivers lhs and gain for both
    most = min(max(1, weights.units // fitting), 4 if quads and columns == QUAD else 2)
    fewer = [t for t in reversed(threads) if t <= fitting]
    chosen = [
        {"columns": c, "tiles": 1, "threads": t, "unroll": u}
        for t in fewer
        for c in (columns, QUAD)
        for u in (4, 2, 1)
        if u <= most
    ]
    return next(chain((c for c in chosen if c in space), space))


def integers_default(problem: Problem, device: DeviceInfo) -> Config:
    return _integer_default(problem, integers_space(problem, device))


def integers_shared_default(problem: Problem, device: DeviceInfo) -> Config:
    return _integer_default(problem, integers_shared_space(problem, device))


def _integer_default(problem: Problem, space: ConfigSpace) -> Config:
    """As many threads as share the units evenly; more columns where they still leave a large GPU enough workgroups. A thread that
    has all its units at once takes several tiles, for which lhs is made integers once. Measured on NVIDIA's H100 and H200."""
    g = product_of(problem)
    dtype = problem.operand(g.rhs[0]).dtype
    units = Quads(dtype, g.columns, g.inner).units
    threads = [int(t) for t in dict(space.parameters)["threads"]]
    wide = [c for c, workgroups in ((16 // len(g.rhs), MANY), (8 // len(g.rhs), ENOUGH)) if c * workgroups <= g.columns]
    if g.static_rows == 1:
        shares = [(t, units // t) for t in threads if units % t == 0 and units // t <= 2]
        shares = [s for s in shares if s[0] <= (1024 if dtype == "q4" else 512)]
        few = [s for s in shares if s[0] <= 512]
        for c in wide:  # very many columns are work enough for workgroups of few threads
            many = c == 16 // len(g.rhs)
            kept = min(few, default=None) if many else max(few, default=max(shares, default=None))
            if kept is not None:
                t, u = kept
                config: Config = {"columns": c, "tiles": tiles_of(g.columns, c, t), "threads": t, "unroll": u}
                if config in space:
                    return config
    powers = [t for t in threads if t & (t - 1) == 0 and t <= 512]
    fitting = [t for t in powers if t <= units] or powers[:1]
    shared = max((t for t in fitting if units % t == 0 and 2 * t >= fitting[-1]), default=fitting[-1])
    unroll = 2 if dtype == "q8" and units >= 2 * shared else 1
    fewer = [t for t in reversed(powers) if t <= shared]
    chosen = [{"columns": c, "tiles": 1, "threads": t, "unroll": unroll} for t in fewer for c in (*wide, QUAD)]
    return next(c for c in chosen if c in space)


def bytes_default(problem: Problem, device: DeviceInfo) -> Config:
    return _byte_default(problem, bytes_space(problem, device))


def bytes_shared_default(problem: Problem, device: DeviceInfo) -> Config:
    return _byte_default(problem, bytes_shared_space(problem, device))


def _byte_default(problem: Problem, space: ConfigSpace) -> Config:
    """Four columns a workgroup, which has all their words under way at once: each thread two side by side, but for gate and up of
    q4, which are two already. Measured on an NVIDIA H200."""
    g = product_of(problem)
    weights = Quads(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    first = 1 if weights.dtype == "q4" and len(g.rhs) == 2 else 2
    shares = [(s, u, _warps(weights.units // s, u)) for s in (first, 3 - first) for u in UNROLL]
    chosen: list[Config] = [
        {"columns": QUAD, "tiles": 1, "threads": t, "unroll": u, "span": s} for s, u, t in shares if t <= 512
    ]
    return next(chain((c for c in chosen if c in space), space))


def quantising_default(problem: Problem, device: DeviceInfo) -> Config:
    """As many threads as have a unit each, and eight columns a workgroup: numbers are quantised once for all. Measured on an
    NVIDIA H200."""
    g, space = product_of(problem), quantising_space(problem, device)
    units = Quads(problem.operand(g.rhs[0]).dtype, g.columns, g.inner).units
    chosen: list[Config] = [
        {"columns": max(QUAD, 8 // len(g.rhs)), "tiles": 1, "threads": _warps(units // s, u), "unroll": u, "span": s}
        for u in UNROLL
        for s in SPANS
    ]
    return next((c for c in chosen if c in space), _byte_default(problem, space))


def _warps(units: int, each: int) -> int:
    """Threads of which each has so many units, in full subgroups of most GPUs."""
    return -(-units // (each * 32)) * 32


def tiles_of(columns: int, each: int, threads: int) -> int:
    """Tiles of `each` columns for a workgroup, so that all workgroups are at work at once on a large GPU; one where that would
    not share the columns evenly."""
    workgroups = max(w for w in WORKGROUPS if w * threads <= AT_WORK or w == WORKGROUPS[0])
    tiles = -(-columns // (each * workgroups))
    return min(tiles, MAX_TILES) if tiles >= 4 else 1
