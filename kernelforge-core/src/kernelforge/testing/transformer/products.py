"""Matrix products, alone and of rows that are normalised or quantised first."""

from __future__ import annotations

from dataclasses import replace

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import FLOATS, LONG, QUANTISED, VOCABULARY, WEIGHTED, types_of, whole_groups
from kernelforge.testing.transformer.norms import NORM_VALUES


def _matmul(op: OpDef, c: Choice) -> Problem:
    x, w = types_of(c)
    batch: tuple[int, ...] = {"none": (), "shared": (2,), "own": (3,), "nested": (2, 3)}[c["batch"]]
    m, n, k = c["m"], c["n"], whole_groups(c["k"], w)
    constant = c["constant"] or w in ("q8", "q4")
    lhs = (*batch, k, m) if c["transpose_lhs"] else (*batch, m, k)
    rhs = (n, k) if c["transpose_rhs"] else (k, n)
    operands = [
        TensorType(lhs, x),
        TensorType(rhs if c["batch"] == "shared" else (*batch, *rhs), w, constant=constant),
        TensorType((n,), "f32" if w in ("q8", "q4") else w, constant=c["constant"]) if c["bias"] else None,
        TensorType((*batch, m, n), "f32" if x == "q8a" else x) if c["residual"] else None,
    ]
    attrs = {name: c[name] for name in ("transpose_lhs", "transpose_rhs", "epilogue")}
    return op.problem(operands, attrs)


MATMUL = Family(
    {
        "dtype": (*WEIGHTED, *QUANTISED),
        "constant": (True, False),
        "transpose_rhs": (True, False),
        "transpose_lhs": (False, True),
        "epilogue": ("none", "silu", "gelu", "gelu_tanh"),
        "bias": (False, True),
        "residual": (False, True),
        "batch": ("none", "shared", "own", "nested"),
    },
    _matmul,
    {"m": SIZES, "n": (17, 1, 2, 3, 7, 31, 33, 64, 129), "k": (33, 1, 2, 3, 7, 16, 31, 64, 127, 300)},
    tiled=("m", "n", "k"),
    dynamic="m",
    zero=("m", "n", "k"),
    extremes={
        "vocabulary": {"m": 1, "n": VOCABULARY, "k": 24, "dtype": "f32*bf16"},
        "long-k": {"m": 3, "n": 5, "k": LONG},
        "long-k-16-bit": {"m": 3, "n": 5, "k": 4096, "dtype": "f16*f16"},
        "long-k-4-bit": {"m": 3, "n": 5, "k": LONG, "dtype": "f32*q4"},
        "long-k-integer": {"m": 3, "n": 5, "k": LONG, "dtype": "q8a*q4"},
    },
)


def _glu(op: OpDef, c: Choice) -> Problem:
    x, w = types_of(c)
    k = whole_groups(c["k"], w)
    constant = c["constant"] or w in ("q8", "q4")
    rhs = TensorType((c["n"], k) if c["transpose_rhs"] else (k, c["n"]), w, constant=constant)
    shape = (2, c["m"], k) if c["batched"] else (c["m"], k)
    attrs = {name: c[name] for name in ("transpose_rhs", "activation")}
    return op.problem([TensorType(shape, x), rhs, rhs], attrs)


GLU_MATMUL = Family(
    {
        "dtype": (*WEIGHTED, *QUANTISED),
        "constant": (True, False),
        "transpose_rhs": (True, False),
        "activation": ("silu", "gelu", "gelu_tanh"),
        "batched": (False, True),
    },
    _glu,
    MATMUL.sizes,
    tiled=("m", "n", "k"),
    dynamic="m",
    zero=("m", "n", "k"),
    extremes={"long-k": {"m": 2, "n": 3, "k": LONG}},
)


def fed(family: Family, product: OpDef, *, norm: bool, quantise: bool) -> Family:
    """Of the op that multiplies, as `product` does, rows that it normalises or quantises first, or both."""

    def make(op: OpDef, c: Choice) -> Problem:
        x, w = types_of(c)
        types = f"{ACTIVATION_FORMAT}*{w}" if quantise else c["dtype"]
        plain = family.make(product, {**c, "transpose_lhs": False, "dtype": types})
        shape = plain.operand(0).shape
        gain = [TensorType(shape[-1:], c["gain"], constant=c["constant"])] if norm else []
        attrs = {name: value for name, value in plain.attrs if name != "transpose_lhs"}
        if norm:
            attrs["eps"] = c["eps"]
        return op.problem([TensorType(shape, x), *gain, *plain.operands[1:]], attrs)

    factors = {name: values for name, values in family.factors.items() if name != "transpose_lhs"}
    floats = [types for types in factors["dtype"] if not types.startswith(ACTIVATION_FORMAT)]
    factors["dtype"] = [types for types in floats if types in QUANTISED] if quantise else floats
    if quantise:
        factors["transpose_rhs"] = (True,)
    if norm:
        factors |= {"gain": FLOATS, "eps": (1e-5, 1e-2)}
    long = {"m": 3, "n": 5, "k": LONG}
    return replace(
        family,
        factors=factors,
        make=make,
        sizes={**family.sizes, "k": (64, 32, 96, 320)} if quantise else family.sizes,
        zero=("m", "n"),
        extremes={"wide": {"m": 8, "n": 65, "k": 2048}, "long-k": long}
        if quantise
        else {"long-k": long, "long-k-4-bit": {**long, "dtype": "f32*q4"}},
        values=NORM_VALUES if norm else {},
    )
