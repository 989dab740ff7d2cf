"""WGSL that the dispatches of `sample` share: the state of a row, sums of 64 bits, the search for the largest logit."""

from __future__ import annotations

SIDE = 16
"""Threads add up so many values each, then one so many sums."""
THREADS = SIDE * SIDE

STATE = """
struct State {
  k_sum: vec2<u32>,      // sum of what is above the threshold of top-k, as far as its bits are known
  p_sum: vec2<u32>,      // the same of top-p
  goal: vec2<u32>,       // sum that top-p has to reach
  tie: vec2<u32>,        // probability of a logit equal to the threshold
  largest: f32,
  place: u32,
  temperature: f32,
  k: u32,                // 0: all
  p: u32,                // of 2^32; 0: all
  min_p: f32,
  k_bits: u32,           // what is known of the threshold, the highest bits first
  k_count: u32,          // how many are above
  p_bits: u32,
  threshold: u32,
  ties: u32,             // how many of those equal to the threshold are kept
  greedy: u32,
}
"""

NUMBERS = f"""
fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {{
  let low = a.x + b.x;
  return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}}
fn minus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {{
  return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}}
fn less(a: vec2<u32>, b: vec2<u32>) -> bool {{ return a.y < b.y || (a.y == b.y && a.x < b.x); }}
fn product(a: u32, b: u32) -> vec2<u32> {{
  let low = (a & 0xffffu) * (b & 0xffffu);
  let first = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let second = (a & 0xffffu) * (b >> 16u) + (first & 0xffffu);
  return vec2<u32>((second << 16u) | (low & 0xffffu), (a >> 16u) * (b >> 16u) + (first >> 16u) + (second >> 16u));
}}
fn times(a: vec2<u32>, b: u32) -> vec2<u32> {{ return product(a.x, b) + vec2<u32>(0u, a.y * b); }}
fn share(a: vec2<u32>, b: u32) -> vec2<u32> {{ return add(vec2<u32>(product(a.x, b).y, 0u), product(a.y, b)); }}

fn weight(x: f32, state: State) -> f32 {{
  let d = (x - state.largest) / state.temperature;
  if (d >= 0.0) {{ return 1.0; }}
  if (d > -40.0) {{ return exp(d); }}
  return 0.0;
}}
fn fixed(w: f32) -> vec2<u32> {{
  let scaled = w * 4096.0;
  let whole = floor(scaled);
  return vec2<u32>(u32((scaled - whole) * 4294967296.0), u32(whole));
}}
fn number(key: u32) -> f32 {{ return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u)); }}

var<workgroup> sums: array<vec3<u32>, {THREADS}>;
var<workgroup> rows_of_sums: array<vec3<u32>, {SIDE}>;
var<workgroup> latest: atomic<u32>;
fn both(a: vec3<u32>, b: vec3<u32>) -> vec3<u32> {{ return vec3<u32>(add(a.xy, b.xy), a.z + b.z); }}
fn before(thread: u32) -> vec3<u32> {{
  if (thread == 0u) {{ return vec3<u32>(); }}
  return sums[thread - 1u];
}}
fn scan(value: vec3<u32>, thread: u32) {{
  workgroupBarrier();
  sums[thread] = value;
  if (thread == 0u) {{ atomicStore(&latest, 0u); }}
  workgroupBarrier();
  let own = thread / {SIDE}u;
  if (thread % {SIDE}u == 0u) {{
    var total = vec3<u32>();
    for (var i = thread; i < thread + p.side; i++) {{ total = both(total, sums[i]); }}
    rows_of_sums[own] = total;
  }}
  workgroupBarrier();
  var total = vec3<u32>();
  for (var i = 0u; i < own; i++) {{ total = both(total, rows_of_sums[i]); }}
  for (var i = own * {SIDE}u; i <= thread; i++) {{ total = both(total, sums[i]); }}
  workgroupBarrier();
  sums[thread] = total;
  workgroupBarrier();
}}
fn last(wanted: bool, thread: u32) -> u32 {{
  if (wanted) {{ atomicMax(&latest, thread); }}
  workgroupBarrier();
  return atomicLoad(&latest);
}}
"""
"""Sums of 64 bits, low word first; probabilities as such numbers; `scan` leaves in `sums` those of all threads up to each, `last`
finds the last thread with something wanted; it may be called once after a scan."""

TAKE = "if (k > best || (k == best && i < place)) { best = k; place = i; }"

SEARCH = f"""
var<workgroup> keys: array<u32, {THREADS}>;
var<workgroup> places: array<u32, {THREADS}>;
fn search(best_key: u32, best_place: u32, thread: u32) {{
  keys[thread] = best_key;
  places[thread] = best_place;
  for (var width = {SIDE}u; width > 0u; width /= {SIDE}u) {{
    workgroupBarrier();
    let step = {SIDE}u / width;
    if (thread % (step * {SIDE}u) == 0u) {{
      var best = keys[thread];
      var place = places[thread];
      for (var j = 1u; j < p.side; j++) {{
        let k = keys[thread + j * step];
        let i = places[thread + j * step];
        {TAKE}
      }}
      keys[thread] = best;
      places[thread] = place;
    }}
  }}
  workgroupBarrier();
}}
"""
