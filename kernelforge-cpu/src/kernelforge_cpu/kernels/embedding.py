"""embedding: rows of a table by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_cpu.emit import vec
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_inside, emit_size, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.packed_rows import emit_row, row_layouts, row_pack
from kernelforge_cpu.kernels.strided import FLOATS, contiguous_rows, tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Builder, Pointer, Value

GRAIN = 32768
"""Elements below which another thread costs more than it saves."""

ROWS = "rows"
"""The layout of a table that is not packed."""


def embedding_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`layout`: how the table lies. A packed one is for a table that is packed anyway, for the output head."""
    table = problem.operand(0)
    packed = row_layouts(table, device) if table.constant and table.static else {}
    return ConfigSpace((("layout", (ROWS, *packed)),))


def table_layout(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    """See `KernelVariant.layouts`."""
    return {} if config["layout"] == ROWS else {0: str(config["layout"])}


def emit_zeros(k: Builder, row: Pointer, width: Value) -> None:
    """What an index outside the table gives."""
    k.vectorize(0, width, lambda i, valid: row.store(k.const(0.0, vec(k.lanes)), i, valid=valid))


def build_packed(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """From a table as products read it."""
    k = new_kernel(problem, config, device)
    table, shape = problem.operand(0), problem.results[0].shape
    layout = row_layouts(table, device)[str(config["layout"])]

    def text() -> str:
        ids, out = (tensor(k, problem, i) for i in (1, 2))
        steps = [emit_size(k, problem, t.strides[0]) for t in (ids, out)]
        with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
            row = k.convert(ids.pointer.load(token.i * steps[0]), "i64")
            result = out.pointer.at(token.i * steps[1])
            with k.if_(emit_inside(row, emit_size(k, problem, size_of(table.shape[0])))) as found:
                emit_row(k, layout, k.buffer(0, "i8"), row, int(table.shape[1]), result)
            with found.else_():
                emit_zeros(k, result, k.i64(int(table.shape[1])))
        return k.text()

    parts = shared(problem, size_of(*shape), GRAIN)
    return NativeKernel((Phase(k.name, parts),), text, {0: row_pack(layout)})


def build_embedding(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    if config["layout"] != ROWS:
        return build_packed(problem, config, device)
    k = new_kernel(problem, config, device)
    shape = problem.results[0].shape

    def text() -> str:
        table, ids, out = (tensor(k, problem, i) for i in range(3))
        steps = [emit_size(k, problem, t.strides[0]) for t in (table, ids, out)]
        with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
            row = k.convert(ids.pointer.load(token.i * steps[1]), "i64")
            source, result = table.pointer.at(row * steps[0]), out.pointer.at(token.i * steps[2])

            def step(i: Value, valid: Value | None) -> None:
                result.store(source.load(i, k.lanes, valid=valid), i, valid=valid)

            width = emit_size(k, problem, size_of(shape[1]))
            with k.if_(emit_inside(row, emit_size(k, problem, size_of(problem.operand(0).shape[0])))) as found:
                k.vectorize(0, width, step)
            with found.else_():
                emit_zeros(k, result, width)
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), text)


def takes_quantised(problem: Problem, device: DeviceInfo) -> Verdict:
    table, out = problem.operand(0), problem.results[0]
    if not table.quantised:
        return Reject(f"takes a quantised table, not {table.dtype}")
    if out.dtype not in FLOATS:
        return Reject(f"gives {', '.join(FLOATS)}, not {out.dtype}")
    return Accept() if contiguous_rows(out) else Reject(f"gives rows of stride 1, not {out}")


def build_quantised(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """Reads the groups as `kernelforge.quant` lays them out: a row lies together."""
    if config["layout"] != ROWS:
        return build_packed(problem, config, device)
    k = new_kernel(problem, config, device)
    table, shape = problem.operand(0), problem.results[0].shape
    columns, half = int(table.shape[1]), GROUP // 2

    def text() -> str:
        ids, out = (tensor(k, problem, i) for i in (1, 2))
        steps = [emit_size(k, problem, t.strides[0]) for t in (ids, out)]
        lanes = min(k.lanes, half)
        with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
            row = k.convert(ids.pointer.load(token.i * steps[0]), "i64")
            source, result = k.buffer(0, "i8").at(row * table.bytes_of(columns)), out.pointer.at(token.i * steps[1])
            inside = emit_inside(row, emit_size(k, problem, size_of(table.shape[0])))
            with k.if_(inside) as found, k.for_(0, columns // GROUP) as group:
                at = source.at(group.i * table.bytes_of(GROUP))
                scale = k.broadcast(k.convert(at.of("f16").load(align=1), "f32"), lanes)
                values, made = at.at(2), result.at(group.i * GROUP)
                for first in range(0, GROUP if table.dtype == "q8" else half, lanes):
                    packed = values.load(first, lanes)
                    if table.dtype == "q8":
                        made.store(k.convert(packed, "f32") * scale, first)
                        continue
                    for at_half, nibbles in ((0, packed & 15), (half, k.shift_right_logical(packed, 4))):
                        made.store((k.convert(nibbles, "f32") - 8.0) * scale, at_half + first)
            with found.else_():
                emit_zeros(k, result, k.i64(columns))
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), text)
