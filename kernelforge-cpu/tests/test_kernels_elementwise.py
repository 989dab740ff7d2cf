"""silu, gelu, add, mul and cast against their references: types, layouts, broadcasting, special values."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import F32, Array, Arrays, Kernels, problem, relative, verdict

from kernelforge.dtype import to_numpy
from kernelforge.problem import Problem
from kernelforge.variant import Reject
from kernelforge_cpu.isa import host_targets


def from_activation(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """Four roundings of the result, and of |x| where 1 + erf or 1 + tanh cancels."""
    x = np.abs(np.asarray(arrays[0], np.float64))
    return [4 * F32 * (np.abs(exact[0]) + np.where(np.isfinite(x), x, 0.0)) + 2.0**-126]


UNARY = (
    "f32[1]",
    "f32[0,5]",
    "f32[]",
    "f32[3,131]",
    "bf16[3,131]",
    "f16[3,131]",
    "f32[4,3,7]:[50,9,1]",
    "f32[5,6]:[1,5]",
)
ACTIVATIONS = [
    *(problem("silu", t) for t in UNARY),
    *(problem("gelu", t, approximate=a) for t in (*UNARY[3:6], UNARY[7]) for a in ("none", "tanh")),
]
BROADCASTS = (
    ("f32[3,67]", "f32[3,67]"),
    ("f32[3,67]", "f32[67]"),
    ("f32[67]", "bf16[3,67]"),
    ("f32[5,67]", "f32[]"),
    ("f32[5,67]", "f32[5,1]"),
    ("bf16[2,1,33]", "f16[3,1]"),
    ("f16[2,3,20]:[99,33,1]", "f16[2,3,20]"),
    ("f32[7,5]:[1,7]", "f32[5]"),
    ("f32[0,8]", "f32[8]"),
    ("f32[1,1]", "f32[1]"),
)
ROUNDED_ONCE = [problem(op, *pair) for op in ("add", "mul") for pair in BROADCASTS]
FLOAT_TYPES = ("f32", "bf16", "f16")
CASTS = [
    *(problem("cast", f"{a}[3,45]", dtype=b) for a in FLOAT_TYPES for b in FLOAT_TYPES),
    problem("cast", "f32[3,45]:[100,1]", dtype="f32"),
    problem("cast", "bf16[6,9]:[1,6]", dtype="bf16"),
    problem("cast", "i32[40]", dtype="i32"),
    problem("cast", "f64[5,3]", dtype="f64"),
    problem("cast", "i8[300]", dtype="i8"),
]
DYNAMIC = [problem("silu", "f32[tokens,37]"), problem("add", "f32[b,tokens,16]", "bf16[tokens,16]")]


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels([*ACTIVATIONS, *ROUNDED_ONCE, *CASTS, *DYNAMIC], request.param)


@pytest.mark.parametrize("p", ACTIVATIONS, ids=str)
def test_activations(kernels: Kernels, p: Problem) -> None:
    kernels.check(p, from_activation)


@pytest.mark.parametrize("p", ROUNDED_ONCE, ids=str)
def test_sums_and_products_are_rounded_once(kernels: Kernels, p: Problem) -> None:
    # Into 16-bit types the f32 result is rounded again.
    kernels.check(p, relative(1.0))


@pytest.mark.parametrize("p", CASTS, ids=str)
def test_casts_are_exact(kernels: Kernels, p: Problem) -> None:
    kernels.check(p)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 1000])
def test_dynamic_dimensions(kernels: Kernels, tokens: int) -> None:
    kernels.check(DYNAMIC[0], from_activation, {"tokens": tokens})
    for b in (1, 3):
        kernels.check(DYNAMIC[1], relative(1.0), {"tokens": tokens, "b": b})


SPECIAL = [
    np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1e-40,
    -1e-45,
    3.4e38,
    70000.0,
    -65520.0,
    65519.9,
    2.0**-25,
    1e-7,
    89.0,
    -104.0,
]


def cast(x: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(to_numpy(dtype))


def test_activations_of_special_values(kernels: Kernels) -> None:
    x = np.resize(np.array(SPECIAL, np.float32), (3, 131))
    for p in ACTIVATIONS:
        if p.operand(0).shape == (3, 131):
            kernels.check(p, from_activation, arrays=[cast(x, p.operand(0).dtype)], parts=(1,))


def test_casts_of_special_values_and_ties(kernels: Kernels) -> None:
    """Overflow to inf, subnormal results, ties to even, NaN stays NaN: as ml_dtypes and numpy round."""
    rng = np.random.default_rng(3)
    values = [
        np.array(SPECIAL, np.float32),
        (np.arange(30) * 2.0**-9 + 1).astype(np.float32),  # ties of bf16
        (np.arange(30) * 2.0**-12 + 1).astype(np.float32),  # ties of f16
        (np.arange(30) * 2.0**-25).astype(np.float32),  # ties of f16's subnormals
        rng.integers(0, 2**32, 30, dtype=np.uint64).astype(np.uint32).view(np.float32),
    ]
    x = np.resize(np.concatenate(values), (3, 45))
    for p in CASTS[:9]:
        kernels.check(p, arrays=[cast(x, p.operand(0).dtype)], parts=(1,))


def test_a_copy_keeps_every_bit(kernels: Kernels) -> None:
    bits = np.arange(54, dtype=np.uint16).reshape(6, 9) + 0x7F80  # signalling NaNs among them
    p = CASTS[10]
    (out,) = kernels.run(p, [bits.view(to_numpy("bf16"))])
    np.testing.assert_array_equal(out.view(np.uint16), bits)


def test_refusals() -> None:
    assert verdict(problem("silu", "f64[3]")) == Reject("takes f32, bf16, f16, not f64")
    assert verdict(problem("cast", "i32[3]", dtype="f32")) == Reject(
        "converts between f32, bf16, f16 and copies any type, not i32 to f32"
    )
