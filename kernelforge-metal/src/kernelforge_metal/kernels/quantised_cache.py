"""KV caches in q8: how shaders read and write groups of 32 elements, an f16 scale and 32 int8 (`kernelforge.quant`).

A group is 17 halves of words. Every other one starts in the middle of a word, whose two halves belong to two groups; 64 elements
are 17 words. Who writes single groups writes that word atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Binding, Dispatch
from kernelforge_metal.kernels.quantiser import SCALE
from kernelforge_metal.kernels.tensors import Tensor, count, dim_text, product_text

if TYPE_CHECKING:
    from kernelforge.problem import Problem

THREADS = 64

RUN = 2 * GROUP
"""Elements that take whole words."""
RUN_WORDS = 17

NUMBERS = """
fn q8_numbers(quad: vec2<u32>) -> vec4<f32> { return vec4<f32>(unpack4xI8(quad.x)) * unpack2x16float(quad.y).x; }
fn q8_place(at: u32) -> vec4<u32> {
  let scale = (at >> 3u) * 17u;
  let first = scale + 1u + ((at & 7u) << 1u);
  return vec4<u32>(first >> 1u, (first >> 1u) + (first & 1u), scale >> 1u, (scale & 1u) << 4u);
}
"""
"""`q8_numbers`: of a quad, four int8 and an f16 scale in the lower half of a word. `q8_place`: of elements 4 at to 4 at + 3, the
one or two words of the int8, that of the scale, and how far it is shifted there."""


def reader(name: str) -> str:
    """`NAME_at(place, words)`: a quad of the cache `name`, as `q8_numbers` takes it, so many words behind a place.
    `NAME_quad(at)`: elements 4 at to 4 at + 3."""
    return f"""
fn {name}_at(place: vec4<u32>, words: u32) -> vec2<u32> {{
  let low = {name}[place.x + words];
  let high = {name}[place.y + words];
  let values = select(low, (low >> 16u) | (high << 16u), place.x != place.y);
  return vec2<u32>(values, {name}[place.z + words] >> place.w);
}}
fn {name}_quad(at: u32) -> vec2<u32> {{ return {name}_at(q8_place(at), 0u); }}
"""


def run_words(name: str, quad: str) -> str:
    """Statements that load a run of elements, whose first is in quad `quad` of the cache `name`, into `k0`, `k1`, ..."""
    return " ".join(f"let k{n} = {name}[{quad} / {RUN // 4}u * {RUN_WORDS}u + {n}u];" for n in range(RUN_WORDS))


def run_quad(n: int) -> str:
    """Quad `n` of a run that `run_words` has loaded, as `q8_numbers` takes it."""
    if n < GROUP // 4:
        return f"vec2<u32>((k{n} >> 16u) | (k{n + 1} << 16u), k0)"
    return f"vec2<u32>(k{n + 1}, k8 >> 16u)"


WRITER = f"""{SCALE}
fn q8_scale(largest: u32) -> vec2<u32> {{
  if (largest >= 0x7f800000u) {{ return vec2<u32>(0x7e00u, 0u); }}
  let d = group_scale(largest);
  return vec2<u32>(f16_bits(vec2<f32>(bitcast<f32>(d.x), 0.0)) & 0xffffu, select(0u, d.y + 0x800000u, d.y > 0u));
}}
fn q8_values(x: vec4<f32>, twice: u32) -> u32 {{
  let size = (vec4<u32>(abs(x) * bitcast<f32>(twice)) + vec4<u32>(1u)) >> vec4<u32>(1u);
  let bytes = select(size, vec4<u32>() - size, x < vec4<f32>()) & vec4<u32>(0xffu);
  return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}}
"""
"""What `kernelforge.quant.quantize` computes, bit by bit.

`q8_scale`: of the largest magnitude of a group, its scale d as an f16, and the bits of 2 / d, from a d rounded as f32 first; NaN
and 0 where the group has NaN or infinity, 0 and 0 where d is subnormal. `q8_values`: four int8, |x| / d rounded with halves away
from zero: 2 |x| / d, cut and halved, has no sum that a compiler may contract with the product."""


FRESH = """
fn fresh_scale(group: u32) {
  var largest = 0u;
  for (var i = 0u; i < 8u; i++) { largest = max(largest, largest_bits(fresh[group * 8u + i])); }
  scales[group] = q8_scale(largest);
}
fn fresh_half(group: u32, half: u32) -> u32 {
  if (half == 0u) { return scales[group].x; }
  return (q8_values(fresh[group * 8u + ((half - 1u) >> 1u)], scales[group].y) >> (((half - 1u) & 1u) << 4u)) & 0xffffu;
}
fn fresh_word(n: u32) -> u32 {
  let low = fresh_half(2u * n / 17u, 2u * n % 17u);
  return low | (fresh_half((2u * n + 1u) / 17u, (2u * n + 1u) % 17u) << 16u);
}
"""
"""Of quads in `fresh`, whole runs of them, both in workgroup memory: `fresh_scale` writes what `q8_scale` gives for a group to
`scales`, then `fresh_word` is word `n` of what is to be stored, of which one thread each is the owner."""


@dataclass(frozen=True)
class Move:
    """New rows for a cache."""

    new: Tensor
    cache: Tensor
    element: str
    """An f32 expression: element `e` of the row at `at` of `new`, for a token at position `place`."""


def store_groups(
    problem: Problem,
    moves: Sequence[Move],
    positions: Tensor,
    slots: Tensor,
    functions: str = "",
    tables: Sequence[Binding] = (),
) -> Dispatch:
    """A thread has four elements of the new rows of `moves`, whose shapes are the same; eight find the scale of a group."""
    slot_count, capacity, heads, size = moves[0].cache.type.shape
    assert isinstance(heads, int)
    assert isinstance(size, int)
    tokens = moves[0].new.type.shape[0]
    in_head = size // GROUP
    each = max(1, heads * in_head)
    shape = (tokens, len(moves), heads, in_head, GROUP // 4)
    place, slot = (t.load(f"token * {t.type.element_strides()[0]}u") for t in (positions, slots))

    def branches(statements: Callable[[Move], str]) -> str:
        parts = (f"if (which == {n}u) {{ {statements(move)} }}" for n, move in enumerate(moves))
        return "\n  ".join(parts)

    def load(move: Move) -> str:
        step, head_step, _ = move.new.type.element_strides()
        first = f"(group % {in_head}u) * {GROUP}u + 4u * quad"
        return (
            f"let at = token * {step}u + (group / {in_head}u) * {head_step}u; "
            f"for (var i = 0u; i < 4u; i++) {{ let e = {first} + i; x[i] = {move.element}; }}"
        )

    def store(move: Move) -> str:
        name = move.cache.name
        return f"""
    if (odd) {{
      if (quad == 0u) {{ atomicAnd(&{name}[word], 0xffffu); atomicOr(&{name}[word], scale.x << 16u); }}
      atomicStore(&{name}[word + 1u + quad], own);
    }} else {{
      atomicStore(&{name}[word + quad], before | (own << 16u));
      if (quad == 7u) {{ atomicAnd(&{name}[word + 8u], 0xffff0000u); atomicOr(&{name}[word + 8u], own >> 16u); }}
    }}
  """

    code = f"""{wgsl.IDS}{wgsl.HALVES}{WRITER}{functions}
var<workgroup> quads: array<vec4<f32>, {THREADS}>;
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let n = {wgsl.FLAT} * {THREADS}u + ids.thread;
  let quad = n & 7u;
  let group = (n >> 3u) % {each}u;
  let which = (n >> 3u) / {each}u % {len(moves)}u;
  let token = (n >> 3u) / {each * len(moves)}u;
  var row = 0u;
  var inside = false;
  var x = vec4<f32>();
  if (n < {product_text(problem, shape)}) {{
  let place = u32({place});
  let slot = u32({slot});
  inside = place < {dim_text(problem, capacity)} && slot < {dim_text(problem, slot_count)};
  row = slot * {dim_text(problem, capacity)} + place;
  if (inside) {{
  {branches(load)}
  }}
  }}
  quads[ids.thread] = x;
  workgroupBarrier();
  if (!inside) {{ return; }}
  var largest = 0u;
  for (var i = 0u; i < 8u; i++) {{ largest = max(largest, largest_bits(quads[ids.thread - quad + i])); }}
  let scale = q8_scale(largest);
  let own = q8_values(x, scale.y);
  var before = scale.x;
  if (quad > 0u) {{ before = q8_values(quads[ids.thread - 1u], scale.y) >> 16u; }}
  let odd = ((row * {each}u + group) & 1u) == 1u;
  let word = ((row * {each}u + group) * 17u) >> 1u;
  {branches(store)}
}}
"""
    tensors = (*(m.new for m in moves), *(m.cache for m in moves), positions, slots)
    grid = wgsl.grid(wgsl.blocks(count(problem, shape), THREADS))
    return Dispatch(code, (*(t.binding for t in tensors), *tables), grid)
