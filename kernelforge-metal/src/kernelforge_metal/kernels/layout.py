"""reshape, transpose, slice, split and concat where they move data: one thread an element."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from kernelforge.problem import TensorType
from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Dispatch, GpuKernel
from kernelforge_metal.kernels.tensors import Tensor, count, offsets, product_text, tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.problem import Attr, Dim, Problem
    from kernelforge.variant import Config, DeviceInfo

THREADS = 256


def build_reshape(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    x = problem.operand(0)
    return GpuKernel((_copy(problem, device, 0, 1, x, TensorType(x.shape, x.dtype)),))


def build_transpose(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    x, perm = problem.operand(0), _ints(problem.attr("perm"))
    strides = x.element_strides()
    moved = TensorType(tuple(x.shape[i] for i in perm), x.dtype, tuple(strides[i] for i in perm))
    return GpuKernel((_copy(problem, device, 0, 1, moved, problem.results[0]),))


def build_slice(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    x, out = problem.operand(0), problem.results[0]
    strides = x.element_strides()
    start = sum(a * b for a, b in zip(_ints(problem.attr("starts")), strides, strict=True))
    return GpuKernel((_copy(problem, device, 0, 1, TensorType(out.shape, x.dtype, strides), out, start),))


def build_split(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    x, sizes, axis = problem.operand(0), _ints(problem.attr("sizes")), _axis(problem)
    strides = x.element_strides()
    starts = accumulate(sizes[:-1], initial=0)
    return GpuKernel(
        tuple(
            _copy(problem, device, 0, 1 + i, TensorType(out.shape, x.dtype, strides), out, start * strides[axis])
            for i, (out, start) in enumerate(zip(problem.results, starts, strict=True))
        )
    )


def build_concat(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    out, axis = problem.results[0], _axis(problem)
    strides = out.element_strides()
    types = [t for t in problem.operands if t is not None]
    dispatches = []
    start = 0
    for i, t in enumerate(types):
        place = TensorType(t.shape, t.dtype, strides)
        dispatches.append(_copy(problem, device, i, len(types), t, place, to=start * strides[axis]))
        size = t.shape[axis]
        start += size if isinstance(size, int) else 0
    return GpuKernel(tuple(dispatches))


def _copy(
    problem: Problem,
    device: DeviceInfo,
    x: int,
    out: int,
    source: TensorType,
    target: TensorType,
    at: int = 0,
    to: int = 0,
) -> Dispatch:
    """Operand `x` seen as `source`, from its element `at` on, to result `out` seen as `target`, from its element `to` on; both
    types have the same number of elements, in row-major order."""
    src, dst = tensor(problem, x, "x", device), tensor(problem, out, "out", device)
    setup, (read,) = _walk(problem, source, "x")
    again, (write,) = _walk(problem, target, "out")
    code = f"""{wgsl.IDS}{wgsl.HALVES}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, source.shape)}) {{ return; }}
  var from: u32;
  {{
  {setup}
  from = {read} + p.from;
  }}
  {again}
  {dst.store(f"{write} + p.to", src.load("from"))}
}}
""".replace("from", "source")
    bindings: Sequence[Tensor] = (src, dst)
    return Dispatch(
        code,
        tuple(t.binding for t in bindings),
        wgsl.grid(wgsl.blocks(count(problem, source.shape), THREADS)),
        (("source", at), ("to", to)),
    )


def _walk(problem: Problem, t: TensorType, name: str) -> tuple[str, list[str]]:
    return offsets(problem, t.shape, [t], "i")


def _ints(value: Attr) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return value


def _axis(problem: Problem) -> int:
    axis = problem.attr("axis")
    assert isinstance(axis, int)
    shape: tuple[Dim, ...] = problem.operand(0).shape
    return axis % len(shape)
