"""Rows of lhs as integers, for products with quantised weights by `dot4I8Packed`.

The numbers that a thread multiplies by one unit of weights become v = round(x / s), |v| <= 2^21, with s a power of two of their
own: each is off by 2^-21 of the largest at most, of the size of what rounding does to f32 sums. v is written in base 256 with
digits from -128 to 127: three dot products of bytes make its product with weights of 8 or 4 bits, exactly.

Digits come without conversions: adding 2^23 + 0x408080 puts v + 0x408080 into the fraction of the f32, whose bytes are the digits
plus 128 (plus 64 for the first), and so the addition rounds.

NaN and infinity have no digits, and numbers below 2^-106 would need a scale that f32 does not have: where a unit has the
former, or none but the latter, both count as zeros here, and `Digits.odd` says that there were some.
"""

from __future__ import annotations

INTEGERS = """
const EVEN = 0x00ff00ffu;
const SIGNS = 0x80808080u;
const INFINITE = 0x7f800000u;
const TINY = 0x0a800000u;
const PLACE = 12615808.0;

fn odd_unit(largest: u32) -> bool { return largest >= INFINITE || (largest < TINY && largest > 0u); }

fn odd_number(x: f32) -> bool {
  let bits = bitcast<u32>(x) & 0x7fffffffu;
  return bits >= INFINITE || bits < TINY;
}

fn plain(x: vec4<f32>) -> vec4<f32> {
  return select(x, vec4<f32>(), vec4<bool>(odd_number(x.x), odd_number(x.y), odd_number(x.z), odd_number(x.w)));
}

fn digits(placed: vec4<u32>) -> vec3<u32> {
  let low = (placed.xy & vec2<u32>(0xffffu)) | (placed.zw << vec2<u32>(16u));
  let high = (placed.xy >> vec2<u32>(16u)) | (placed.zw & vec2<u32>(0xffff0000u));
  return vec3<u32>(
    (((high.x & EVEN) | ((high.y & EVEN) << 8u)) + 0x40404040u) ^ SIGNS,
    (((low.x >> 8u) & EVEN) | (low.y & ~EVEN)) ^ SIGNS,
    ((low.x & EVEN) | ((low.y & EVEN) << 8u)) ^ SIGNS,
  );
}
"""
"""`digits`: the first, second and third digits of four numbers, four to a word."""

UNIT = {
    "q8": """
struct Digits { high: u32, middle: u32, low: u32, scale: f32, odd: bool }

fn integers(x: vec4<f32>) -> Digits {
  var v = x;
  var most = largest_bits(x);
  let odd = odd_unit(most);
  if (odd) { v = plain(x); most = largest_bits(v); }
  let e = most & INFINITE;
  let factor = vec4<f32>(bitcast<f32>(0x89000000u - e));
  let d = digits(bitcast<vec4<u32>>(fma(v, factor, vec4<f32>(PLACE))));
  return Digits(d.x, d.y, d.z, bitcast<f32>(e - 0x0a000000u), odd);
}

fn product(d: Digits, word: u32) -> f32 {
  let high = dot4I8Packed(word, d.high);
  let middle = dot4I8Packed(word, d.middle);
  return f32((((high << 8u) + middle) << 8u) + dot4I8Packed(word, d.low)) * d.scale;
}
""",
    "q4": """
struct Digits { high: vec2<u32>, middle: vec2<u32>, low: vec2<u32>, eights: i32, scale: f32, odd: bool }

fn integers(x: vec4<f32>, y: vec4<f32>) -> Digits {
  var v = x;
  var w = y;
  var most = max(largest_bits(x), largest_bits(y));
  let odd = odd_unit(most);
  if (odd) { v = plain(x); w = plain(y); most = max(largest_bits(v), largest_bits(w)); }
  let e = most & INFINITE;
  let factor = vec4<f32>(bitcast<f32>(0x89000000u - e));
  let first = bitcast<vec4<u32>>(fma(v, factor, vec4<f32>(PLACE)));
  let last = bitcast<vec4<u32>>(fma(w, factor, vec4<f32>(PLACE)));
  let a = digits(first);
  let b = digits(last);
  let sums = first + last;
  let eights = bitcast<i32>((0x5a040400u - (sums.x + sums.y + sums.z + sums.w)) << 3u);
  return Digits(
    vec2<u32>(a.x, b.x), vec2<u32>(a.y, b.y), vec2<u32>(a.z, b.z), eights, bitcast<f32>(e - 0x0a000000u), odd
  );
}

fn product(d: Digits, word: u32) -> f32 {
  let a = word & 0x0f0f0f0fu;
  let b = (word >> 4u) & 0x0f0f0f0fu;
  let high = dot4I8Packed(a, d.high.x) + dot4I8Packed(b, d.high.y);
  let middle = dot4I8Packed(a, d.middle.x) + dot4I8Packed(b, d.middle.y);
  let low = d.eights + dot4I8Packed(a, d.low.x) + dot4I8Packed(b, d.low.y);
  return f32((((high << 8u) + middle) << 8u) + low) * d.scale;
}
""",
}
"""`integers`: the numbers of a unit; `product`: the sum of their products with a column's word, without the column's scale. The
sums of q4 take off eight times v, as its weights are stored plus 8."""
