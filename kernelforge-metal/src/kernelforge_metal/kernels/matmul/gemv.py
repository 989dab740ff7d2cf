"""A few rows times a packed weight: which problems, and with what configs. `gemv_kernel` has the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal.kernel import GpuKernel
from kernelforge_metal.kernels.matmul.common import takes_products
from kernelforge_metal.kernels.matmul.gemv_kernel import Gemv, parts_of
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.result import stored_columns
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads, pieces, weights_of
from kernelforge_metal.wgsl import SUBGROUP

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

MAX_ROWS = 8
"""With more, tiles in workgroup memory are faster."""
MAX_SUMS = 32
"""Of a thread: more do not fit the registers beside the words that are under way."""
MANY_COLUMNS = 4096
"""From which on a workgroup may take more of them and a large GPU still has enough workgroups."""


def takes_gemv(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    verdict = takes_products(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    g = product_of(problem)
    if not all(problem.operand(i).constant for i in g.rhs):
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


def memory_constraint(problem: Problem, device: DeviceInfo, *, subgroups: bool) -> tuple[str, Callable[[Config], bool]]:
    """What the kernel adds up across a workgroup must fit the memory that the device gives one."""
    g = product_of(problem)
    most = device.limit("max-compute-workgroup-storage-size", 16384)

    def fits(config: Config) -> bool:
        rows = g.static_rows or 0
        sums = len(g.rhs) * rows * int(config["columns"]) + (0 if g.gain is None else rows)
        return 4 * sums * parts_of(int(config["threads"]), subgroups=subgroups) <= most

    return "the sums do not fit workgroup memory", fits


def gemv_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`columns` of a workgroup, its `threads`, and how many units a thread loads before it multiplies (`unroll`)."""
    return _space(problem, device, subgroups=True)


def gemv_shared_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """The same, without subgroups."""
    return _space(problem, device, subgroups=False)


def _space(problem: Problem, device: DeviceInfo, *, subgroups: bool) -> ConfigSpace:
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
            memory_constraint(problem, device, subgroups=subgroups),
        ),
    )


def gemv_default(problem: Problem, device: DeviceInfo) -> Config:
    return _default(problem, gemv_space(problem, device))


def gemv_shared_default(problem: Problem, device: DeviceInfo) -> Config:
    return _default(problem, gemv_shared_space(problem, device))


def _default(problem: Problem, space: ConfigSpace) -> Config:
    """As many threads as leave each two words to load of every column, of quantised weights one; more columns of large
    quantised weights, so that numbers of lhs are read less often, and two of others beside a gain."""
    g = product_of(problem)
    parameters = dict(space.parameters)
    columns, threads = int(parameters["columns"][0]), [int(t) for t in parameters["threads"]]
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    quads = isinstance(weights, Quads)
    fitting = max((t for t in threads if t * (1 if quads else 2) <= weights.units), default=threads[0])
    if quads and g.columns >= MANY_COLUMNS and weights.units >= 2 * fitting and len(g.rhs) == 1:
        columns *= 2
    if g.gain is not None and len(g.rhs) == 1:
        columns = max(columns, 2)  # the cache delivers lhs and gain for both
    most = min(max(1, weights.units // fitting), 4 if quads and columns == QUAD else 2)
    fewer = [t for t in reversed(threads) if t <= fitting]
    chosen = [
        {"columns": c, "threads": t, "unroll": u}
        for t in fewer
        for c in (columns, QUAD)
        for u in (4, 2, 1)
        if u <= most
    ]
    return next((c for c in chosen if c in space), next(iter(space)))


def build_gemv(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return build(Gemv, problem, config, device, subgroups=False)


def build_gemv_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return build(Gemv, problem, config, device, subgroups=True)


def build(kind: type[Gemv], problem: Problem, config: Config, device: DeviceInfo, *, subgroups: bool) -> GpuKernel:
    g = product_of(problem)
    weights = weights_of(problem.operand(g.rhs[0]).dtype, g.columns, g.inner)
    columns, threads, unroll = (int(config[name]) for name in ("columns", "threads", "unroll"))
    names = ("w",) if len(g.rhs) == 1 else ("gate", "up")
    kernel = kind(g, weights, names, columns, threads, unroll, subgroups, device)
    pack = weights.packs(transposed=g.transpose_rhs)
    dispatches = tuple(kernel.dispatch(piece) for piece in pieces(weights, device))
    return GpuKernel(dispatches, {} if pack is None else dict.fromkeys(g.rhs, pack))
