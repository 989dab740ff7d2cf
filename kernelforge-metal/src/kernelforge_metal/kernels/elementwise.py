"""silu, gelu, add, mul, cast and the copies of layout ops: one thread an element, any layout and broadcasting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Dispatch, GpuKernel
from kernelforge_metal.kernels.tensors import count, offsets, product_text, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo

THREADS = 256


def build_unary(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    name = problem.op.partition(".")[2]
    if name == "gelu" and problem.attr("approximate") == "tanh":
        name = "gelu_tanh"
    return _elementwise(problem, device, wgsl.activation(name), "activate({})")


def build_add(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _elementwise(problem, device, "", "({} + {})")


def build_mul(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _elementwise(problem, device, "", "({} * {})")


def build_cast(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    source, target = problem.operand(0).dtype, problem.results[0].dtype
    convert = {("i32", "i32"): "{}", ("f32", "i32"): "i32({})"}
    floats = "f32({})" if source == "i32" else "{}"
    return _elementwise(problem, device, "", convert.get((source, target), "i32({})" if target == "i32" else floats))


def _elementwise(problem: Problem, device: DeviceInfo, functions: str, expression: str) -> GpuKernel:
    """`expression` of the operands' elements, broadcast to the shape of the result."""
    operands = [tensor(problem, i, f"x{i}", device) for i in range(len(problem.operands))]
    out = tensor(problem, len(operands), "out", device)
    shape = out.type.shape
    setup, places = offsets(problem, shape, [t.type for t in (*operands, out)], "i")
    value = expression.format(*(t.load(place) for t, place in zip(operands, places, strict=False)))
    code = f"""{wgsl.IDS}{wgsl.HALVES}{functions}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, shape)}) {{ return; }}
  {setup}
  {out.store(places[-1], value)}
}}
"""
    grid = wgsl.grid(wgsl.blocks(count(problem, shape), THREADS))
    return GpuKernel((Dispatch(code, tuple(t.binding for t in (*operands, out)), grid),))
