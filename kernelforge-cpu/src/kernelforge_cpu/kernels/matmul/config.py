"""What can be chosen for `vectorized` matmul kernels, and what is chosen without a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.variant import ConfigSpace
from kernelforge_cpu.kernels.cores import rows_widened_once
from kernelforge_cpu.kernels.matmul.geometry import geometry

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.kernels.matmul.geometry import Geometry

ROWS = (4, 6, 8, 12)
BEST_ROWS = 6
"""Of a tile two vectors wide in 16 registers, or four in 32, when there are many rows."""
SINGLE_ROW_PANELS = 4
"""Of narrow panels: as many streams as two wide ones have, and as few loads of lhs."""
MIN_SUMS = 8
"""Independent sums that keep two units busy whose multiply-adds take four cycles."""
BLOCKS = (512, 1024, 2048)
UNKNOWN_L2 = 256 * 1024
F32 = 4
"""Bytes of a widened weight."""
MANY_ROWS = 64
"""From where on it pays to keep widened panels for later tiles of rows."""
MAX_WIDENED = 512 * 1024
"""Bytes of stack for panels that are kept as f32."""


def lanes(device: DeviceInfo) -> int:
    """f32 lanes of a vector."""
    return device.limit("vector_bytes", 16) // 4


def registers(device: DeviceInfo) -> int:
    """Vector registers for a tile: 32 with AVX-512 and NEON, 16 with AVX; SSE needs two of its 16 for products."""
    if lanes(device) == 16 or device.features & {"neon", "asimd"}:
        return 32
    return 16 if lanes(device) == 8 else 14


def unroll(dtype: str, device: DeviceInfo) -> int:
    """Steps between two branches, for weights of a type. Conversions of bf16, and instructions that overwrite an
    operand, leave no register for a second step."""
    return 1 if dtype == "bf16" or registers(device) < 16 else 2


def widening(dtype: str, device: DeviceInfo) -> int:
    """Registers for weights on their way to f32: where no instruction widens them from memory."""
    return 4 if dtype != "f32" and device.features & {"neon", "asimd"} else 0


def widens_once(dtype: str, rows: int | None, device: DeviceInfo) -> bool:
    """Whether weights of a type are kept as f32 for the tiles of a block of rows: where widening takes the place of
    multiply-adds (AVX-512), or there is no instruction for it (f16 with SSE)."""
    least = None
    if lanes(device) == 16:
        least = rows_widened_once(device).get(dtype)
    elif lanes(device) == 4 and dtype == "f16" and not device.features & {"neon", "asimd"}:
        least = MANY_ROWS
    return least is not None and (rows is None or rows >= least)


def narrow_panels(dtype: str, device: DeviceInfo) -> bool:
    """Whether panels are one vector wide, and a tile takes several of them in place of a wide one: the same sums from twice
    the streams, measured to come faster from memory and as fast from the cache. Panels of 16 bits are widened two vectors at
    a time, and with 32 registers a tile has two wide panels anyway."""
    return dtype == "f32" and lanes(device) == 8


def matmul_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`rows` x `panels` * `vectors` is the register tile, `vectors` the width of a packed panel, `kc` the part of the
    inner dimension done at a time, `group` the number of tiles side by side that share one pass over the rows of lhs.
    Gate and up are two panels of one tile, or with one panel two tiles after each other. Weights of 16 bits become f32 for
    each tile of rows, or once, kept for the other tiles of a block of rows.
    """
    g = geometry(problem)
    inner, columns, rows = int(g.inner), int(g.columns), static_rows(g)
    low = rows is not None and rows < ROWS[0]
    own = () if rows is None or rows > ROWS[-1] else (max(1, rows),)
    # A result that is kept in memory between two blocks must be the sum itself, in f32.
    blocked = problem.results[0].dtype == "f32" and len(g.rhs) == 1 and not low
    vectors = [v for v in (1, 2, 4) if v == 1 or (v - 1) * lanes(device) < columns]
    l2, element = device.limit("l2_bytes", UNKNOWN_L2), lanes(device) * problem.operand(1).itemsize
    free = registers(device) - widening(problem.operand(1).dtype, device) - 1

    def sums(c: Config, more_rows: int = 0) -> int:
        return (int(c["rows"]) + more_rows) * int(c["panels"]) * int(c["vectors"])

    def group_bytes(c: Config) -> int:
        return int(c["group"]) * int(c["kc"]) * max(int(c["panels"]), len(g.rhs)) * int(c["vectors"]) * element

    def widened(c: Config) -> int:
        return 0 if c["widen"] == "tile" else group_bytes(c) * F32 // problem.operand(1).itemsize

    return ConfigSpace(
        (
            ("rows", own if low else tuple(sorted({*ROWS, *own}))),
            ("panels", (1, 2, SINGLE_ROW_PANELS) if low and len(g.rhs) == 1 else (1, 2)),
            ("vectors", tuple(vectors)),
            ("kc", (*(b for b in BLOCKS if blocked and b < inner), max(1, inner))),
            ("group", (1,) if low else (1, 2, 4)),
            ("widen", ("tile",) if low or problem.operand(1).itemsize == F32 else ("tile", "once")),
        ),
        (
            ("the tile needs more registers than there are", lambda c: sums(c, 1) <= free),
            ("the tile has too few sums to hide their latency", lambda c: low or sums(c) >= MIN_SUMS),
            ("the panels of a group of tiles do not fit L2", lambda c: int(c["group"]) == 1 or group_bytes(c) <= l2),
            ("the widened panels of a group of tiles are too many to keep", lambda c: widened(c) <= MAX_WIDENED),
        ),
    )


def matmul_default(problem: Problem, device: DeviceInfo) -> Config:
    """The tile with the fewest loads per multiply-add that the registers hold; blocks for which the panels of a tile
    fill at most half of L2, while lhs is read through them row by row.

    The panel width depends on the device, the type and number of columns alone: problems that differ in rows share a packed
    weight.
    """
    g = geometry(problem)
    space = matmul_space(problem, device)
    parameters = {name: [int(v) for v in values] for name, values in space.parameters if name != "widen"}
    narrow = narrow_panels(problem.operand(1).dtype, device)
    vectors = 1 if narrow else min(2, parameters["vectors"][-1])
    width = vectors * lanes(device)
    widest = 2 if len(g.rhs) == 2 or int(g.columns) > width else 1
    panels = widest if registers(device) == 32 or narrow else 1

    def config(rows: int, panels: int, kc: int, group: int = 1, widen: str = "tile") -> Config:
        return {"rows": rows, "panels": panels, "vectors": vectors, "kc": kc, "group": group, "widen": widen}

    rows = static_rows(g)
    if rows is not None and rows <= ROWS[-1]:  # one tile, if it can be: the panels are read once
        counts = (widest, 1) if not narrow else (SINGLE_ROW_PANELS, 2) if int(g.columns) > 2 * width else (widest,)
        for count in counts:
            if (once := config(max(1, rows), count, parameters["kc"][-1])) in space:
                return once
    half = device.limit("l2_bytes", UNKNOWN_L2) // 2
    for widen in ("once", "tile") if widens_once(problem.operand(1).dtype, rows, device) else ("tile",):
        held = half if widen == "tile" else min(half, MAX_WIDENED)
        step_bytes = max(panels, len(g.rhs)) * width * (problem.operand(1).itemsize if widen == "tile" else F32)
        kc = max([b for b in parameters["kc"] if b * step_bytes <= held], default=parameters["kc"][0])
        group = max(n for n in parameters["group"] if n == 1 or n * kc * step_bytes <= held)
        legal = [r for r in parameters["rows"] if config(r, panels, kc, group, widen) in space]
        if legal:
            break
    high = [r for r in legal if r <= BEST_ROWS] or legal[:1]
    # The fewest passes over the panels, then the most even ones: 8 rows are 4 and 4.
    best = min(high, key=lambda r: (-(-(rows or 0) // r), r if rows else -r))
    return config(best, panels, kc, group, widen)


def static_rows(g: Geometry) -> int | None:
    """Rows of a batch, if their number is known."""
    return None if g.rows.extent.names else g.rows.extent.number
