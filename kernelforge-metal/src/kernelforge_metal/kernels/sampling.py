"""sample: a token from each row of logits, without sorting them.

What top-k and top-p keep are the logits above a threshold, and the first few of those equal to it. Thresholds are found in the
logits' bits, ordered as numbers are, eight at a time: every workgroup tallies a part of the row, for each value of the next
eight bits how many logits have it and what their probabilities sum to, and from the whole tally all of them tell which value
the threshold has (radix selection). Top-k takes four tallies, top-p three more; the first is of both. Then the probabilities
that are left are summed up part by part, and one workgroup finds the part, and in it the token, that the given number falls on.

Probabilities, relative to the largest, are summed in 64-bit fixed point (two words, 2^-44 a unit): sums are the same in any
order, so that devices differ by the rounding of `exp` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import Reject
from kernelforge_metal import wgsl
from kernelforge_metal.kernel import Binding, Dispatch, GpuKernel, Size
from kernelforge_metal.kernels.lookup import KEY
from kernelforge_metal.kernels.sampling_text import NUMBERS, SEARCH, SIDE, STATE, TAKE, THREADS
from kernelforge_metal.kernels.tensors import count, takes, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict

EACH = 8
"""Consecutive logits of a thread."""
PART = THREADS * EACH
MOST = THREADS * PART
"""Logits of a row: as many parts as a workgroup has threads."""

TALLIES = 7
LEVELS = TALLIES + 1
"""Dispatches between the first and the last: one a tally, and one for the sums."""
STATE_WORDS = 20


def takes_sample(problem: Problem, device: DeviceInfo) -> Verdict:
    logits = problem.operand(0)
    size = logits.shape[1]
    if logits.dtype != "f32":
        return Reject(f"takes f32 logits, as decoders give them, not {logits.dtype}")
    if not isinstance(size, int):
        return Reject("takes a number of logits that is known when it is built")
    if size > MOST:
        return Reject(f"takes at most {MOST} logits, not {size}")
    return takes(problem, device)


def build_sample(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    names = ("logits", "temperature", "top_k", "top_p", "min_p", "drawn", "out")
    logits, *choices, uniform, out = (tensor(problem, i, name, device) for i, name in enumerate(names))
    rows, size = problem.operand(0).shape
    assert isinstance(size, int)
    parts = -(-size // PART)
    temperature, top_k, top_p, min_p, drawn = (
        t.load(f"row * {t.type.element_strides()[0]}u") for t in (*choices, uniform)
    )
    row_step, step = logits.type.element_strides()
    value = logits.load(f"row * p.stride + i * {step}u")
    begin = f"""
  let flat = {wgsl.FLAT};
  let row = flat / p.parts;
  let part = flat % p.parts;
  if (row >= p.rows) {{ return; }}
  let end = min((part + 1u) * {PART}u, p.size);
"""
    each = f"for (var i = part * {PART}u + ids.thread; i < end; i += {THREADS}u)"
    header = f"{wgsl.IDS}{KEY}{STATE}"
    largest = f"""{header}{SEARCH}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{{begin}
  for (var i = part * {THREADS}u + ids.thread; i < {TALLIES * 768}u; i += p.parts * {THREADS}u) {{
    atomicStore(&tallies[row * {TALLIES * 768}u + i], 0u);
  }}
  var best = 0u;
  var place = 0xffffffffu;
  {each} {{ let k = key({value}); {TAKE} }}
  search(best, place, ids.thread);
  if (ids.thread == 0u) {{ parts[flat * 2u] = vec4<u32>(keys[0], places[0], 0u, 0u); }}
  if (ids.thread == 0u && part == 0u) {{
    var state = State();
    state.temperature = {temperature};
    state.k = u32(max({top_k}, 0));
    state.greedy = select(1u, 0u, state.temperature >= 1e-30 && state.k != 1u);
    if (state.k >= p.size) {{ state.k = 0u; }}
    let nucleus = {top_p};
    if (nucleus < 1.0) {{ state.p = max(u32(max(nucleus, 0.0) * 4294967296.0), 1u); }}
    state.min_p = {min_p};
    states[row * {LEVELS + 1}u] = state;
  }}
}}
"""
    narrow = f"""{header}{NUMBERS}{SEARCH}
var<workgroup> lows: array<atomic<u32>, 256>;
var<workgroup> highs: array<atomic<u32>, 256>;
var<workgroup> counts: array<atomic<u32>, 256>;
var<private> state: State;
var<private> row: u32;

fn load_tally(slot: u32, bin: u32) -> vec3<u32> {{
  let at = (row * {TALLIES}u + slot) * 768u + bin;
  return vec3<u32>(atomicLoad(&tallies[at]), atomicLoad(&tallies[at + 256u]), atomicLoad(&tallies[at + 512u]));
}}
fn narrow(level: u32, thread: u32) {{
  // Of k on levels 1 to 4, of p on those from 4; the whole of what top-k keeps is summed between the two.
  for (var round = select(0u, 2u, level > 4u); round < select(1u, 3u, level >= 4u); round++) {{
    let slot = select(level - 1u, 0u, level == 4u && round > 0u);
    let bin = load_tally(slot, 255u - thread);
    scan(bin, thread);
    let here = before(thread);
    let of_k = state.k_count + here.z < state.k;
    let of_p = less(add(state.p_sum, here.xy), state.goal);
    let found = last(bin.z > 0u && select(of_p, of_k, round == 0u), thread);
    let above = before(found);
    if (round == 0u && state.k > 0u) {{
      state.k_bits = (state.k_bits << 8u) | (255u - found);
      state.k_count += above.z;
      state.k_sum = add(state.k_sum, above.xy);
    }}
    if (round == 1u) {{ set_goal(sums[{THREADS - 1}].xy); }}
    if (round == 2u && state.p > 0u) {{
      state.p_bits = (state.p_bits << 8u) | (255u - found);
      state.p_sum = add(state.p_sum, above.xy);
    }}
  }}
}}
fn set_goal(whole: vec2<u32>) {{
  var total = whole;
  if (state.k > 0u) {{
    let tie = fixed(weight(number(state.k_bits), state));
    total = add(state.k_sum, times(tie, state.k - state.k_count));
  }}
  state.goal = share(total, state.p);
  if (less(state.goal, vec2<u32>(1u, 0u))) {{ state.goal = vec2<u32>(1u, 0u); }}
}}
fn set_threshold() {{
  if (state.p > 0u) {{
    state.threshold = state.p_bits;
    let tie = fixed(weight(number(state.p_bits), state));
    let rest = minus(state.goal, state.p_sum);
    for (var bit = {MOST // 2}u; bit > 0u; bit >>= 1u) {{
      if (less(times(tie, state.ties | bit), rest)) {{ state.ties |= bit; }}
    }}
    state.ties += 1u;
  }} else if (state.k > 0u) {{
    state.threshold = state.k_bits;
    state.ties = state.k - state.k_count;
  }}
  let w = weight(number(state.threshold), state);
  if (w >= state.min_p) {{ state.tie = fixed(w); }}
}}

@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{{begin.replace("let row =", "row =")}
  state = states[row * {LEVELS + 1}u + p.level];
  if (p.level == 0u) {{
    var best = 0u;
    var place = 0xffffffffu;
    if (ids.thread < p.parts) {{
      best = parts[(row * p.parts + ids.thread) * 2u].x;
      place = parts[(row * p.parts + ids.thread) * 2u].y;
    }}
    search(best, place, ids.thread);
    state.largest = number(keys[0]);
    state.place = places[0];
    if (keys[0] <= 0x007fffffu || keys[0] >= 0xff800000u) {{ state.greedy = 1u; }}
    if (state.greedy != 0u) {{ state.k = 0u; state.p = 0u; }}
  }}
  if (p.level > 0u) {{ narrow(p.level, ids.thread); }}
  if (p.level == {TALLIES}u) {{ set_threshold(); }}
  if (ids.thread == 0u && part == 0u) {{ states[row * {LEVELS + 1}u + p.level + 1u] = state; }}
  if (p.level == {TALLIES}u) {{
    var sum = vec3<u32>();
    if (state.greedy == 0u) {{
      {each} {{
        let x = {value};
        let k = key(x);
        let w = weight(x, state);
        if (k > state.threshold && w >= state.min_p) {{ sum = vec3<u32>(add(sum.xy, fixed(w)), sum.z); }}
        if (k == state.threshold) {{ sum.z += 1u; }}
      }}
    }}
    scan(sum, ids.thread);
    if (ids.thread == 0u) {{ parts[flat * 2u + 1u] = vec4<u32>(sums[{THREADS - 1}], 0u); }}
    return;
  }}
  atomicStore(&lows[ids.thread], 0u);
  atomicStore(&highs[ids.thread], 0u);
  atomicStore(&counts[ids.thread], 0u);
  workgroupBarrier();
  let of_k = p.level < 4u;
  let shift = 8u * select(6u - p.level, 3u - p.level, of_k);
  let known = select(state.p_bits, state.k_bits, of_k);
  let wanted = select(state.p > 0u, state.k > 0u || (p.level == 0u && state.p > 0u), of_k);
  if (wanted) {{
    {each} {{
      let x = {value};
      let k = key(x);
      if (p.level == 0u || (k >> shift) >> 8u == known) {{
        let bin = (k >> shift) & 255u;
        let mass = fixed(weight(x, state));
        let old = atomicAdd(&lows[bin], mass.x);
        let high = mass.y + select(0u, 1u, old + mass.x < old);
        if (high > 0u) {{ atomicAdd(&highs[bin], high); }}
        atomicAdd(&counts[bin], 1u);
      }}
    }}
  }}
  workgroupBarrier();
  let found = atomicLoad(&counts[ids.thread]);
  if (found > 0u) {{
    let at = (row * {TALLIES}u + p.level) * 768u + ids.thread;
    let low = atomicLoad(&lows[ids.thread]);
    let old = atomicAdd(&tallies[at], low);
    atomicAdd(&tallies[at + 256u], atomicLoad(&highs[ids.thread]) + select(0u, 1u, old + low < old));
    atomicAdd(&tallies[at + 512u], found);
  }}
}}
"""
    place = out.type.element_strides()[0]
    draw = f"""{header}{NUMBERS}
@compute @workgroup_size({THREADS})
fn main(ids: Ids) {{
  let row = {wgsl.FLAT};
  if (row >= p.rows) {{ return; }}
  let state = states[row * {LEVELS + 1}u + {LEVELS}u];
  var part = vec4<u32>();
  if (ids.thread < p.parts) {{ part = parts[(row * p.parts + ids.thread) * 2u + 1u]; }}
  scan(vec3<u32>(0u, 0u, part.z), ids.thread);
  let kept = min(part.z, state.ties - min(state.ties, before(ids.thread).z));
  let mass = add(part.xy, times(state.tie, kept));
  scan(vec3<u32>(mass, part.z), ids.thread);
  let aim = share(sums[{THREADS - 1}].xy, u32(clamp({drawn}, 0.0, 0.99999994) * 4294967296.0));
  let found = last((mass.x | mass.y) > 0u && !less(aim, before(ids.thread).xy), ids.thread);
  let skipped = before(found);
  let rest = minus(aim, skipped.xy);

  let first = found * {PART}u + ids.thread * {EACH}u;
  let end = min(first + {EACH}u, p.size);
  var equal = 0u;
  for (var i = first; i < end; i++) {{ equal += select(0u, 1u, key({value}) == state.threshold); }}
  scan(vec3<u32>(0u, 0u, equal), ids.thread);
  let rank = skipped.z + before(ids.thread).z;
  var own: array<vec2<u32>, {EACH}>;
  var sum = vec2<u32>();
  equal = rank;
  for (var i = first; i < end; i++) {{
    let x = {value};
    let k = key(x);
    let w = weight(x, state);
    var mine = vec2<u32>();
    if (k > state.threshold && w >= state.min_p) {{ mine = fixed(w); }}
    if (k == state.threshold) {{
      if (equal < state.ties) {{ mine = state.tie; }}
      equal += 1u;
    }}
    own[i - first] = mine;
    sum = add(sum, mine);
  }}
  scan(vec3<u32>(sum, 0u), ids.thread);
  let winner = last((sum.x | sum.y) > 0u && !less(rest, before(ids.thread).xy), ids.thread);
  if (ids.thread == winner) {{
    var so_far = before(winner).xy;
    var token = state.place;
    if (state.greedy == 0u) {{
      for (var i = first; i < end; i++) {{
        let mine = own[i - first];
        if ((mine.x | mine.y) > 0u && !less(rest, so_far)) {{ token = i; }}
        so_far = add(so_far, mine);
      }}
    }}
    {out.store(f"row * {place}u", "i32(token)")}
  }}
}}
"""
    rows_count = count(problem, (rows,))
    tallies, states, sums = (
        Binding("tallies", 7, "atomic<u32>"),
        Binding("states", 8, "State"),
        Binding("parts", 9, "vec4<u32>"),
    )
    everywhere = wgsl.grid(scaled(rows_count, parts))
    # Sizes are parameters: rows of all lengths share pipelines. So is SIDE: its loops are not unrolled and compile sooner.
    sizes = (("rows", rows_count), ("size", size), ("parts", parts), ("stride", row_step), ("side", SIDE))
    options = tuple(t.binding for t in choices)
    return GpuKernel(
        (
            Dispatch(largest, (logits.binding, *options, tallies, states, sums), everywhere, sizes),
            *(
                Dispatch(narrow, (logits.binding, tallies, states, sums), everywhere, (*sizes, ("level", level)))
                for level in range(LEVELS)
            ),
            Dispatch(draw, (logits.binding, uniform.binding, states, sums, out.binding), wgsl.grid(rows_count), sizes),
        ),
        scratch=(
            scaled(rows_count, TALLIES * 768 * 4),
            scaled(rows_count, (LEVELS + 1) * STATE_WORDS * 4),
            scaled(rows_count, parts * 2 * 16),
        ),
    )


def scaled(number: Size, factor: int) -> Size:
    """`number`, at least 1, times `factor`: a binding holds at least one element."""
    if callable(number):
        counted: Callable[[Sequence[int]], int] = number
        return lambda dims: max(1, counted(dims)) * factor
    return max(1, number) * factor
