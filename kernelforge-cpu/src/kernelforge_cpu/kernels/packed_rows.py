"""Rows of a constant matrix [N, K] that matrix products read packed, as the N columns of their right-hand side.

A row lies in one panel, some bytes at every step of the inner dimension. To read it there costs little beside the product,
and saves a second copy of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP, WEIGHT_FORMATS
from kernelforge_cpu.kernels.matmul.config import lanes
from kernelforge_cpu.kernels.matmul.groups import Groups
from kernelforge_cpu.kernels.matmul.panels import Panels
from kernelforge_cpu.kernels.matmul.words import WORD, Words
from kernelforge_cpu.ssa import vec

if TYPE_CHECKING:
    from kernelforge.problem import TensorType
    from kernelforge.variant import DeviceInfo
    from kernelforge_cpu.emit import Builder, Pointer, Value
    from kernelforge_cpu.kernel import Pack

Layout = Panels | Groups | Words

NIBBLE = 4


def row_layouts(matrix: TensorType, device: DeviceInfo) -> Mapping[str, Layout]:
    """By name, the layouts into which products with the transposed matrix may pack it."""
    rows, columns = matrix.static_shape()
    width, dtype = lanes(device), matrix.dtype
    if dtype not in WEIGHT_FORMATS:
        return {layout.name(True): layout for layout in (Panels(v, width, dtype) for v in (1, 2, 4))}
    grouped = {g.name: g for g in (Groups(dtype, v, width, rows, columns) for v in (1, 2))}
    words = Words(dtype, width, rows, columns)
    return {words.name: words, **grouped}


def row_pack(layout: Layout) -> Pack:
    return layout.pack(True) if isinstance(layout, Panels) else layout.pack


def emit_row(k: Builder, layout: Layout, matrix: Pointer, row: Value, columns: int, out: Pointer) -> None:
    """out[:columns] = matrix[row], widened to f32 if it is quantised; `matrix` counts bytes."""
    panel = k.binary("divu", row, k.i64(layout.width))
    column = row - panel * layout.width
    if isinstance(layout, Panels):
        source = matrix.of(layout.dtype).at(panel * (columns * layout.width)).at(layout.position(column))
        with k.for_(0, columns) as step:
            out.store(source.load(step.i * layout.width), step.i)
        return
    if isinstance(layout, Words):
        own = matrix.at(panel * layout.panel_bytes)
        scales, values = own.of("f16").at(column), own.at(layout.scale_bytes)
    else:
        own = matrix.at(panel * (layout.groups * layout.group_bytes))
        scales = matrix.at(layout.scales).of("f16").at(panel * (layout.groups * layout.width)).at(column)
        values = own
    with k.for_(0, layout.groups) as group:
        scale = scales.load_f32(group.i * layout.width)
        _emit_group(k, layout, values.at(group.i * layout.group_bytes), column, scale, out.at(group.i * GROUP))


def _emit_group(k: Builder, layout: Groups | Words, group: Pointer, column: Value, scale: Value, out: Pointer) -> None:
    if isinstance(layout, Groups) and layout.dtype == "q8":
        with k.for_(0, GROUP) as step:
            out.store(group.load_f32(step.i * layout.width + column) * scale, step.i)
        return
    own = group.of("i32").at(column)
    factor = k.broadcast(scale, WORD)
    for word in range(layout.group_bytes // (WORD * layout.width)):
        found = k.bitcast(own.load(word * layout.width), vec(WORD, "i8"))
        if layout.dtype == "q8":
            out.store(k.convert(found, "f32") * factor, word * WORD)
            continue
        for half, nibbles in enumerate((found & 15, k.shift_right_logical(found, NIBBLE))):
            if isinstance(layout, Groups):  # in two's complement
                nibbles = nibbles ^ 8
            out.store((k.convert(nibbles, "f32") - 8.0) * factor, GROUP // 2 * half + word * WORD)
