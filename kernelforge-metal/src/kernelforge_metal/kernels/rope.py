"""Rotary position embedding: one thread a pair.

An angle is position times frequency, up to 1e5 radians, of which f32 keeps two digits after the point. So frequencies are turns
in 44 bits of fixed point: whole turns drop out of the product of integers, and what is left is exact to 2e-8 radians at any
position below 2^20. Sine and cosine are polynomials (drivers may be as far off as 5e-4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kernelforge.dialects.transformer.rope import inverse_frequencies, rotated_size
from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import DTYPES
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel
from kernelforge_metal.kernels.tensors import count, product_text, takes, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Attr, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

THREADS = 128

MAX_POSITION = 1 << 20

SINE_COSINE = """
fn cos_sin(turns: u32) -> vec2<f32> {
  let quadrant = (turns + 0x20000000u) >> 30u;
  let x = f32(bitcast<i32>(turns - (quadrant << 30u))) * 1.4629180792671596e-9;
  let s = x * x;
  let sine = x + x * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4));
  let cosine = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5));
  let turned = select(vec2<f32>(cosine, sine), vec2<f32>(-sine, cosine), (quadrant & 1u) == 1u);
  return select(turned, -turned, (quadrant & 2u) == 2u);
}
fn turn_of(place: u32, pair: u32) -> vec2<f32> {
  let frequency = frequencies[pair];
  return cos_sin(place * frequency.x + ((place * frequency.y) >> 12u));
}
"""
"""Cosine and sine of turns / 2^32: a quarter turn at a time (polynomials of Cephes' sinf and cosf on [-pi/4, pi/4]); and those of
a pair at a position, from the binding `frequencies`, the table that `frequency_table` makes."""


def takes_rope(problem: Problem, device: DeviceInfo, dtypes: Sequence[str] = DTYPES) -> Verdict:
    limit, size = problem.attr("max_position"), problem.operand(0).shape[-1]
    if not isinstance(size, int):
        return Reject("takes a head size that is known when it is built")
    if isinstance(limit, int) and limit > MAX_POSITION:
        return Reject(f"takes positions below {MAX_POSITION}, not {limit}")
    verdict = takes(problem, device, dtypes)
    return verdict if isinstance(verdict, Reject) else Accept()


def build_rope(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    tokens, heads, size = problem.operand(0).shape
    assert isinstance(size, int)
    attrs = dict(problem.attrs)
    rotary = rotated_size(size, attrs)
    x, positions, out = (tensor(problem, i, name, device) for i, name in enumerate(("x", "positions", "out")))
    (xt, xh, xd), (ot, oh, od) = x.type.element_strides(), out.type.element_strides()
    half = rotary // 2
    threads = half + (size - rotary)  # a pair, or one element that stays
    first, second = ("2u * j", "2u * j + 1u") if attrs["interleaved"] else ("j", f"j + {half}u")
    code = f"""{wgsl.IDS}{wgsl.HALVES}{SINE_COSINE}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, (tokens, heads, threads))}) {{ return; }}
  let j = i % {threads}u;
  let head = (i / {threads}u) % {product_text(problem, (heads,))};
  let token = i / {product_text(problem, (threads, heads))};
  let at = token * {xt}u + head * {xh}u;
  let to = token * {ot}u + head * {oh}u;
  if (j >= {half}u) {{
    let k = j + {half}u;
    {out.store(f"to + k * {od}u", x.load(f"at + k * {xd}u"))}
    return;
  }}
  let turn = turn_of(u32(max({positions.load(f"token * {positions.type.element_strides()[0]}u")}, 0)), j);
  let a = {x.load(f"at + ({first}) * {xd}u")};
  let b = {x.load(f"at + ({second}) * {xd}u")};
  {out.store(f"to + ({first}) * {od}u", "a * turn.x - b * turn.y")}
  {out.store(f"to + ({second}) * {od}u", "b * turn.x + a * turn.y")}
}}
"""
    bindings = (*(t.binding for t in (x, positions, out)), Binding("frequencies", 3, "vec2<u32>"))
    grid = wgsl.grid(wgsl.blocks(count(problem, (tokens, heads, threads)), THREADS))
    return GpuKernel((Dispatch(code, bindings, grid),), tables=(frequency_table(size, attrs),))


def frequency_table(size: int, attrs: Mapping[str, Attr]) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """Of each pair of a head of `size` elements: its frequency in turns, for the attributes of a `rope` op."""
    return fixed_point(inverse_frequencies(size, attrs))


def fixed_point(
    frequencies: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """Radians as turns modulo 1: 32 bits and 12 more, uint32 [n, 2]."""
    bits = np.round((frequencies / (2.0 * np.pi)) % 1.0 * 2.0**44).astype(np.uint64) % np.uint64(1 << 44)
    return np.stack([bits >> np.uint64(12), bits & np.uint64(0xFFF)], axis=-1).astype(np.uint32).reshape(-1, 2)
