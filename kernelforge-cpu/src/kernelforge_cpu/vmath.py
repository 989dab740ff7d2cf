"""Elementary functions of f32 vectors (any width) and scalars, as polynomials written into a kernel.

Coefficients are minimax fits (Lawson's algorithm in float64, rounded to f32). Error bounds are against the exact
value, over all f32 inputs unless said otherwise; a NaN gives a NaN. With subnormals on, as the calling threads have
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernelforge_cpu.builder import Builder
from kernelforge_cpu.ssa import Value

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 9 bits: n * _LN2_HIGH is exact for every exponent n, also without FMA
_LN2_LOW = -2.121944400546905827679e-4
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
_EXP = (0.4999999403953552, 0.1666651964187622, 0.041668400168418884, 0.008368851616978645, 0.0013814320554956794)
_TANH = (-0.3333328068256378, 0.1333138346672058, -0.05373399332165718, 0.020618094131350517, -0.005679271183907986)
_ERF = (
    *(0.12837916612625122, -0.3761262595653534, 0.1128358542919159, -0.026853810995817184),
    *(0.005188326351344585, -0.0008010179153643548, 7.853811257518828e-05),
)
_ERFC_LOG = (
    *(1.1284854412078857, 0.63581383228302, 0.10513849556446075),
    *(-0.02281230501830578, 0.0031911288388073444, -0.00021113624097779393),
)

TURNS_LIMIT = 8192.0
"""Largest size of an argument of `sin` and `cos`."""
_HALF_PI = (1.5703125, 0.0004839897155761719, -1.6298145055770874e-07, 6.082245818106458e-11, -5.1453114636784356e-14)
"""Sums to pi/2 within 2^-68. All but the last have 11 bits: n times each is exact for all n below 2^13, also without FMA."""
_SIN = (-0.16666655242443085, 0.008332155644893646, -0.00019514633459039032)
_COS = (0.04166664555668831, -0.0013887309469282627, 2.443241646687966e-05)


def _polynomial(k: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's rule, constant term first."""
    value = k.value(coefficients[-1], x.type)
    for c in reversed(coefficients[:-1]):
        value = k.fma(value, x, c)
    return value


def exp(k: Builder, x: Value) -> Value:
    """e^x within 1 ulp (2 ulp without FMA); overflows to inf, goes through subnormals to 0."""
    x = k.max(-104.0, k.min(89.0, x))  # in this order a NaN passes through
    shifted = k.fma(x, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = k.fma(n, -_LN2_LOW, k.fma(n, -_LN2_HIGH, x))
    p = k.fma(r * r, _polynomial(k, r, _EXP), r) + 1.0
    exponent = k.bitcast(shifted, x.type.of("i32")) - 0x4B400000
    half = exponent >> 1  # two factors: 2^n itself is out of range at both ends

    def power(e: Value) -> Value:
        return k.bitcast((e + 127) << 23, x.type)

    return p * power(half) * power(exponent - half)


def exp_decay(k: Builder, x: Value) -> Value:
    """e^x for x <= 0 within 1 ulp (2 ulp without FMA); 0 below -87, where it is less than 2^-125. Cheaper than `exp`."""
    shifted = k.fma(x, _LOG2_E, _ROUND + 127.0)
    n = shifted - (_ROUND + 127.0)
    r = k.fma(n, -_LN2_LOW, k.fma(n, -_LN2_HIGH, x))
    p = k.fma(r * r, _polynomial(k, r, _EXP), r) + 1.0
    power = k.bitcast(k.bitcast(shifted, x.type.of("i32")) << 23, x.type)
    return k.select(x.lt(-87.0), 0.0, p * power)


def sigmoid(k: Builder, x: Value) -> Value:
    """1 / (1 + e^-x) within 3 ulp; results below the normal range are 0."""
    return 1.0 / (exp(k, -x) + 1.0)


def silu(k: Builder, x: Value) -> Value:
    """x * sigmoid(x) within 3 ulp; -0 below -88.7 (exactly: less than 3e-37 in size), NaN for -inf, as the formula."""
    return x / (exp(k, -x) + 1.0)


def tanh(k: Builder, x: Value) -> Value:
    """Within 3 ulp; exact signs of zero."""
    t = k.abs(x)
    s = t * t
    near = k.fma(t * s, _polynomial(k, s, _TANH), t)
    far = 1.0 - 2.0 / (exp(k, t * 2.0) + 1.0)
    return _with_sign(k, k.select(t.lt(0.625), near, far), x)


def erf(k: Builder, x: Value) -> Value:
    """Within 2 ulp; exact signs of zero. Near 0 an odd polynomial, from 1 on 1 - e^(-t q(t)) with t = |x|."""
    s, t = x * x, k.min(4.0, k.abs(x))
    near = k.fma(x, _polynomial(k, s, _ERF), x)
    far = 1.0 - exp(k, -(t * _polynomial(k, t, _ERFC_LOG)))
    return k.select(k.abs(x).lt(1.0), near, _with_sign(k, far, x))


def sin(k: Builder, x: Value) -> Value:
    """Within 3 ulp for |x| <= 8192, NaN beyond; exact signs of zero."""
    t = k.abs(x)
    quarter, r = _quarter_turns(k, t)
    return _with_sign(k, k.select(t.le(TURNS_LIMIT), _rotated(k, r, quarter), math.nan), x)


def cos(k: Builder, x: Value) -> Value:
    """Within 3 ulp for |x| <= 8192, NaN beyond."""
    t = k.abs(x)
    quarter, r = _quarter_turns(k, t)
    return k.select(t.le(TURNS_LIMIT), _rotated(k, r, quarter + 1), math.nan)


def _quarter_turns(k: Builder, t: Value) -> tuple[Value, Value]:
    """The nearest number of quarter turns (i32, right in its last two bits) and what is left, at most about pi/4.

    Reduction by parts of pi/2 that leave no rounding error until the end (Cody and Waite, "Software Manual for the
    Elementary Functions", 1980).
    """
    shifted = k.fma(t, 2.0 / math.pi, _ROUND)
    n = shifted - _ROUND
    for part in _HALF_PI:
        t = k.fma(n, -part, t)
    return k.bitcast(shifted, t.type.of("i32")), t


def _rotated(k: Builder, r: Value, quarter: Value) -> Value:
    """sin(r + quarter * pi/2) for |r| up to about pi/4."""
    s = r * r
    sine = k.fma(r * s, _polynomial(k, s, _SIN), r)
    cosine = k.fma(s * s, _polynomial(k, s, _COS), k.fma(s, -0.5, 1.0))
    value = k.select((quarter & 1).eq(0), sine, cosine)
    return k.bitcast(k.bitcast(value, quarter.type) ^ ((quarter & 2) << 30), value.type)


def _with_sign(k: Builder, value: Value, sign: Value) -> Value:
    """`value`, negated where `sign` has its sign bit set."""
    bits = k.bitcast(sign, sign.type.of("i32")) & -0x80000000
    return k.bitcast(k.bitcast(value, bits.type) ^ bits, value.type)
