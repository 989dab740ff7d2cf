"""rope_cache_update: a thread rotates or moves a pair, of a query, a key or a value, all in one dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.rope import rotated_size
from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import CACHE_DTYPES
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel
from kernelforge_metal.kernels.quantised_cache import Move, store_groups
from kernelforge_metal.kernels.rope import SINE_COSINE, frequency_table, takes_rope
from kernelforge_metal.kernels.tensors import count, dim_text, product_text, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

THREADS = 128

BUFFERS = 9
"""That the one dispatch binds; devices that bind fewer get one for the queries and one for the rest."""


def takes_rope_cache(problem: Problem, device: DeviceInfo) -> Verdict:
    if any(isinstance(problem.operand(i).shape[1], str) for i in (0, 1)):
        return Reject("takes heads that are known when it is built")
    verdict = takes_rope(problem, device, CACHE_DTYPES)
    return verdict if isinstance(verdict, Reject) else Accept()


def build_rope_cache_update(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    size = problem.operand(0).shape[2]
    assert isinstance(size, int)
    whole = device.limit("max-storage-buffers-per-shader-stage", 8) >= BUFFERS
    parts = ("qkv",) if whole else ("q", "kv")
    tables = (frequency_table(size, dict(problem.attrs)),)
    if problem.operand(3).quantised:
        return GpuKernel((_dispatch(problem, "q", device), _quantised(problem, device)), tables=tables)
    return GpuKernel(tuple(_dispatch(problem, part, device) for part in parts), tables=tables)


def _quantised(problem: Problem, device: DeviceInfo) -> Dispatch:
    """Of k and v into caches in q8: a thread rotates or moves four elements."""
    k, v, positions, slots, keys, values = (
        tensor(problem, i, name, device)
        for i, name in ((1, "k"), (2, "v"), (5, "positions"), (6, "slots"), (8, "keys"), (9, "values"))
    )
    size = problem.operand(0).shape[2]
    assert isinstance(size, int)
    rotary, step = rotated_size(size, dict(problem.attrs)), k.type.element_strides()[-1]
    pair, second = (
        ("e >> 1u", "(e & 1u) == 1u")
        if problem.attr("interleaved")
        else (f"select(e, e - {rotary // 2}u, second)", f"e >= {rotary // 2}u")
    )
    first, other = ("2u * j", "2u * j + 1u") if problem.attr("interleaved") else ("j", f"j + {rotary // 2}u")
    rotated = f"""
fn rotated(at: u32, e: u32, place: u32) -> f32 {{
  if (e >= {rotary}u) {{ return {k.load(f"at + e * {step}u")}; }}
  let second = {second};
  let j = {pair};
  let turn = turn_of(place, j);
  let a = {k.load(f"at + ({first}) * {step}u")};
  let b = {k.load(f"at + ({other}) * {step}u")};
  return select(a * turn.x - b * turn.y, b * turn.x + a * turn.y, second);
}}
"""
    moves = (
        Move(k, keys, "rotated(at, e, place)"),
        Move(v, values, v.load(f"at + e * {v.type.element_strides()[-1]}u")),
    )
    table = Binding("frequencies", 10, "vec2<u32>")
    return store_groups(problem, moves, positions, slots, SINE_COSINE + rotated, (table,))


def _dispatch(problem: Problem, part: str, device: DeviceInfo) -> Dispatch:
    """Of the heads of q, k and v that `part` names, one after the other."""
    operands, results = ("q", "k", "v"), {"q": "rotated", "k": "keys", "v": "values"}
    sources = {n: tensor(problem, operands.index(n), n, device) for n in part}
    targets = {n: tensor(problem, 7 + operands.index(n), results[n], device) for n in part}
    positions, slots = tensor(problem, 5, "positions", device), tensor(problem, 6, "slots", device)
    tokens, _, size = problem.operand(0).shape
    assert isinstance(size, int)
    rotary = rotated_size(size, dict(problem.attrs))
    half = rotary // 2
    threads = max(1, half + (size - rotary))  # a pair, or one element that stays
    first, second = ("2u * j", "2u * j + 1u") if problem.attr("interleaved") else ("j", f"j + {half}u")
    slot_count, capacity = (dim_text(problem, d) for d in problem.operand(3).shape[:2])

    def moves(name: str) -> str:
        """Statements for head `head` of `name`."""
        x, out = sources[name], targets[name]
        (xt, xh, xd), strides = x.type.element_strides(), out.type.element_strides()
        *_, oh, od = strides
        lines = [f"let at = token * {xt}u + head * {xh}u;"]
        if name == "q":
            lines.append(f"let to = token * {strides[0]}u + head * {oh}u;")
        else:
            lines += [
                f"let slot = u32({slots.load(f'token * {slots.type.element_strides()[0]}u')});",
                f"if (position < 0 || u32(position) >= {capacity} || slot >= {slot_count}) {{ return; }}",
                f"let to = slot * {strides[0]}u + u32(position) * {strides[1]}u + head * {oh}u;",
            ]
        a, b = (x.load(f"at + ({element}) * {xd}u") for element in (first, second))
        rotated = ("a * turn.x - b * turn.y", "b * turn.x + a * turn.y") if name != "v" else ("a", "b")
        lines += [
            f"if (j >= {half}u) {{",
            f"  let e = j + {half}u;",
            f"  {out.store(f'to + e * {od}u', x.load(f'at + e * {xd}u'))}",
            "  return;",
            "}",
            *(["let turn = turn_of(u32(max(position, 0)), j);"] if name != "v" else []),
            f"let a = {a};",
            f"let b = {b};",
            out.store(f"to + ({first}) * {od}u", rotated[0]),
            out.store(f"to + ({second}) * {od}u", rotated[1]),
            "return;",
        ]
        return "\n    ".join(lines)

    heads = {n: sources[n].type.shape[1] for n in part}
    total = sum(int(h) for h in heads.values())
    branches, before = [], 0
    for name in part:
        branches.append(f"""  if (number < {before + int(heads[name])}u) {{
    let head = number - {before}u;
    {moves(name)}
  }}""")
        before += int(heads[name])
    code = f"""{wgsl.IDS}{wgsl.HALVES}{SINE_COSINE}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, (tokens, total, threads))}) {{ return; }}
  let j = i % {threads}u;
  let number = (i / {threads}u) % {max(1, total)}u;
  let token = i / {max(1, total * threads)}u;
  let position = {positions.load(f"token * {positions.type.element_strides()[0]}u")};
{chr(10).join(branches)}
}}
"""
    numbers = (positions,) if part == "q" else (positions, slots)
    bindings = [t.binding for t in (*sources.values(), *targets.values(), *numbers)]
    grid = wgsl.grid(wgsl.blocks(count(problem, (tokens, total, threads)), THREADS))
    return Dispatch(code, (*bindings, Binding("frequencies", 10, "vec2<u32>")), grid)
