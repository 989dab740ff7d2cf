"""16-bit floats to and from f32 with integer operations: bf16 everywhere, f16 on targets without conversion
instructions.

All work on scalars and vectors. Rounding is to nearest even; a NaN stays a (quiet) NaN; subnormals are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.ssa import Value

if TYPE_CHECKING:
    from kernelforge_cpu.arithmetic import Arithmetic


def from_bf16(k: Arithmetic, a: Value) -> Value:
    """bf16 is the upper half of an f32."""
    wide = k.convert(k.bitcast(a, a.type.of("i16")), "i32", unsigned=True)
    return k.bitcast(wide << 16, a.type.of("f32"))


def to_bf16(k: Arithmetic, a: Value) -> Value:
    bits = k.bitcast(a, a.type.of("i32"))
    upper = k.shift_right_logical(bits, 16)
    rounded = k.shift_right_logical(bits + (upper & 1) + 0x7FFF, 16)
    chosen = k.select(a.ne(a), upper | 0x40, rounded)
    return k.bitcast(k.convert(chosen, "i16"), a.type.of("bf16"))


def from_f16(k: Arithmetic, a: Value) -> Value:
    """Moves exponent and mantissa into place and multiplies by 2^112, which also normalises subnormals."""
    bits = k.convert(k.bitcast(a, a.type.of("i16")), "i32", unsigned=True)
    magnitude = (bits & 0x7FFF) << 13
    scaled = k.bitcast(k.bitcast(magnitude, a.type.of("f32")) * 2.0**112, a.type.of("i32"))
    special = magnitude | 0x7F800000
    chosen = k.select(magnitude.ge(0x7C00 << 13), special, scaled)
    return k.bitcast(chosen | ((bits & 0x8000) << 16), a.type.of("f32"))


def to_f16(k: Arithmetic, a: Value) -> Value:
    """Normal results round in the integer domain; subnormal ones by adding 0.5, whose last place is f16's smallest
    step (2^-24).
    """
    bits = k.bitcast(a, a.type.of("i32"))
    magnitude = bits & 0x7FFFFFFF
    odd = k.shift_right_logical(magnitude, 13) & 1
    normal = k.shift_right_logical(magnitude - (112 << 23) + 0xFFF + odd, 13)
    subnormal = k.bitcast(k.bitcast(magnitude, a.type.of("f32")) + 0.5, a.type.of("i32")) - 0x3F000000
    finite = k.select(magnitude.lt(113 << 23), subnormal, normal)
    special = k.select(magnitude.gt(0x7F800000), k.value(0x7E00, magnitude.type), k.value(0x7C00, magnitude.type))
    chosen = k.select(magnitude.ge(143 << 23), special, finite)
    sign = k.shift_right_logical(bits, 16) & 0x8000
    return k.bitcast(k.convert(chosen | sign, "i16"), a.type.of("f16"))
