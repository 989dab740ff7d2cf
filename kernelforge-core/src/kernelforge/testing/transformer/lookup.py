"""Rows and elements by index: embedding, KV caches, argmax, sampling."""

from __future__ import annotations

from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.testing import edges, values
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import (
    FLOATS,
    ROWS,
    VOCABULARY,
    WEIGHTED,
    made,
    rows_of,
    types_of,
    whole_groups,
)

ARGMAX = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3)},
    lambda op, c: made(op, [TensorType(rows_of(c), c["dtype"])]),
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={"masked": edges.masked_logits, "signed-zeros": edges.signed_zeros},
)


def _sample(op: OpDef, c: Choice) -> Problem:
    each = TensorType((c["rows"],), "f32")
    logits = TensorType((c["rows"], c["n"]), c["dtype"])
    return made(op, [logits, each, TensorType((c["rows"],), "i32"), each, each, each])


SAMPLE = Family(
    {"dtype": FLOATS},
    _sample,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={name: edges.drawn(name) for name in (*values.ALL, *values.FIRST, "masked")},
)


def _embedding(op: OpDef, c: Choice) -> Problem:
    dtype = c["dtype"]
    table = TensorType((c["vocabulary"], whole_groups(c["n"], dtype)), dtype, constant=c["constant"] or dtype[0] == "q")
    return made(op, [table, TensorType((c["tokens"],), "i32")], dtype=c["to"])


EMBEDDING = Family(
    {"dtype": (*FLOATS, "q8", "q4"), "to": ("f32", "", "bf16", "f16"), "constant": (True, False)},
    _embedding,
    {"tokens": SIZES, "n": (33, 1, 7, 64, 127), "vocabulary": (50, 1, 300)},
    tiled=("n",),
    dynamic="tokens",
    zero=("tokens",),
    extremes={"vocabulary": {"tokens": 3, "n": 16, "vocabulary": VOCABULARY}},
    values={"ends": edges.first_and_last_ids},
)


def _kv_cache_update(op: OpDef, c: Choice) -> Problem:
    new, cache = types_of(c)
    row = (c["groups"], c["head_dim"])
    places = TensorType((c["tokens"],), "i32")
    memory = TensorType((c["slots"], c["capacity"], *row), cache)
    return made(op, [memory, TensorType((c["tokens"], *row), new), places, places])


KV_CACHE_UPDATE = Family(
    {"dtype": (*WEIGHTED, "bf16*f32", "f32*q8", "f16*q8"), "head_dim": (64, 32, 80, 128, 5)},
    _kv_cache_update,
    {"tokens": SIZES, "groups": (2, 1, 3), "slots": (3, 1, 2), "capacity": (40, 1, 7)},
    dynamic="tokens",
    zero=("tokens",),
)
