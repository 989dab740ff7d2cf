"""Attention of few queries over many keys: workgroups share the keys, a second dispatch merges what they found.

A workgroup takes one chunk of keys for all query heads of a group, a key a thread; then its threads turn to the elements of the
values. Each leaves a maximum, a sum and an unscaled result (Flash-Decoding, Dao et al. 2023). Where one chunk is all that a
query sees, its workgroup divides, and nothing is merged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, ConfigSpace, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.kernel import Below, Binding, Dispatch, GpuKernel
from kernelforge_metal.kernels.attention import Attention
from kernelforge_metal.kernels.attention_tile import takes_quads
from kernelforge_metal.kernels.norms import FUNCTIONS
from kernelforge_metal.kernels.quantised_cache import RUN, RUN_WORDS, run_quad, run_words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

MAX_TOKENS = 8
MAX_REPEAT = 16
"""Query heads of a group: each has a register of every thread."""
UNROLLED = 4
"""Partial results, and keys and values that were not asked for early, whose loads are under way at once."""


def takes_split(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_quads(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    a = Attention(problem, device)
    tokens = a.tokens[-1]
    if len(a.tokens) > 1 or isinstance(tokens, str) or not 0 < tokens <= MAX_TOKENS:
        return Reject(f"takes 1 to {MAX_TOKENS} tokens, not {list(a.tokens)}")
    if isinstance(a.capacity, str) or a.capacity == 0:
        return Reject("takes a number of keys that is known when it is built")
    if a.groups == 0 or a.heads // a.groups > MAX_REPEAT:
        return Reject(f"takes up to {MAX_REPEAT} query heads a group, not {a.heads} heads in {a.groups} groups")
    return Accept()


def split_space(problem: Problem, device: DeviceInfo, more: int = 0) -> ConfigSpace:
    """`chunk`: keys, and threads, of a workgroup; `early`: vectors of keys and of values that a thread asks for before anything
    else, as a step waits for memory, not for arithmetic. `more`: bytes of workgroup memory that a kernel needs besides."""
    a = Attention(problem, device)
    repeat, size = a.heads // max(1, a.groups), a.size
    storage = device.limit("max-compute-workgroup-storage-size", 16384)
    threads = device.limit("max-compute-invocations-per-workgroup", 256)

    def fits(config: Config) -> bool:
        chunk = int(config["chunk"])
        quads = -(-repeat // 4)
        used = more + 4 * repeat * size + 4 * repeat * chunk + 32 * chunk * quads + 16 * chunk * repeat
        return used <= storage and chunk <= threads and chunk >= size // 4

    return ConfigSpace(
        (("chunk", (128, 64, 256, 32)), ("early", (16, 1))),
        (("the chunk does not fit workgroup memory or threads", fits),),
    )


def split_default(problem: Problem, device: DeviceInfo) -> Config:
    return default_chunk(split_space(problem, device), device)


def default_chunk(space: ConfigSpace, device: DeviceInfo) -> Config:
    """The first config; on a processor, which compiles what it runs, the one that has loops in place of a long text."""
    first = next(iter(space))
    return {**first, "early": 1} if SOFTWARE in device.features else first


@dataclass(frozen=True)
class NewRow:
    """A key and a value that are not in the caches yet: the workgroup whose chunk they belong to has them in workgroup memory,
    and writes them where they belong when it has read all that it reads. WGSL."""

    functions: str
    query: str
    """An expression, of head `head`: quad `d` of the query."""
    find: str
    """Statements: whether the new row is `here`, in the chunk that has `many` keys from `begin` on, and how many are `old`."""
    load: str
    """Statements for one thread of all: fill `fresh`, the quads of the key and then those of the value."""
    then: str
    """Statements for one thread of all, after those of `load` for all threads."""
    store: str
    """Statements for one thread of all."""


def build_split(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return split_kernel(Attention(problem, device), config)


def split_kernel(a: Attention, config: Config, new: NewRow | None = None) -> GpuKernel:
    """`new`: of the only token."""
    problem, device = a.problem, a.device
    chunk, most, size, tokens = int(config["chunk"]), int(config["early"]), a.size, a.tokens[0]
    unrolled = min(UNROLLED, most)
    # A window bounds what a query sees on one side; the other end is its own position only if attention is causal.
    capacity, window = a.capacity, int(a.number("window")) if problem.attr("causal") else 0
    assert isinstance(capacity, int)
    assert isinstance(tokens, int)
    repeat, quads = a.heads // a.groups, size // 4
    chunks = -(-(min(capacity, window) if window else capacity) // chunk)
    lanes = chunk // quads
    """Threads that share an element of the values."""
    q, k, v, out = (a.tensors[n] for n in ("q", "k", "v", "out"))
    fours = range(-(-repeat // 4))
    subgroups = wgsl.SUBGROUP in device.features
    functions = "".join(
        wgsl.reduction(name, operator, chunk, subgroups=subgroups, element="vec4<f32>")
        for name, operator in (("largest", "max"), ("add_up", "add"))
    )

    def head(r: int) -> str:
        return f"{r // 4}.{'xyzw'[r % 4]}"

    depth = next(n for n in (16, 8, 4, 2, 1) if n <= most and quads % n == 0)
    early = range(min(most, -(-chunk // lanes)))
    """Of the values."""
    scores = " ".join(f"s{head(r)} = {a.score(f's{head(r)}')};" for r in range(repeat))
    spread = " ".join(f"weights[{r * chunk}u + ids.thread] = w{head(r)};" for r in range(repeat))
    own = [f"j + {n * lanes}u" for n in range(unrolled)]

    def products(places: Iterable[str], numbers: Iterable[str]) -> str:
        """Of the keys that are seen: what another one has may be infinite."""
        return " ".join(
            f"o{r} += select(vec4<f32>(), weights[{r * chunk}u + min({j}, {chunk - 1}u)] * {number}, {j} < old);"
            for j, number in zip(places, numbers, strict=True)
            for r in range(repeat)
        )

    keep = " ".join(f"partial[({r}u * {lanes}u + lane) * {quads}u + d] = o{r};" for r in range(repeat))
    parts = [f"partial[(r * {lanes}u + {n}) * {quads}u + d]" for n in ("n", *(f"{n}u" for n in range(lanes)))]
    summed = f"let acc = {' + '.join(parts[1:])};"
    if most == 1:
        summed = f"var acc = vec4<f32>(); for (var n = 0u; n < {lanes}u; n++) {{ acc += {parts[0]}; }}"
    load_q = wgsl.load_quad("q", q.type.dtype, f"({q.at} + {a.query_place('q', 'token', 'head')}) / 4u + d")

    runs = k.type.dtype == "q8" and 4 * depth == RUN
    """Whether a thread reads its key as whole words: each once."""
    step = "d + " if depth < quads else ""

    def key(n: int) -> str:
        """Quad `n` of a thread's key, of `depth` that it has in registers."""
        found = wgsl.quad_numbers(run_quad(n) if runs else f"k{n}", k.type.dtype)
        return found if new is None else f"select({found}, fresh[{step}{n}u], ids.thread == old && here)"

    # Threads past the last key seen read that one again: those behind it may be anything.
    keys = " ".join(f"let k{n} = {wgsl.quad('k', k.type.dtype, f'keys_at + {step}{n}u')};" for n in range(depth))
    if runs:
        keys = run_words("k", f"({step}keys_at)")
    dots = " ".join(
        f"s{head(r)} += dot(query[{step}{r * quads + n}u], {key(n)});" for n in range(depth) for r in range(repeat)
    )
    if depth < quads:
        keys, dots = "", f"for (var d = 0u; d < {quads}u; d += {depth}u) {{ {keys} {dots} }}"

    places = ""
    if whole_words := v.type.dtype == "q8" and size % RUN == 0:
        places = " let values_place = q8_place(values_at);"

    def value(j: str) -> str:
        if whole_words:  # from row to row by whole words
            return f"v_at(values_place, min({j}, last) * {a.key_stride('v') // RUN * RUN_WORDS}u)"
        return wgsl.quad("v", v.type.dtype, f"values_at + min({j}, last) * {a.key_stride('v') // 4}u")

    first_values = [f"(lane + {n * lanes}u)" for n in early]
    first_products = products(first_values, [wgsl.quad_numbers(f"v{n}", v.type.dtype) for n in early])
    other_products = ""
    if len(early) * lanes < chunk:
        numbers = [wgsl.quad_numbers(f"v{n}", v.type.dtype) for n in range(unrolled)]
        other_products = (
            f"for (var j = lane + {len(early) * lanes}u; j < old; j += {unrolled * lanes}u) {{ "
            + " ".join(f"let v{n} = {value(j)};" for n, j in enumerate(own))
            + f" {products([f'({j})' for j in own], numbers)} }}"
        )
    stores = " ".join(
        out.store(f"to + d * 4u + {c}u", f"select(0.0, acc.{'xyzw'[c]} / total, total > 0.0 || is_nan(total))")
        for c in range(4)
    )
    ids = wgsl.SUBGROUP_IDS if subgroups else wgsl.IDS
    find, load_new, then, store_new, more_functions, new_value = "let old = many;", "", "", "", "", ""
    if new is not None:
        load_q, find, load_new, then, store_new = new.query, new.find, new.load, new.then, new.store
        more_functions = f"{new.functions}\nvar<workgroup> fresh: array<vec4<f32>, {2 * quads}>;"
        sums = " ".join(f"o{r} += weights[{r * chunk}u + old] * fresh[{quads}u + d];" for r in range(repeat))
        new_value = f"if (here && lane == 0u) {{ {sums} }}"
    first = f"""{ids}{wgsl.HALVES}{FUNCTIONS}{functions}{a.functions}{a.readers}{more_functions}
var<workgroup> query: array<vec4<f32>, {repeat * quads}>;
var<workgroup> weights: array<f32, {repeat * chunk}>;
var<workgroup> partial: array<vec4<f32>, {lanes * quads * repeat}>;
@compute @workgroup_size({chunk})
fn main(ids: Ids) {{
  let token = ids.group.z;
  let group = ids.group.y;
  let seen = see(token);
  let begin = seen.start + ids.group.x * {chunk}u;
  if (begin >= seen.end && ids.group.x > 0u) {{ return; }}
  let many = min({chunk}u, seen.end - begin);
  {find}
  let last = max(old, 1u) - 1u;
  let start = select(0u, begin, old > 0u);
  let lane = ids.thread / {quads}u;
  let d = ids.thread % {quads}u;
  let key = start + min(ids.thread, last);
  let keys_at = ({k.at} + {a.key_place("k", "group")} + key * {a.key_stride("k")}u) / 4u;
  let values_at = ({v.at} + {a.key_place("v", "group")} + start * {a.key_stride("v")}u) / 4u + d;{places}
  {keys}
  {" ".join(f"let v{n} = {value(j)};" for n, j in enumerate(first_values))}
  for (var i = ids.thread; i < {repeat * quads}u; i += {chunk}u) {{
    let head = group * {repeat}u + i / {quads}u;
    let d = i % {quads}u;
    query[i] = {load_q};
  }}
  {load_new}
  workgroupBarrier();{then}
  let inside = ids.thread < many;
  {" ".join(f"var s{n} = vec4<f32>(-3.0e38);" for n in fours)}
  if (inside) {{
    {" ".join(f"s{n} = vec4<f32>();" for n in fours)}
    {dots}
    {scores}
  }}
  {" ".join(f"let top{n} = max(largest(s{n}, ids), vec4<f32>(-3.0e38));" for n in fours)}
  {" ".join(f"let w{n} = select(vec4<f32>(), exp(s{n} - top{n}), inside);" for n in fours)}
  {" ".join(f"let total{n} = add_up(w{n}, ids);" for n in fours)}
  {spread}
  workgroupBarrier();
  {" ".join(f"var o{r} = vec4<f32>();" for r in range(repeat))}
  {first_products}
  {other_products}
  {new_value}
  if (lane < {lanes}u) {{ {keep} }}
  workgroupBarrier();
  let place = (token * {a.heads}u + group * {repeat}u) * {chunks}u + ids.group.x;
  let tops = array<vec4<f32>, {len(fours)}>({", ".join(f"top{n}" for n in fours)});
  let totals = array<vec4<f32>, {len(fours)}>({", ".join(f"total{n}" for n in fours)});
  for (var i = ids.thread; i < {repeat * quads}u; i += {chunk}u) {{
    let r = i / {quads}u;
    let d = i % {quads}u;
    let total = totals[r / 4u][r % 4u];
    {summed}
    if (seen.end - seen.start <= {chunk}u) {{
      let head = group * {repeat}u + r;
      let to = {a.query_place("out", "token", "head")};
      {stores}
    }} else {{
      let at = (place + r * {chunks}u) * {quads + 1}u;
      found[at + d] = acc;
      if (d == 0u) {{ found[at + {quads}u] = vec4<f32>(tops[r / 4u][r % 4u], total, 0.0, 0.0); }}
    }}
  }}
  {store_new}
}}
"""
    merged = " ".join(
        f"if (c + {n}u < many) {{ let w = exp(part{n}.x - top); total += w * part{n}.y; acc += w * sum{n}; }}"
        for n in range(unrolled)
    )
    threads = 1 << max(5, (quads - 1).bit_length())
    second = f"""{wgsl.IDS}{wgsl.HALVES}{FUNCTIONS}{a.functions}
@compute @workgroup_size({threads})
fn main(ids: Ids) {{
  let token = ids.group.y;
  let head = ids.group.x;
  let seen = see(token);
  let d = ids.thread;
  let many = (seen.end - seen.start + {chunk - 1}u) / {chunk}u;
  if (d >= {quads}u || many <= 1u) {{ return; }}
  let place = (token * {a.heads}u + head) * {chunks}u;
  var top = -3.0e38;
  for (var c = 0u; c < many; c += {unrolled}u) {{
    {" ".join(f"top = max(top, found[(place + min(c + {n}u, many - 1u)) * {quads + 1}u + {quads}u].x);" for n in range(unrolled))}
  }}
  var total = 0.0;
  var acc = vec4<f32>();
  for (var c = 0u; c < many; c += {unrolled}u) {{
    {" ".join(f"let c{n} = (place + min(c + {n}u, many - 1u)) * {quads + 1}u;" for n in range(unrolled))}
    {" ".join(f"let part{n} = found[c{n} + {quads}u]; let sum{n} = found[c{n} + d];" for n in range(unrolled))}
    {merged}
  }}
  let to = {a.query_place("out", "token", "head")};
  {stores}
}}
"""
    scalars = [t.binding for name, t in a.tensors.items() if name in ("positions", "slots", "lengths")]
    vectors = [Binding(t.name, t.index, wgsl.quad_element(t.type.dtype)) for t in (q, k, v)]
    found = Binding("found", len(problem.operands) + 1, "vec4<f32>")
    bindings = (*vectors, *scalars, found, out.binding)
    nbytes = 16 * tokens * a.heads * chunks * (quads + 1)
    whole = Dispatch(first, bindings, (1, a.groups, tokens))
    if chunks == 1:
        return GpuKernel((whole,), scratch=(nbytes,))
    # A causal query sees no more keys than its position says.
    short = Below(3, chunk) if a.cached and problem.attr("causal") else None
    shared = Dispatch(first, bindings, (chunks, a.groups, tokens), unless=short)
    merge = Dispatch(second, (found, *scalars, out.binding), (a.heads, tokens, 1), unless=short)
    only = () if short is None else (replace(whole, only=short),)
    return GpuKernel((*only, shared, merge), scratch=(nbytes,))
