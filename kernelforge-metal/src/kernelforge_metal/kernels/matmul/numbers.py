"""How packed numbers become f32 in WGSL.

Quantised numbers go through the last bits of floats of a known exponent, which are subtracted again: exact, and cheaper than
conversions from integers where those are slow.
"""

from __future__ import annotations

Q8 = """
fn q8_numbers(word: u32) -> vec4<f32> {
  let even = unpack2x16float((word & 0x00ff00ffu) ^ 0x64806480u);
  let odd = unpack2x16float(((word >> 8u) & 0x00ff00ffu) ^ 0x64806480u);
  return vec4<f32>(even.x, odd.x, even.y, odd.y) - 1152.0;
}
"""
"""The four int8 of a word: the fractions of f16 numbers from 1024 on, their signs turned."""

Q4 = """
fn q4_numbers(word: u32) -> vec2<f32> {
  return unpack2x16float((word & 0x000f000fu) | 0x64006400u) - 1032.0;
}
"""
"""The first nibbles of both halves of a word, less 8."""


def nibble(word: str, i: int) -> str:
    """Nibble `i` of a u32, less 8."""
    return f"(bitcast<f32>((({word} >> {4 * i}u) & 15u) | 0x4b000000u) - 8388616.0)"


def vector_element(dtype: str) -> str:
    """The element of an array whose floats are read four at a time."""
    return "vec4<f32>" if dtype == "f32" else "vec2<u32>"


def floats(value: str, dtype: str) -> str:
    """An element of such an array as a vec4<f32>."""
    if dtype == "f32":
        return value
    two = "unpack2x16float" if dtype == "f16" else "bf16_pair"
    return f"vec4<f32>({two}(({value}).x), {two}(({value}).y))"
