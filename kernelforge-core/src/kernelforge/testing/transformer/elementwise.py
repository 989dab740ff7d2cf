"""One element of the result for one of each operand."""

from __future__ import annotations

from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.testing import edges
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import FLOATS, WEIGHTED, made, rows_of, types_of


def _unary(op: OpDef, c: Choice) -> Problem:
    attrs = {"approximate": c["approximate"]} if op.name == "gelu" else {}
    return op.problem([TensorType(rows_of(c), c["dtype"])], attrs)


UNARY = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3), "approximate": ("none", "tanh")},
    _unary,
    {"rows": SIZES, "n": (33, 1, 2, 7, 31, 64, 127, 1000)},
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
    extremes={"long": {"rank": 1, "n": 100_003}},
)


def _binary(op: OpDef, c: Choice) -> Problem:
    m, n = c["rows"], c["n"]
    shapes = {
        "same": ((m, n), (m, n)),
        "row": ((m, n), (n,)),
        "column": ((m, n), (m, 1)),
        "scalar": ((m, n), ()),
        "both": ((m, 1, n), (3, 1)),
        "wider": ((n,), (m, n)),
    }
    types = types_of(c)
    return made(op, [TensorType(shape, dtype) for shape, dtype in zip(shapes[c["shapes"]], types, strict=True)])


BINARY = Family(
    {"dtype": (*WEIGHTED, "bf16*f32"), "shapes": ("same", "row", "column", "scalar", "both", "wider")},
    _binary,
    UNARY.sizes,
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
)

CAST = Family(
    {"dtype": (*FLOATS, "f64", "i32", "i64", "i8"), "to": (*FLOATS, "f64", "i32", "i64", "i8"), "rank": (2, 1, 3)},
    lambda op, c: made(op, [TensorType(rows_of(c), c["dtype"])], dtype=c["to"]),
    UNARY.sizes,
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
    values={"halfway": edges.halfway},
)
