"""Pieces of WGSL that kernels share: element types, loads and stores, reductions over a workgroup, grids.

Arithmetic is in f32 whatever the storage is. Nothing here assumes how wide a subgroup is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelforge_metal.kernel import Grid, Size, size_of

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo

MAX_WORKGROUPS = 65535
"""Along one axis of a grid, on every device."""

SUBGROUP = "subgroup"
"""The feature of devices whose threads can add up across a subgroup."""

F16 = "shader-f16"
"""The feature of devices that load, store and compute f16."""


def element(dtype: str, device: DeviceInfo, width: int = 1) -> str:
    """The element of an array that holds `dtype`, `width` of them at a time (1, 2 or 4; 16-bit types without an own type in WGSL
    are held as u32, two in each, so that their widths are 2, 4 and 8)."""
    if dtype in ("f32", "i32"):
        return dtype if width == 1 else f"vec{width}<{dtype}>"
    if dtype == "f16" and F16 in device.features:
        return "f16" if width == 1 else f"vec{width}<f16>"
    words = max(1, width // 2)
    return "u32" if words == 1 else f"vec{words}<u32>"


def load(name: str, dtype: str, device: DeviceInfo, index: str) -> str:
    """An f32 (i32 for "i32") expression: element `index` of array `name`, declared with `element(dtype, device)`. What is
    quantised lies as `kernelforge.quant` has it."""
    if dtype in ("f32", "i32"):
        return f"{name}[{index}]"
    if dtype == "f16" and F16 in device.features:
        return f"f32({name}[{index}])"
    if dtype == "q8":
        return f"{load_quad(name, dtype, f'({index}) >> 2u')}[({index}) & 3u]"
    if dtype == "q8a":
        word = f"{name}[(({index}) >> 5u) * 10u + 2u + ((({index}) >> 2u) & 7u)]"
        return f"(bitcast<f32>({name}[(({index}) >> 5u) * 10u]) * f32(unpack4xI8({word})[({index}) & 3u]))"
    half = f"(({name}[({index}) >> 1u] >> ((({index}) & 1u) << 4u)) & 0xffffu)"
    return f"bitcast<f32>({half} << 16u)" if dtype == "bf16" else f"unpack2x16float({half}).x"


def unpack(word: str, dtype: str) -> str:
    """A vec2<f32> expression of the two 16-bit floats in a u32."""
    return f"unpack2x16float({word})" if dtype == "f16" else f"bf16_pair({word})"


HALVES = """
fn bf16_pair(w: u32) -> vec2<f32> { return vec2<f32>(bitcast<f32>(w << 16u), bitcast<f32>(w & 0xffff0000u)); }
fn bf16_bits(x: f32) -> u32 {
  let b = bitcast<u32>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) { return (b >> 16u) | 0x40u; }
  return (b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u;
}
fn f16_bits(v: vec2<f32>) -> u32 {
  let signs = (bitcast<vec2<u32>>(v) >> vec2<u32>(16u)) & vec2<u32>(0x8000u);
  let size = bitcast<vec2<u32>>(v) & vec2<u32>(0x7fffffffu);
  let beyond = size >= vec2<u32>(0x477ff000u);
  let special = signs | select(vec2<u32>(0x7c00u), vec2<u32>(0x7e00u), size > vec2<u32>(0x7f800000u));
  let far = select(vec2<u32>(0u), special, beyond);
  return pack2x16float(select(v, vec2<f32>(0.0), beyond)) | far.x | (far.y << 16u);
}
"""
"""Functions on 16-bit floats: two bf16 of a word as f32, and the bits of an f32, or for f16 of two, rounded to nearest even. What
is beyond f16 (65520 or more, infinity, NaN) does not go through `pack2x16float`, which leaves it open: SwiftShader makes NaN of
what is too large, and bits of a NaN reach the other half."""


IDS = """
struct Ids {
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
}
"""
"""The parameter of `main(ids: Ids)` in kernels without subgroups."""

SUBGROUP_IDS = """
struct Ids {
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
  @builtin(subgroup_invocation_id) lane: u32,
  @builtin(subgroup_size) lanes: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
}
"""
"""The same with what tells a thread its place in its subgroup."""


def reduction(name: str, operator: str, threads: int, *, subgroups: bool, element: str = "f32") -> str:
    """A function `name(value, ids)` that gives every thread of the workgroup the "add" or "max" of all its threads' values.

    All threads must call it, in uniform control flow; calls may follow each other at once. `element` is a scalar or vector
    of f32. With `subgroups` it goes through them and one word a subgroup; without, through a tree in workgroup memory
    (`threads` must be a power of two).
    """
    combine = {"add": "{} + {}", "max": "max({}, {})"}[operator]
    shared = f"{name}_shared"
    if subgroups:
        builtin = {"add": "subgroupAdd", "max": "subgroupMax"}[operator]
        return f"""
var<workgroup> {shared}: array<{element}, {threads}>;
fn {name}(value: {element}, ids: Ids) -> {element} {{
  let part = {builtin}(value);
  if (ids.subgroups == 1u) {{ return part; }}
  workgroupBarrier();
  if (ids.lane == 0u) {{ {shared}[ids.subgroup] = part; }}
  workgroupBarrier();
  var total = {shared}[0];
  for (var i = 1u; i < ids.subgroups; i++) {{ total = {combine.format("total", f"{shared}[i]")}; }}
  return total;
}}
"""
    return f"""
var<workgroup> {shared}: array<{element}, {threads}>;
fn {name}(value: {element}, ids: Ids) -> {element} {{
  workgroupBarrier();
  {shared}[ids.thread] = value;
  workgroupBarrier();
  for (var half = {threads // 2}u; half > 0u; half >>= 1u) {{
    if (ids.thread < half) {{ {shared}[ids.thread] = {combine.format(f"{shared}[ids.thread]", f"{shared}[ids.thread + half]")}; }}
    workgroupBarrier();
  }}
  return {shared}[0];
}}
"""


FLAT = "(ids.group.x + ids.group.y * ids.groups.x)"
"""The number of a workgroup of a grid made by `grid`; those from the wanted count on have nothing to do."""


def grid(count: Size) -> Grid:
    """`count` workgroups, folded into two axes when there are too many for one."""

    def folded(dims: Sequence[int]) -> tuple[int, int, int]:
        return fold(size_of(count, dims))

    return folded if callable(count) else folded(())


def fold(count: int) -> tuple[int, int, int]:
    """That many workgroups, or a few more, in two axes."""
    rows = max(1, -(-count // MAX_WORKGROUPS))
    return -(-count // rows), rows, 1


def blocks(count: Size, size: int) -> Size:
    """How many blocks of `size` cover `count`."""
    if callable(count):
        counted: Callable[[Sequence[int]], int] = count
        return lambda dims: -(-counted(dims) // size)
    return -(-count // size)


ERF = """
fn erf(x: f32) -> f32 {
  let a = abs(x);
  let s = x * x;
  if (a < 1.0) {
    return x * ((((((7.853861353153693e-5 * s - 8.010193625184903e-4) * s + 5.188327685732524e-3) * s - 2.685381193529856e-2)
      * s + 1.128358514861418e-1) * s - 3.761262582423300e-1) * s + 1.128379165726710);
  }
  let q = 1.0 / a;
  let y = q * q;
  var p: f32;
  if (a < 2.0) {
    p = (((((((2.326819970068386e-2 * y - 1.387039388740657e-1) * y + 3.687424674597105e-1) * y - 5.824733027278666e-1) * y
      + 6.210004621745983e-1) * y - 4.944515323274145e-1) * y + 3.404879937665872e-1) * y - 2.741127028184656e-1) * y
      + 5.638259427386472e-1;
  } else {
    p = ((((((-1.047766399936249e1 * y + 1.297719955372516e1) * y - 7.495518717768503) * y + 2.921019019210786) * y
      - 1.015265279202700) * y + 4.218463358204948e-1) * y - 2.820767439740514e-1) * y + 5.641895067754075e-1;
  }
  return sign(x) * (1.0 - exp(-s) * q * p);
}
"""
"""The error function, to an ulp or two (the minimax polynomials of Moshier's Cephes library, single precision)."""

_ACTIVATIONS = {
    "none": "x",
    "silu": "x / (1.0 + exp(-x))",
    "gelu": "0.5 * x * (1.0 + erf(x * 0.7071067811865476))",
    "gelu_tanh": "x / (1.0 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))",
}


def activation(name: str) -> str:
    """A function `activate(x: f32) -> f32`: one of the epilogues of `transformer.matmul`, tanh-free (drivers differ in where
    theirs overflows)."""
    body = _ACTIVATIONS[name]
    return (ERF if "erf" in body else "") + f"fn activate(x: f32) -> f32 {{ return {body}; }}\n"


def quad_element(dtype: str) -> str:
    """The element of an array that holds four numbers of a float dtype, or of q8 words of them; needs no feature."""
    return {"f32": "vec4<f32>", "q8": "u32"}.get(dtype, "vec2<u32>")


def quad(name: str, dtype: str, index: str) -> str:
    """What `quad_numbers` takes, of element `index` of an array declared with `quad_element`: of q8 by the function that
    `kernelforge_metal.kernels.quantised_cache.reader` writes."""
    return f"{name}_quad({index})" if dtype == "q8" else f"{name}[{index}]"


def load_quad(name: str, dtype: str, index: str) -> str:
    """A vec4<f32> expression: the four numbers in element `index` of an array declared with `quad_element`."""
    return quad_numbers(quad(name, dtype, index), dtype)


def quad_numbers(value: str, dtype: str) -> str:
    """A vec4<f32> expression: the four numbers of what `quad` gives."""
    if dtype == "f32":
        return value
    if dtype == "q8":
        return f"q8_numbers({value})"
    unpacked = "unpack2x16float({})" if dtype == "f16" else "bf16_pair({})"
    return f"vec4<f32>({unpacked.format(value + '.x')}, {unpacked.format(value + '.y')})"


def quad_of(numbers: str, dtype: str) -> str:
    """The reverse of `quad_numbers`: an element of a vec4<f32> expression without side effects, rounded."""
    if dtype == "f32":
        return numbers
    if dtype == "f16":
        return f"vec2<u32>(f16_bits({numbers}.xy), f16_bits({numbers}.zw))"
    low, high = (f"(bf16_bits({numbers}.{a}) | (bf16_bits({numbers}.{b}) << 16u))" for a, b in ("xy", "zw"))
    return f"vec2<u32>({low}, {high})"
