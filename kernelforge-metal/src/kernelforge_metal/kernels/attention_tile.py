"""Attention of many queries: tiles of queries against tiles of keys in workgroup memory, after FlashAttention-2 (Dao 2023).

A thread keeps a row (a query of a head), or a part of its elements, in registers, with the row's running maximum and sum. All
threads of a workgroup read the same key at the same time, so that a tile of keys is read once for all rows and heads of a
group. No row waits for another: there is nothing to add up across threads but the parts of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel, Size
from kernelforge_metal.kernels.attention import Attention, takes_attention
from kernelforge_metal.kernels.norms import FUNCTIONS
from kernelforge_metal.kernels.tensors import count, product_text

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

MAX_HEAD_SIZE = 256
PART = 64
"""Elements of a row that a thread keeps at most: query and result take twice as many registers."""


def takes_quads(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of kernels that read four elements at a time."""
    verdict = takes_attention(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    size = Attention(problem, device).size
    if size % 4 or not 0 < size <= MAX_HEAD_SIZE:
        return Reject(f"takes heads of a multiple of 4 elements up to {MAX_HEAD_SIZE}, not {size}")
    for name, t in zip(("q", "k", "v"), problem.operands, strict=False):
        if t is None or t.dtype == "i32":
            continue
        *outer, last = t.element_strides()
        if last != 1 or any(s % 4 for s in outer):
            return Reject(f"takes rows that start at multiples of 4 elements, not {name} of {t}")
    return Accept()


def parts_of(size: int) -> int:
    """Threads that share a row."""
    parts = -(-size // PART)
    while size % (4 * parts):
        parts += 1
    return parts


def tile_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """`rows` and `keys` of a tile; `at_once`: keys between two corrections of the result."""
    size = Attention(problem, device).size
    parts = parts_of(size)
    storage = device.limit("max-compute-workgroup-storage-size", 16384)
    threads = device.limit("max-compute-invocations-per-workgroup", 256)

    def fits(config: Config) -> bool:
        rows, keys = int(config["rows"]), int(config["keys"])
        used = 8 * keys * size + 12 * rows + (4 * parts * keys * rows if parts > 1 else 0)
        return used <= storage and rows * parts <= threads

    return ConfigSpace(
        (("rows", (64, 32, 128)), ("keys", (16, 32, 8, 4)), ("at_once", (4, 1))),
        (("the tile does not fit workgroup memory or threads", fits),),
    )


def tile_default(problem: Problem, device: DeviceInfo) -> Config:
    """The first config; on a processor, which compiles what it runs, one of a quarter of the text."""
    first = next(iter(tile_space(problem, device)))
    return {**first, "at_once": 1} if SOFTWARE in device.features else first


def build_tile(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    a = Attention(problem, device)
    rows, keys, size = int(config["rows"]), int(config["keys"]), a.size
    parts = parts_of(size)
    threads, quads, own, repeat = rows * parts, size // 4, size // 4 // parts, a.heads // max(1, a.groups)
    tensors = a.tensors
    q, k, v, out = (tensors[n] for n in ("q", "k", "v", "out"))
    at_once = int(config["at_once"])
    registers = range(own)
    queries = "\n  ".join(
        f"q{d} = {_quad(q.name, q.type.dtype, f'({q.at} + from_q) / 4u + first + {d}u')};" for d in registers
    )
    dots = "\n      ".join(
        f"s{j} += dot(q{d}, keys[(j + {j}u) * {quads}u + first + {d}u]);" for j in range(at_once) for d in registers
    )
    sums = " ".join(f"var s{j} = 0.0;" for j in range(at_once))
    finish = "\n      ".join(
        f"let seen{j} = block + j + {j}u >= seen.start && block + j + {j}u < seen.end && taking; "
        f"s{j} = select(-3.0e38, {a.score(f's{j}')}, seen{j});"
        for j in range(at_once)
    )
    higher = "top"
    for j in range(at_once):
        higher = f"max({higher}, s{j})"
    weights = "\n      ".join(f"let w{j} = select(0.0, exp(s{j} - higher), seen{j});" for j in range(at_once))
    total = " + ".join(f"w{j}" for j in range(at_once))
    updates = "\n      ".join(
        f"o{d} = o{d} * shrink"
        + "".join(f" + w{j} * values[(j + {j}u) * {quads}u + first + {d}u]" for j in range(at_once))
        + ";"
        for d in registers
    )
    shrunk = " ".join(f"o{d} *= shrink;" for d in registers)
    # A key that this row does not see may have a value of NaN, which no weight of 0 takes away.
    one_by_one = "\n        ".join(
        f"if (seen{j}) {{ "
        + " ".join(f"o{d} += w{j} * values[(j + {j}u) * {quads}u + first + {d}u];" for d in registers)
        + " }"
        for j in range(at_once)
    )
    all_seen = " && ".join(f"seen{j}" for j in range(at_once))
    stores = "\n  ".join(
        out.store(
            f"to + (first + {d}u) * 4u + {c}u", f"select(0.0, o{d}.{'xyzw'[c]} / total, total > 0.0 || is_nan(total))"
        )
        for d in registers
        for c in range(4)
    )
    if parts == 1:
        exchange, scores = "", f"{sums}\n      {dots}"
    else:
        exchange = f"""
    for (var j = 0u; j < {keys}u; j += {at_once}u) {{
      {sums}
      {dots}
      {" ".join(f"partial[(part * {keys}u + j + {j}u) * {rows}u + row] = s{j};" for j in range(at_once))}
    }}
    workgroupBarrier();"""
        scores = "\n      ".join(
            f"var s{j} = "
            + " + ".join(f"partial[({p}u + j + {j}u) * {rows}u + row]" for p in range(0, parts * keys, keys))
            + ";"
            for j in range(at_once)
        )
    count_text = product_text(problem, (*a.tokens, repeat))
    load_k = _quad(
        k.name, k.type.dtype, f"({k.at} + {a.key_place('k', 'group')} + key * {a.key_stride('k')}u) / 4u + d"
    )
    load_v = _quad(
        v.name, v.type.dtype, f"({v.at} + {a.key_place('v', 'group')} + key * {a.key_stride('v')}u) / 4u + d"
    )
    run = load_k.replace("seen.sequence", "sequence"), load_v.replace("seen.sequence", "sequence")
    shared = "" if parts == 1 else f"var<workgroup> partial: array<f32, {parts * keys * rows}>;\n"
    code = f"""{wgsl.IDS}{wgsl.HALVES}{FUNCTIONS}{a.functions}{a.readers}
var<workgroup> keys: array<vec4<f32>, {keys * quads}>;
var<workgroup> values: array<vec4<f32>, {keys * quads}>;
var<workgroup> ranges: array<vec3<u32>, {rows}>;
{shared}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let row = ids.thread % {rows}u;
  let part = ids.thread / {rows}u;
  let first = part * {own}u;
  let group = ids.group.y;
  let number = ids.group.x * {rows}u + row;
  let token = number / {repeat}u;
  let head = group * {repeat}u + number % {repeat}u;
  let inside = number < {count_text};
  var seen = Seen(0u, 0u, 0u);
  var from_q = 0u;
  var to = 0u;
  {"".join(f"var q{d} = vec4<f32>(); var o{d} = vec4<f32>(); " for d in registers)}
  if (inside) {{
  seen = see(token);
  from_q = {a.query_place("q", "token", "head")};
  to = {a.query_place("out", "token", "head")};
  {queries}
  }}
  if (part == 0u) {{ ranges[row] = vec3<u32>(seen.sequence, seen.start, seen.end); }}
  workgroupBarrier();
  var top = -3.0e38;
  var total = 0.0;
  var next = 0u;
  while (next < {rows}u) {{
    let begin = next;
    let sequence = ranges[begin].x;
    var low = 0xffffffffu;
    var high = 0u;
    while (next < {rows}u) {{
      let range = ranges[next];
      if (range.z > range.y) {{
        if (range.x != sequence) {{ break; }}
        low = min(low, range.y);
        high = max(high, range.z);
      }} else if (begin == next) {{ next++; break; }}
      next++;
    }}
    let taking = row >= begin && row < next;
  for (var block = low; block < high; block += {keys}u) {{
    workgroupBarrier();
    for (var i = ids.thread; i < {keys * quads}u; i += {threads}u) {{
      let key = block + i / {quads}u;
      let d = i % {quads}u;
      if (key < high) {{
        keys[i] = {run[0]};
        values[i] = {run[1]};
      }} else {{
        keys[i] = vec4<f32>();
        values[i] = vec4<f32>();
      }}
    }}
    workgroupBarrier();{exchange}
    for (var j = 0u; j < {keys}u; j += {at_once}u) {{
      {scores}
      {finish}
      let higher = {higher};
      let shrink = exp(top - higher);
      {weights}
      total = total * shrink + {total};
      if ({all_seen}) {{
      {updates}
      }} else {{
        {shrunk}
        {one_by_one}
      }}
      top = higher;
    }}
  }}
  }}
  if (!inside) {{ return; }}
  {stores}
}}
"""
    order: Size = count(problem, (*a.tokens, repeat))
    tiles = wgsl.blocks(order, rows)
    groups = max(1, a.groups)
    grid = (lambda dims: (tiles(dims), groups, 1)) if callable(tiles) else (tiles, groups, 1)
    bindings = [t.binding for name, t in tensors.items() if name not in ("q", "k", "v")]
    vectors = [Binding(t.name, t.index, wgsl.quad_element(t.type.dtype)) for t in (q, k, v)]
    return GpuKernel((Dispatch(code, (*vectors, *bindings), grid),))


def _quad(name: str, dtype: str, index: str) -> str:
    return wgsl.load_quad(name, dtype, index)
