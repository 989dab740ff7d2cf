"""embedding from a quantised table, in the layout that matrix products read: the output head is often the same weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import DTYPES
from kernelforge_metal.kernel import Dispatch, GpuKernel
from kernelforge_metal.kernels.matmul.weights import Quads, pieces
from kernelforge_metal.kernels.tensors import count, product_text, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

THREADS = 128


def takes_quantised(problem: Problem, device: DeviceInfo) -> Verdict:
    table, out = problem.operand(0), problem.results[0]
    if not table.quantised:
        return Reject(f"takes a table of q8 or q4, not {table.dtype}")
    if not table.constant or not table.static:
        return Reject("takes a table that is constant, to be packed")
    if out.dtype not in DTYPES:
        return Reject(f"takes {', '.join(DTYPES)} as the result, not {out.dtype}")
    return Accept()


def _layout(problem: Problem) -> Quads:
    table = problem.operand(0)
    rows, width = table.static_shape()
    return Quads(table.dtype, rows, width)


def build_quantised(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """One thread an element; a table larger than a binding may be is looked up in pieces, each by a dispatch of its own, of which
    the first also gives zeros for ids that are no row."""
    layout = _layout(problem)
    ids, out = tensor(problem, 1, "ids_", device), tensor(problem, 2, "out", device)
    code = f"""{wgsl.IDS}{wgsl.HALVES}{layout.functions("table")}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, out.type.shape)}) {{ return; }}
  let token = i / {layout.inner}u;
  let id = u32({ids.load(f"token * {ids.type.element_strides()[0]}u")});
  if (id >= {layout.columns}u && p.first == 0u) {{ {out.store("i", "0.0")} }}
  let row = id - p.first;
  if (row >= p.rows) {{ return; }}
  {out.store("i", f"table_at(row, i % {layout.inner}u)")}
}}
"""
    grid = wgsl.grid(wgsl.blocks(count(problem, out.type.shape), THREADS))
    dispatches = []
    for piece in pieces(layout, device):
        bindings = (*layout.bindings("table", 0, piece), ids.binding, out.binding)
        rows = (("first", piece.first), ("rows", min(piece.columns, layout.columns - piece.first)))
        dispatches.append(Dispatch(code, bindings, grid, rows))
    return GpuKernel(tuple(dispatches), packs={0: layout.packs()})
