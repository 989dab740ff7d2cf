"""Ops that move elements or only see them otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import FLOATS, made

ALL_TYPES = (*FLOATS, "i32", "f64", "i64", "i8")


def _box(c: Choice) -> TensorType:
    return TensorType((c["rows"], *{2: (c["n"],), 3: (2, c["n"]), 4: (2, 3, c["n"])}[c["rank"]]), c["dtype"])


def _reshape(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    inner = prod(t.static_shape({"tokens": 1})[1:])
    shape = {"rows": (-1, inner), "flat": (-1,), "split": (-1, 1, inner)}[c["shape"]]
    return made(op, [t], shape=shape)


def _transpose(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axes = list(range(t.rank))
    perm = {"reversed": axes[::-1], "swapped": [1, 0, *axes[2:]], "last": [*axes[:-2], axes[-1], axes[-2]]}[c["perm"]]
    return made(op, [t], perm=tuple(perm))


def _slice(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    start = min(1, c["n"] - 1)
    size = {"rest": -1, "one": 1}[c["size"]]
    whole = t.rank - 1
    return made(op, [t], starts=(*[0] * whole, start), sizes=(*[-1] * whole, size))


def _split(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axis = -1 if c["axis"] == "last" else 1
    extent = t.static_shape({"tokens": 1})[axis]
    third = extent // 3
    return made(op, [t], axis=axis, sizes=(third, extent - 2 * third, third) if c["pieces"] == 3 else (extent,))


def _concat(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axis = t.rank - 1 if c["axis"] == "last" else 1
    others = [TensorType((*t.shape[:axis], n, *t.shape[axis + 1 :]), c["dtype"]) for n in (1, 5)]
    return made(op, [t, *others[: c["pieces"] - 1]], axis=axis)


def moving(make: str, **factors: Sequence[object]) -> Family:
    return Family(
        {"dtype": ALL_TYPES, "rank": (2, 3, 4), **factors},
        {"reshape": _reshape, "transpose": _transpose, "slice": _slice, "split": _split, "concat": _concat}[make],
        {"rows": SIZES, "n": (33, 1, 2, 7, 31, 64, 127)},
        dynamic="rows",
        zero=("rows",),
    )
