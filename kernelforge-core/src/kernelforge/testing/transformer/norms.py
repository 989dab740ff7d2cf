"""Norms and softmax: rows that are looked at whole."""

from __future__ import annotations

from dataclasses import replace

from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.testing import edges
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import (
    FLOATS,
    LONG,
    VOCABULARY,
    WEIGHTED,
    Operands,
    made,
    rows_of,
    types_of,
    whole_groups,
)

NORM_VALUES = {"small-variance": edges.small_variance}


def _norm(op: OpDef, c: Choice) -> Problem:
    x, w = types_of(c)
    t, weight = TensorType(rows_of(c), x), TensorType((c["n"],), w, constant=c["constant"])
    operands: Operands = [t, weight]
    if op.name == "add_rms_norm":
        operands = [t, t, weight]
    elif op.name == "layer_norm":
        operands = [t, weight, weight if c["bias"] else None]
    return made(op, operands, eps=c["eps"])


ROWS = {"rows": SIZES, "n": (64, 1, 2, 7, 31, 33, 127, 257, 576)}

NORM = Family(
    {
        "dtype": WEIGHTED,
        "rank": (2, 1, 3),
        "constant": (True, False),
        "bias": (True, False),
        "eps": (1e-5, 1e-6),
    },
    _norm,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"long": {"rows": 2, "n": LONG}},
    values=NORM_VALUES,
)


def _norm_quantize(op: OpDef, c: Choice) -> Problem:
    return _norm(op, {**c, "n": whole_groups(c["n"], "q8")})


NORM_QUANTIZE = replace(NORM, make=_norm_quantize, factors={k: v for k, v in NORM.factors.items() if k != "bias"})


def _softmax(op: OpDef, c: Choice) -> Problem:
    return made(op, [TensorType(rows_of(c), c["dtype"])], axis=c["axis"])


SOFTMAX = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3), "axis": (-1, 0, 1)},
    _softmax,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={"masked": edges.masked_logits},
)
