"""One thread for each element of the result: any layout and dtypes, without regard to speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.problem import TensorType
from kernelforge_metal.kernel import Dispatch, GpuKernel
from kernelforge_metal.kernels.matmul.geometry import product_of
from kernelforge_metal.kernels.matmul.weights import Piece, Quads
from kernelforge_metal.kernels.tensors import count, offsets, product_text, tensor
from kernelforge_metal.wgsl import FLAT, HALVES, IDS, activation, blocks, grid

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo

THREADS = 64


def build_direct(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    g = product_of(problem)
    glu = len(g.rhs) == 2
    shape = problem.results[0].shape
    x, out = tensor(problem, 0, "x", device), tensor(problem, g.out, "y", device)
    *outer, _, _ = x.type.element_strides()
    one = [1] * len(outer)
    row_step = x.type.element_strides()[-1 if not glu and problem.attr("transpose_lhs") else -2]
    lines = TensorType((*shape[:-1], 1), "f32", (*outer, row_step, 0))
    spread = [problem.results[0], lines]
    functions, bindings, reads, packs = "", [x.binding], [], {}
    for name, index in zip(("w", "u"), g.rhs, strict=False):
        w = problem.operand(index)
        if w.quantised:
            packed = Quads(w.dtype, g.columns, g.inner)
            packs[index] = packed.packs()
            functions += packed.functions(name)
            bindings += packed.bindings(name, index, Piece(0, g.columns, True))
            reads.append(f"{name}_at(column, k)")
        else:
            dense = tensor(problem, index, name, device)
            bindings.append(dense.binding)
            reads.append(dense.load(f"matrix + column * {g.rhs_columns}u + k * {g.rhs_inner}u"))
    rhs = problem.operand(g.rhs[0])
    batches = rhs.element_strides()[:-2] if rhs.rank > 2 else ()
    matrices = TensorType((*shape[:-2], 1, 1) if batches else (*one, 1, 1), "f32", (*(batches or one), 0, 0))
    spread.append(matrices)
    value = "sum0"
    if g.bias is not None:
        bias = tensor(problem, g.bias, "bias", device)
        bindings.append(bias.binding)
        value += f" + {bias.load(f'column * {bias.type.element_strides()[0]}u')}"
    value = f"activate({value})" + (" * sum1" if glu else "")
    if g.residual is not None:
        spread.append(problem.operand(g.residual))
    setup, places = offsets(problem, shape, spread, "i")
    if g.residual is not None:
        residual = tensor(problem, g.residual, "residual", device)
        bindings.append(residual.binding)
        value += f" + {residual.load(places[3])}"
    steps = "\n    ".join(f"sum{n} = fma(a, {read}, sum{n});" for n, read in enumerate(reads))
    code = f"""{IDS}{HALVES}{activation(g.activation)}{functions}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, shape)}) {{ return; }}
  {setup}
  let column = i % {g.columns}u;
  let row = {places[1]};
  let matrix = {places[2]};
  var sum0 = 0.0;
  var sum1 = 0.0;
  for (var k = 0u; k < {g.inner}u; k++) {{
    let a = {x.load(f"row + k * {g.lhs_inner}u")};
    {steps}
  }}
  {out.store(places[0], value)}
}}
"""
    bindings.append(out.binding)
    return GpuKernel((Dispatch(code, tuple(bindings), grid(blocks(count(problem, shape), THREADS))),), packs)
