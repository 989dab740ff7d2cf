"""The scale of a group of 32 numbers, with the bits that `kernelforge.quant` gives it."""

from __future__ import annotations

LARGEST = """
fn largest_bits(x: vec4<f32>) -> u32 {
  let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  let most = max(bits.xy, bits.zw);
  return max(most.x, most.y);
}
"""
"""The largest magnitude of four numbers as bits, those of NaN and infinity above all."""

SCALE = (
    LARGEST
    + """
fn group_scale(largest: u32) -> vec2<u32> {
  if (largest < 0x03fe0000u) { return vec2<u32>(); }
  let size = ((largest & 0x7fffffu) | 0x800000u) << 7u;
  var d = size / 127u;
  let rest = size - d * 127u;
  let wide = d >> 24u;
  let up = select(rest > 63u, (d & 1u) == 1u, wide == 1u);
  d = (d >> wide) + select(0u, 1u, up);
  let bits = (((largest >> 23u) - 7u + wide) << 23u) + (d - 0x800000u);
  let divisor = (bits & 0x7fffffu) | 0x800000u;
  var inverse = u32(140737488355328.0 / f32(divisor));
  let off = 0u - inverse * divisor + (divisor << 6u);
  inverse += off / divisor - 64u;
  inverse += select(0u, 1u, 2u * (off % divisor) > divisor);
  return vec2<u32>(bits, ((253u - (bits >> 23u)) << 23u) + (inverse - 0x800000u));
}
"""
)
"""`group_scale`: of the largest of a group, which is finite, the bits of d = largest / 127 and of 1 / d, each rounded once as
f32; zeros where d is subnormal, as it is below 127 * 2^-126.

A GPU's float division does not round so: mantissas are divided as integers. That of d has 24 bits or 25; the last of 25 is
never all that is cut off, so that there are no ties. That of 1 / d, 2^47 / mantissa, is a guess that is off by a few, then mended
by its remainder, of which 32 bits are enough."""
