"""Problems from what is typed: an op, the shapes of its operands, their types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from kernelforge.dtype import FLOATS, QUANTISED, WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Attr, Dim, Problem, TensorType


def shaped_problem(op: OpDef, shape: str, dtype: str, attrs: Sequence[str] = (), *, constant: bool = True) -> Problem:
    """The problem of `op` for operands of these shapes: "64x576,576x1536", where "?" is a dynamic size and "_" an absent
    operand.

    `dtype` is a list of one for each shape, or the type of the op's weights, or of all its float operands when none of
    them is ever a weight; the other operands have the types that they usually have, as do biases and gains beside
    quantised weights. Raises UsageError for texts that cannot be read and when the op refuses the problem.
    """
    shapes = [_dims(text) for text in shape.split(",")]
    usual = _usual_types(op)
    slots = [usual[min(i, len(usual) - 1)] for i in range(len(shapes))]
    dtypes = dtype.split(",")
    if len(dtypes) > 1 and len(dtypes) != len(shapes):
        raise UsageError(f"--dtype names {len(dtypes)} types, --shape {len(shapes)} operands", hint="one each, or one")
    weighted = any(slot.constant for slot in slots)
    types: list[TensorType | None] = []
    for i, (dims, slot) in enumerate(zip(shapes, slots, strict=True)):
        kind = slot.dtype
        if len(dtypes) > 1:
            kind = dtypes[i]
        elif kind in FLOATS or (slot.constant and dtype in WEIGHT_FORMATS):
            wide = "f64" if dtype == "f64" else "f32"
            vector = slot.constant and dims is not None and len(dims) < 2  # a bias or gain, never in groups
            kind = wide if (weighted and not slot.constant) or (vector and dtype in QUANTISED) else dtype
        types.append(None if dims is None else TensorType(dims, kind, constant=slot.constant and constant))
    try:
        return op.problem(types, dict(_attr(op, text) for text in attrs)).canonical()
    except OpError as error:
        raise UsageError(f"{op.full_name} does not take this problem: {error}", hint=shape_example(op)) from None


def _dims(text: str) -> tuple[Dim, ...] | None:
    if text.strip() == "_":
        return None
    sizes = text.strip().split("x")
    if not all(size == "?" or size.isdecimal() for size in sizes):
        raise UsageError(f"'{text}' is not a shape", hint="written as 64x576; ? is a dynamic size, _ an absent operand")
    return tuple("?0" if size == "?" else int(size) for size in sizes)


def _usual_types(op: OpDef) -> list[TensorType]:
    """For each operand: the first type that it has in the op's samples, as a weight if it is one in any of them."""
    found: list[TensorType] = []
    for problem in _samples(op):
        for i, t in enumerate(problem.operands):
            if t is not None and i == len(found):
                found.append(t)
            elif t is not None and i < len(found) and t.constant and not found[i].constant:
                found[i] = t
    return found


def _attr(op: OpDef, text: str) -> tuple[str, Attr]:
    name, _, value = text.partition("=")
    kind = next((a.kind for a in op.attributes if a.name == name), "str")
    try:
        if kind == "bool":
            return name, {"true": True, "false": False}[value]
        if kind == "ints":
            return name, tuple(int(item) for item in value.split(",") if item)
        return name, {"int": int, "float": float, "str": str}[kind](value)
    except (ValueError, KeyError):
        raise UsageError(f"--attr {text}: '{value}' is not of kind {kind}", hint=f"written as {name}=VALUE") from None


def _samples(op: OpDef) -> Iterator[Problem]:
    """Some of them: those of real models come later and are many."""
    import random

    return islice(op.samples(random.Random(0)), 40)


def key_example(op: OpDef) -> str:
    """A problem that `op` takes, as its key."""
    return str(next(_samples(op)))


def shape_example(op: OpDef) -> str:
    """Options that name one of the op's samples."""
    problem = max(islice(_samples(op), 3), key=lambda p: sum(t.size() for t in p.results))
    operands = list(problem.operands)
    while operands and operands[-1] is None:
        operands.pop()
    shapes = ",".join("_" if t is None else "x".join(map(str, t.shape)) for t in operands)
    required = {a.name for a in op.attributes if a.default is None}
    attrs = "".join(f" --attr {name}={_attr_text(value)}" for name, value in problem.attrs if name in required)
    return f"for example {op.name} --shape {shapes}{attrs}"


def _attr_text(value: Attr) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
