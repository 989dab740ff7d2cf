"""embedding, kv_cache_update and argmax: rows by index, and the index of the largest."""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import CACHE_DTYPES, DTYPES
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel
from kernelforge_metal.kernels.quantised_cache import Move, store_groups
from kernelforge_metal.kernels.rows import Rows
from kernelforge_metal.kernels.tensors import count, dim_text, product_text, takes, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

THREADS = 128


def takes_embedding(problem: Problem, device: DeviceInfo) -> Verdict:
    table, out = problem.operand(0), problem.results[0]
    if table.dtype not in DTYPES or out.dtype not in DTYPES:
        return Reject(f"takes {', '.join(DTYPES)}, not {table.dtype} to {out.dtype}")
    if not (table.constant and table.static and table.contiguous):
        return takes(problem, device)
    return Accept()


def build_embedding(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """One thread an element; a table larger than a binding may be is looked up in pieces, each by a dispatch of its own, of which
    the first also gives zeros for ids that are no row."""
    table, ids, out = (tensor(problem, i, name, device) for i, name in enumerate(("table", "ids_", "out")))
    rows, width = table.type.shape
    assert isinstance(width, int)
    row_step, step = table.type.element_strides()
    code = f"""{wgsl.IDS}{wgsl.HALVES}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, out.type.shape)}) {{ return; }}
  let token = i / {width}u;
  let id = u32({ids.load(f"token * {ids.type.element_strides()[0]}u")});
  if (id >= {dim_text(problem, rows)} && p.first == 0u) {{ {out.store("i", "0.0")} }}
  let row = id - p.first;
  if (row >= p.rows) {{ return; }}
  {out.store("i", table.load(f"row * {row_step}u + (i % {width}u) * {step}u"))}
}}
"""
    grid = wgsl.grid(wgsl.blocks(count(problem, out.type.shape), THREADS))
    dispatches = []
    for first, number, start, nbytes in pieces(problem, device):
        binding = Binding("table", 0, table.binding.element, start, nbytes)
        size = count(problem, (rows,)) if number is None else number
        dispatches.append(Dispatch(code, (binding, ids.binding, out.binding), grid, (("first", first), ("rows", size))))
    return GpuKernel(tuple(dispatches))


def pieces(problem: Problem, device: DeviceInfo) -> list[tuple[int, int | None, int, int]]:
    """First row, rows, first byte and bytes of the parts of operand 0, a constant [rows, width], that can be bound at once."""
    table = problem.operand(0)
    limit = device.limit("max-storage-buffer-binding-size", 1 << 27)
    if not table.constant or not table.static or table.nbytes() <= limit:
        return [(0, None, 0, 0)]
    rows, width = table.static_shape()
    nbytes = width * table.itemsize
    each = limit // (256 * nbytes) * 256  # so that every piece starts at a multiple of 256 bytes
    return [(r, min(each, rows - r), r * nbytes, min(each, rows - r) * nbytes) for r in range(0, rows, each)]


def takes_kv_cache_update(problem: Problem, device: DeviceInfo) -> Verdict:
    return takes(problem, device, CACHE_DTYPES)


def build_kv_cache_update(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """One thread an element of the new rows, or four of a cache in q8."""
    names = ("cache", "fresh", "positions", "slots")
    cache, new, positions, slots = (tensor(problem, i, name, device) for i, name in enumerate(names))
    out = tensor(problem, 4, "out", device)
    if out.type.quantised:
        move = Move(new, out, new.load(f"at + e * {new.type.element_strides()[-1]}u"))
        return GpuKernel((store_groups(problem, (move,), positions, slots),))
    tokens, groups, size = new.type.shape
    (nt, ng, nd), (cs, cp, cg, cd) = new.type.element_strides(), out.type.element_strides()
    slot_count, capacity = (dim_text(problem, d) for d in cache.type.shape[:2])
    at, slot = (t.load(f"token * {t.type.element_strides()[0]}u") for t in (positions, slots))
    element = product_text(problem, (groups, size))
    code = f"""{wgsl.IDS}{wgsl.HALVES}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let i = {wgsl.FLAT} * {THREADS}u + ids.thread;
  if (i >= {product_text(problem, new.type.shape)}) {{ return; }}
  let token = i / ({element});
  let place = u32({at});
  let slot = u32({slot});
  if (place >= {capacity} || slot >= {slot_count}) {{ return; }}
  let j = i % {dim_text(problem, size)};
  let group = (i / {dim_text(problem, size)}) % {dim_text(problem, groups)};
  {out.store(f"slot * {cs}u + place * {cp}u + group * {cg}u + j * {cd}u", new.load(f"token * {nt}u + group * {ng}u + j * {nd}u"))}
}}
"""
    grid = wgsl.grid(wgsl.blocks(count(problem, (tokens, groups, size)), THREADS))
    return GpuKernel((Dispatch(code, tuple(t.binding for t in (new, positions, slots, out)), grid),))


LONG_ROW, PART = 4096, 2048
"""Elements from which several workgroups search a row, and about how many each then has."""
UNROLLED = 4
"""Elements that a thread loads at once."""

KEY = """
fn key(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return 0xffffffffu; }
  if ((bits & 0x7fffffffu) == 0u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}
"""
"""Bits that compare as numbers do, NaN above all, -0 like 0. Arithmetic on floats may take the smallest for 0."""


def build_argmax(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """The largest key and, among equal ones, the lowest index: a workgroup a row, or several and one more to compare theirs."""
    rows = Rows(problem, device, ("x",))
    x = rows.tensors[0]
    out = tensor(problem, 1, "out", device)
    threads = rows.threads
    size = problem.operand(0).shape[-1]
    parts = -(-size // PART) if isinstance(size, int) and size > LONG_ROW else 1
    search = f"""
var<workgroup> keys: array<u32, {threads}>;
var<workgroup> places: array<u32, {threads}>;
fn search(best_key: u32, best_place: u32, thread: u32) -> u32 {{
  keys[thread] = best_key;
  places[thread] = best_place;
  for (var half = {threads // 2}u; half > 0u; half >>= 1u) {{
    workgroupBarrier();
    if (thread < half) {{
      let a = keys[thread]; let b = keys[thread + half];
      if (b > a || (b == a && places[thread + half] < places[thread])) {{
        keys[thread] = b;
        places[thread] = places[thread + half];
      }}
    }}
  }}
  workgroupBarrier();
  return places[0];
}}
"""
    outer = problem.operand(0).shape[:-1]
    header = f"{wgsl.IDS}{wgsl.HALVES}{KEY}{search}"
    take = "if (k > best || (k == best && i < place)) { best = k; place = i; }"
    store = out.store(_flat_place("row"), "i32(found)")
    finish = f"if (ids.thread == 0u) {{ {store} }}"
    if parts == 1:
        code = f"""{header}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= {rows.count_text}) {{ return; }}
  {rows.setup}
  var best = 0u;
  var place = 0xffffffffu;
  {rows.loop(f"let k = key({x.load(rows.place(x))}); {take}")}
  let found = search(best, place, ids.thread);
  {finish}
}}
"""
        return GpuKernel((Dispatch(code, (x.binding, out.binding), wgsl.grid(rows.count)),))
    chunk = -(-int(size) // parts)
    own = [re.sub(r"\bi\b", f"i{n}", rows.place(x)) for n in range(UNROLLED)]
    loads = " ".join(
        f"let i{n} = min(i + {n * threads}u, end - 1u); let k{n} = key({x.load(place)});" for n, place in enumerate(own)
    )
    takes = " ".join(f"{{ let i = i{n}; let k = k{n}; {take} }}" for n in range(UNROLLED))
    first = f"""{header}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let flat = {wgsl.FLAT};
  let row = flat / {parts}u;
  let part = flat % {parts}u;
  if (row >= {rows.count_text}) {{ return; }}
  {rows.setup}
  var best = 0u;
  var place = 0xffffffffu;
  let end = min((part + 1u) * {chunk}u, {rows.length});
  for (var i = part * {chunk}u + ids.thread; i < end; i += {UNROLLED * threads}u) {{ {loads} {takes} }}
  let found = search(best, place, ids.thread);
  if (ids.thread == 0u) {{ partial[flat] = vec2<u32>(keys[0], found); }}
}}
"""
    second = f"""{header}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= {rows.count_text}) {{ return; }}
  var best = 0u;
  var place = 0xffffffffu;
  for (var j = ids.thread; j < {parts}u; j += {threads}u) {{
    let k = partial[row * {parts}u + j].x;
    let i = partial[row * {parts}u + j].y;
    {take}
  }}
  let found = search(best, place, ids.thread);
  {finish}
}}
"""
    partial = Binding("partial", 2, "vec2<u32>")
    counted = rows.count
    many = (lambda dims: counted(dims) * parts) if callable(counted) else counted * parts
    nbytes = (lambda dims: counted(dims) * parts * 8) if callable(counted) else prod((counted, parts, 8))
    assert outer is not None
    return GpuKernel(
        (
            Dispatch(first, (x.binding, partial), wgsl.grid(many)),
            Dispatch(second, (partial, out.binding), wgsl.grid(rows.count)),
        ),
        scratch=(nbytes,),
    )


def _flat_place(row: str) -> str:
    return row
