"""Attention of one token that rotates its queries itself and writes its key and value to the caches: the dispatches of a decode
step are fewer by one a layer.

Each workgroup of `split` rotates the queries that it reads. The one whose chunk the token's own position is in, for each group of
heads, rotates the key: it has it and the value in workgroup memory, reads the caches up to them, and writes them at its end. No
other reads that row, so that nothing waits for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.attention import ATTENTION
from kernelforge.dialects.transformer.rope import rotated_size
from kernelforge.dtype import GROUP
from kernelforge.variant import ConfigSpace, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import CACHE_DTYPES
from kernelforge_metal.kernel import Below, Binding, GpuKernel
from kernelforge_metal.kernels.attention import Attention
from kernelforge_metal.kernels.attention_split import NewRow, default_chunk, split_kernel, split_space, takes_split
from kernelforge_metal.kernels.quantised_cache import FRESH, RUN, RUN_WORDS, WRITER
from kernelforge_metal.kernels.rope import SINE_COSINE, frequency_table, takes_rope
from kernelforge_metal.kernels.tensors import tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

BUFFERS = 10
"""That a dispatch binds."""

Q, NEW_K, NEW_V, POSITIONS, SLOTS = 0, 1, 2, 5, 6
OUT, KEYS, VALUES, FREQUENCIES, FOUND = 7, 8, 9, 10, 11
PLACES = {0: Q, 1: KEYS, 2: VALUES, 3: POSITIONS, 4: SLOTS, 6: OUT, 7: FOUND}
"""Where buffers of `attention` are among those of `rope_attention`."""


def attention_of(problem: Problem) -> Problem:
    """The attention of the rotated queries over the caches."""
    attrs = dict(problem.attrs)
    operands = (*(problem.operand(i) for i in (Q, 3, 4, POSITIONS, SLOTS)),)
    made = ATTENTION.problem(operands, {name: attrs[name] for name in ("scale", "window", "softcap")})
    return replace(made, results=problem.results[:1])


def takes_rope_split(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_rope(problem, device, CACHE_DTYPES)
    if isinstance(verdict, Reject):
        return verdict
    if any(isinstance(d, str) for i in (Q, NEW_K) for d in problem.operand(i).shape[1:]):
        return Reject("takes heads that are known when it is built")
    if problem.operand(Q).shape[0] != 1:
        return Reject(
            f"takes one token, not {problem.operand(Q).shape[0]}: another would read keys while they are written"
        )
    rotary = rotated_size(int(problem.operand(Q).shape[2]), dict(problem.attrs))
    whole = 4 if problem.attr("interleaved") else 8
    if rotary % whole:
        return Reject(f"takes a multiple of {whole} rotated elements, not {rotary}")
    for name, i in (("k", NEW_K), ("v", NEW_V)):
        *outer, last = problem.operand(i).element_strides()
        if last != 1 or any(s % 4 for s in outer):
            return Reject(f"takes rows that start at multiples of 4 elements, not {name} of {problem.operand(i)}")
    if problem.operand(3).quantised and int(problem.operand(Q).shape[2]) % RUN:
        return Reject(f"takes heads of a multiple of {RUN} elements in q8: others share words with their neighbours")
    limit = device.limit("max-storage-buffers-per-shader-stage", 8)
    if limit < BUFFERS:
        return Reject(f"takes a device that binds {BUFFERS} buffers, not {limit}")
    return takes_split(attention_of(problem), device)


def rope_split_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    attention = attention_of(problem)
    size = Attention(attention, device).size
    new_row = 2 * 4 * size  # key and value, f32
    if problem.operand(3).quantised:
        new_row += 2 * 8 * size // GROUP
    return split_space(attention, device, new_row)


def rope_split_default(problem: Problem, device: DeviceInfo) -> Config:
    return default_chunk(rope_split_space(problem, device), device)


def build_rope_split(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    a = Attention(attention_of(problem), device)
    made = split_kernel(a, config, _new_row(problem, a, int(config["chunk"]), device))
    vectors = [
        Binding(f"new_{n}", i, wgsl.quad_element(problem.operand(i).dtype)) for n, i in (("k", NEW_K), ("v", NEW_V))
    ]
    more = (*vectors, Binding("frequencies", FREQUENCIES, "vec2<u32>"))

    def known(below: Below | None) -> Below | None:
        return None if below is None else replace(below, index=PLACES[below.index])

    dispatches = []
    for dispatch in made.dispatches:
        bindings = tuple(replace(b, index=PLACES[b.index]) for b in dispatch.bindings)
        if any(b.index == Q for b in bindings):  # the merge needs no more
            bindings += more
        dispatches.append(
            replace(dispatch, bindings=bindings, only=known(dispatch.only), unless=known(dispatch.unless))
        )
    table = frequency_table(a.size, dict(problem.attrs))
    return replace(made, dispatches=tuple(dispatches), tables=(table,))


def _new_row(problem: Problem, a: Attention, chunk: int, device: DeviceInfo) -> NewRow:
    quads = a.size // 4
    k, v = (tensor(problem, i, f"new_{n}", device) for n, i in (("k", NEW_K), ("v", NEW_V)))
    positions = a.tensors["positions"]
    sources = [f"({t.at} + group * {t.type.element_strides()[1]}u) / 4u" for t in (k, v)]
    places = [
        f"({a.tensors[name].at} + {a.key_place(name, 'group')} + newest * {a.key_stride(name)}u) / 4u" for name in "kv"
    ]
    query = f"({a.tensors['q'].at} + {a.query_place('q', 'token', 'head')}) / 4u"
    each = f"for (var i = ids.thread; i < {quads}u; i += {chunk}u)"
    load_v = wgsl.load_quad("new_v", v.type.dtype, f"{sources[1]} + i")
    dtype = problem.operand(3).dtype
    functions = SINE_COSINE + _rotation(problem, "q") + _rotation(problem, "new_k")
    numbers = ("fresh[i]", f"fresh[{quads}u + i]")
    targets = [f"{n}[{at} + i] = {wgsl.quad_of(x, dtype)};" for n, at, x in zip("kv", places, numbers, strict=True)]
    store, then = f"{each} {{ {' '.join(targets)} }}", ""
    if dtype == "q8":
        count, words = 2 * a.size // GROUP, a.size // RUN * RUN_WORDS
        functions += f"{WRITER}{FRESH}var<workgroup> scales: array<vec2<u32>, {count}>;\n"
        # The last threads, as they often have no key.
        then = f" if (here && ids.thread >= {chunk - count}u) {{ fresh_scale(ids.thread - {chunk - count}u); }}"
        starts = [f"{at} / {RUN // 4}u * {RUN_WORDS}u" for at in places]
        store = (
            f"for (var i = ids.thread; i < {2 * words}u; i += {chunk}u) {{ let word = fresh_word(i); "
            f"if (i < {words}u) {{ k[{starts[0]} + i] = word; }} else {{ v[{starts[1]} + i - {words}u] = word; }} }}"
        )
    return NewRow(
        functions=functions,
        query=f"rotated_q({query}, d, newest)",
        find=f"let position = {positions.load('0u')}; let newest = u32(max(position, 0)); "
        f"let here = position >= 0 && newest + 1u == seen.end && newest >= begin && newest - begin < {chunk}u; "
        "let old = select(many, newest - begin, here);",
        load=f"if (here) {{ {each} {{ fresh[i] = rotated_new_k({sources[0]}, i, newest); fresh[{quads}u + i] = {load_v}; }} }}",
        then=then,
        store=f"if (here) {{ {store} }}",
    )


def _rotation(problem: Problem, name: str) -> str:
    """`rotated_NAME(at, d, place)`: quad `d` of the head whose quads start at `at`, at a position."""
    index = {"q": Q, "new_k": NEW_K}[name]
    dtype, rotary = problem.operand(index).dtype, rotated_size(int(problem.operand(Q).shape[2]), dict(problem.attrs))
    far = rotary // 8

    def load(quad: str) -> str:
        return wgsl.load_quad(name, dtype, f"at + {quad}")

    if problem.attr("interleaved"):
        turned = f"""let x = {load("d")};
  let a = turn_of(place, 2u * d);
  let b = turn_of(place, 2u * d + 1u);
  return vec4<f32>(x.x * a.x - x.y * a.y, x.y * a.x + x.x * a.y, x.z * b.x - x.w * b.y, x.w * b.x + x.z * b.y);"""
    else:
        turned = f"""let second = d >= {far}u;
  let n = select(d, d - {far}u, second);
  let a = {load("n")};
  let b = {load(f"n + {far}u")};
  let t0 = turn_of(place, 4u * n);
  let t1 = turn_of(place, 4u * n + 1u);
  let t2 = turn_of(place, 4u * n + 2u);
  let t3 = turn_of(place, 4u * n + 3u);
  let c = vec4<f32>(t0.x, t1.x, t2.x, t3.x);
  let s = vec4<f32>(t0.y, t1.y, t2.y, t3.y);
  return select(a * c - b * s, b * c + a * s, second);"""
    return f"""
fn rotated_{name}(at: u32, d: u32, place: u32) -> vec4<f32> {{
  if (d >= {rotary // 4}u) {{ return {load("d")}; }}
  {turned}
}}
"""
