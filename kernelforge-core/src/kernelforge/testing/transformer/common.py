"""What the families share: types, sizes beyond the usual, and shapes."""

from __future__ import annotations

from collections.abc import Sequence

from kernelforge.dtype import GROUP
from kernelforge.op import OpDef
from kernelforge.problem import Attr, Problem, TensorType
from kernelforge.testing.families import SIZES, Choice

Operands = Sequence[TensorType | None]

FLOATS = ("f32", "bf16", "f16")
WEIGHTED = ("f32*f32", "f32*bf16", "f32*f16", "bf16*bf16", "f16*f16")
"""Activations and weights."""
QUANTISED = ("f32*q8", "f32*q4", "bf16*q8", "f16*q4", "q8a*q8", "q8a*q4")
VOCABULARY = 32768 + 7
LONG = 8192 + 3


def types_of(choice: Choice) -> list[str]:
    return str(choice["dtype"]).split("*")


def made(op: OpDef, operands: Operands, **attrs: Attr) -> Problem:
    return op.problem(operands, attrs)


def whole_groups(size: int, dtype: str) -> int:
    """A quantised row has whole groups."""
    return -(-size // GROUP) * GROUP if dtype in ("q8", "q4") else size


def rows_of(c: Choice) -> tuple[int, ...]:
    leading: tuple[int, ...] = {1: (), 2: (c["rows"],), 3: (c["rows"], 3)}[c["rank"]]
    return (*leading, c["n"])


ROWS = {"rows": SIZES, "n": (64, 1, 2, 7, 31, 33, 127, 257, 576)}
