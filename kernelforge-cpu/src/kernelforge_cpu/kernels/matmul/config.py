"""What can be chosen for `vectorized` matmul kernels, and what is chosen without a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.variant import ConfigSpace
from kernelforge_cpu.kernels.matmul.geometry import geometry

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo

ROWS = (4, 6, 8, 12)
BLOCKS = (256, 512, 1024, 2048)
UNKNOWN_L2 = 256 * 1024


def lanes(device: DeviceInfo) -> int:
    """f32 lanes of a vector."""
    return device.limit("vector_bytes", 16) // 4


def registers(device: DeviceInfo) -> int:
    """Vector registers for a tile: 32 with AVX-512 and NEON, 16 with AVX; SSE needs two of its 16 for products."""
    if lanes(device) == 16 or device.features & {"neon", "asimd"}:
        return 32
    return 16 if lanes(device) == 8 else 14


def matmul_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`rows` x `panels` * `vectors` is the register tile, `vectors` the width of a packed panel, `kc` the part of the
    inner dimension done at a time, `group` the number of tiles side by side that share one pass over the rows of lhs.
    """
    g = geometry(problem)
    rows, inner, columns = g.rows.extent, int(g.inner), int(g.columns)
    low = not rows.names and rows.number < ROWS[0]
    # A result that is kept in memory between two blocks must be the sum itself, in f32.
    blocked = problem.results[0].dtype == "f32" and len(g.rhs) == 1 and not low
    vectors = [v for v in (1, 2, 4) if v == 1 or (v - 1) * lanes(device) < columns]
    return ConfigSpace(
        (
            ("rows", (max(1, rows.number),) if low else ROWS),
            ("panels", (2,) if len(g.rhs) == 2 else (1, 2)),
            ("vectors", tuple(vectors)),
            ("unroll", (1, 2)),
            ("kc", (*(b for b in BLOCKS if blocked and b < inner), max(1, inner))),
            ("group", (1,) if low else (1, 2, 4)),
        ),
        (("the tile needs more registers than there are", lambda c: _registers_used(c) <= registers(device)),),
    )


def _registers_used(config: Config) -> int:
    rows, columns = int(config["rows"]), int(config["panels"]) * int(config["vectors"])
    return rows * columns + columns + 1


def matmul_default(problem: Problem, device: DeviceInfo) -> Config:
    """The tile with the fewest loads per multiply-add that the registers hold; blocks for which the panels of a tile
    fill at most half of L2, while lhs is read through them row by row.

    The panel width depends on the device and the number of columns alone: problems that differ in rows share a packed
    weight.
    """
    g = geometry(problem)
    parameters = dict(matmul_space(problem, device).parameters)
    vectors = min(2 if registers(device) == 32 else 1, int(parameters["vectors"][-1]))
    width = vectors * lanes(device)
    panels = 2 if len(g.rhs) == 2 or int(g.columns) > width else 1
    # Conversions of bf16, and instructions that overwrite an operand, leave no register for a second step.
    tight = problem.operand(1).dtype == "bf16" or registers(device) < 16
    config: dict[str, int | str] = {"panels": panels, "vectors": vectors, "unroll": 1 if tight else 2}
    legal = [
        r
        for r in map(int, parameters["rows"])
        if r <= 6 and _registers_used({**config, "rows": r}) <= registers(device)
    ]
    config["rows"] = legal[-1]
    half = device.limit("l2_bytes", UNKNOWN_L2) // 2
    tile_bytes = panels * width * problem.operand(1).itemsize
    blocks = [int(b) for b in parameters["kc"]]
    fitting = [b for b in blocks if b * tile_bytes <= half]
    config["kc"] = blocks[-1] if len(parameters["group"]) == 1 else fitting[-1] if fitting else blocks[0]
    group_bytes = int(config["kc"]) * tile_bytes
    config["group"] = max(n for n in map(int, parameters["group"]) if n == 1 or n * group_bytes <= half)
    return config
