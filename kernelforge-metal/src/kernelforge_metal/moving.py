"""Operands that start where a kernel cannot read them: it reads four elements at once, they are a view from element 3 on.

A dispatch before the kernel's own moves such an operand to scratch memory. Views of whole heads or rows, which is what models
have, start at multiples of four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kernelforge.errors import PluginError
from kernelforge_metal import wgsl
from kernelforge_metal.kernel import VECTORS, Binding, Dispatch, GpuKernel, Size

if TYPE_CHECKING:
    from kernelforge.problem import Problem, TensorType

THREADS = 256


def misplaced(kernel: GpuKernel, problem: Problem, offsets: Mapping[int, int]) -> tuple[int, ...]:
    """The operands that do not start at a multiple of their binding's element; `offsets` are where operands and results start,
    in elements. Raises PluginError for a result, which cannot be moved."""
    operands = len(problem.operands)
    found = set()
    for dispatch in kernel.dispatches:
        for b in dispatch.bindings:
            if b.index not in offsets:
                continue
            t = problem.operand(b.index) if b.index < operands else problem.results[b.index - operands]
            if offsets[b.index] * t.itemsize % b.alignment == 0:
                continue
            if b.index < operands:
                found.add(b.index)
            elif b.element in VECTORS:
                raise PluginError(f"a kernel for {problem} writes vectors to a view that starts between them")
    return tuple(sorted(found))


def moved(kernel: GpuKernel, problem: Problem, operands: Sequence[int]) -> GpuKernel:
    """`kernel` with these operands moved to scratch memory first."""
    first = len(problem.operands) + len(problem.results) + len(kernel.tables) + len(kernel.scratch)
    places = {index: first + i for i, index in enumerate(operands)}
    copies, sizes = [], []
    for index, place in places.items():
        t = problem.operand(index)
        words = _words(problem, t)
        sizes.append((lambda dims, words=words: 4 * words(dims)) if callable(words) else 4 * words)
        copies.append(_copy(t, index, place, words))
    dispatches = [
        replace(
            d,
            bindings=tuple(replace(b, index=places.get(b.index, b.index)) for b in d.bindings),
            parameters=(*d.parameters, *((f"{b.name}_at", 0) for b in d.bindings if b.index in places)),
        )
        for d in kernel.dispatches
    ]
    return replace(kernel, dispatches=(*copies, *dispatches), scratch=(*kernel.scratch, *sizes))


def _words(problem: Problem, t: TensorType) -> Size:
    """Words of memory from the first element of `t` to its last."""
    strides, order = t.element_strides(), problem.dims

    def words(dims: Sequence[int]) -> int:
        shape = [d if isinstance(d, int) else dims[order.index(d)] for d in t.shape]
        if 0 in shape:
            return 0
        last = sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
        return -(-(last + 1) * t.itemsize // 4)

    return words(()) if t.static else words


def _copy(t: TensorType, index: int, place: int, words: Size) -> Dispatch:
    if t.itemsize == 4:
        value = "x[p.x_at + w]"
    else:
        value = "(x[h >> 1u] >> ((h & 1u) << 4u)) | select(0u, x[(h >> 1u) + (h & 1u)] << 16u, (h & 1u) == 1u)"
    code = f"""{wgsl.IDS}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let w = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (w >= p.words) {{ return; }}
  let h = p.x_at + 2u * w;
  out[w] = {value};
}}
"""
    bindings = (Binding("x", index, "u32"), Binding("out", place, "u32"))
    return Dispatch(code, bindings, wgsl.grid(wgsl.blocks(words, THREADS)), (("words", words),))
