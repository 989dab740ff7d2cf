"""MLIR's text form of the few things that ops are made of: tensor types, attributes, strings. Needs no MLIR."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from kernelforge.dtype import DTYPES, GROUP, QUANTISED
from kernelforge.op import UNKNOWN, OpDef, OpError
from kernelforge.problem import Attr, Dim, Problem, TensorType

SEGMENTS = "operandSegmentSizes"
"""MLIR's attribute that says which optional operands are there, and how variadic ones are grouped."""
RESULT_SEGMENTS = "resultSegmentSizes"

RUNS = 8
"""Variadic operands or results are declared to MLIR as so many groups. Those of a group must have the same type: the
constraints of a dialect that is defined at run time bind all of a group to one type."""

QUANTISED_PREFIX = "!transformer."
"""Before the name of a quantised format, which is a type of that dialect."""

_TENSOR = re.compile(r"tensor<(?P<shape>(?:(?:\d+|\?)x)*)(?P<dtype>[\w!.]+)>")
_DTYPES = {f"{QUANTISED_PREFIX if name in QUANTISED else ''}{name}": name for name in DTYPES}
"""By their names in MLIR."""
_PLAIN_FLOAT = re.compile(r"(-?\d+)(?:\.(\d+))?(e[-+]?\d+)?")


@lru_cache(maxsize=4096)
def read_tensor(text: str) -> TensorType:
    """`tensor<?x8xf32>` as a TensorType whose dynamic dimensions are UNKNOWN.

    Raises OpError, to be prefixed by what has that type, when it is not a ranked tensor of a known element type.
    """
    match = _TENSOR.fullmatch(text)
    if match is None or match["dtype"] not in _DTYPES:
        raise OpError(f"has type {text}, must be a tensor of {', '.join(_DTYPES)}")
    sizes = match["shape"].split("x")[:-1]
    dtype = _DTYPES[match["dtype"]]
    if dtype in QUANTISED and (not sizes or sizes[-1] == "?" or int(sizes[-1]) % GROUP):
        raise OpError(f"has type {text}, must have rows of a multiple of {GROUP} elements")
    return TensorType(tuple(UNKNOWN if d == "?" else int(d) for d in sizes), dtype)


def tensor_text(shape: Sequence[Dim], dtype: str) -> str:
    """`tensor<?x8xf32>`; named dimensions become `?`."""
    prefix = QUANTISED_PREFIX if dtype in QUANTISED else ""
    return f"tensor<{''.join('?x' if isinstance(d, str) else f'{d}x' for d in shape)}{prefix}{dtype}>"


def string_text(value: str) -> str:
    """A quoted string; what is not printable ASCII is escaped byte by byte."""
    escaped = (
        chr(b) if 32 <= b < 127 and b != ord('"') else f"\\{b:02X}" for b in value.replace("\\", "\\\\").encode()
    )
    return f'"{"".join(escaped)}"'


def float_text(value: float) -> str:
    """A 64-bit float that reads back as the same bits."""
    match = _PLAIN_FLOAT.fullmatch(repr(value))
    if match is None:  # inf, nan
        return f"0x{struct.pack('>d', value).hex().upper()} : f64"
    return f"{match[1]}.{match[2] or '0'}{match[3] or ''} : f64"


def attr_text(value: Attr) -> str:
    """An op's attribute."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value} : i64"
    if isinstance(value, float):
        return float_text(value)
    if isinstance(value, str):
        return string_text(value)
    return f"array<i64: {', '.join(map(str, value))}>" if value else "array<i64>"


def attribute_texts(op: OpDef, problem: Problem) -> dict[str, str]:
    """The attributes of an operation: those that differ from their default, and the segment sizes that MLIR wants.

    Raises OpError when variadic operands or results are of too many types.
    """
    defaults = {a.name: a.default for a in op.attributes}
    texts = {name: attr_text(value) for name, value in problem.attrs if value != defaults[name]}
    if op.variadic:
        fixed = len(op.operands) - 1
        texts[SEGMENTS] = _sizes_text([1] * fixed + run_lengths(problem.operands[fixed:]))
    elif sum(o.optional for o in op.operands) > 1:
        texts[SEGMENTS] = _sizes_text([int(t is not None) for t in problem.operands])
    if op.variadic_results:
        texts[RESULT_SEGMENTS] = _sizes_text(run_lengths(problem.results))
    return texts


def _sizes_text(sizes: Sequence[int]) -> str:
    return f"array<i32: {', '.join(map(str, sizes))}>"


def run_lengths(types: Sequence[TensorType | None]) -> list[int]:
    """Lengths of the runs of equal types, filled up with zeros to `RUNS`. Raises OpError when there are more."""
    texts = [tensor_text(t.shape, t.dtype) for t in types if t is not None]
    lengths = [len(list(run)) for _, run in groupby(texts)]
    if len(lengths) > RUNS:
        raise OpError(f"has {len(lengths)} runs of different types, can have {RUNS}: nest several")
    return lengths + [0] * (RUNS - len(lengths))
