"""What the ops of this dialect check and compute alike: operand types, activations, traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import FLOATS, WEIGHT_FORMATS
from kernelforge.op import UNKNOWN, OperandTypes, OpError, same_dim
from kernelforge.problem import Attr, Dim, Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Arrays = Sequence[Any]
    """Operands of a reference: arrays, None where an optional one is absent."""

DIALECT = "transformer"

CACHE_FORMAT = "q8"
"""The quantised format that keys and values can be kept in."""

Attrs = Mapping[str, Attr]


def required(operands: OperandTypes, index: int) -> TensorType:
    found = operands[index]
    assert found is not None, "OpDef.check_count admits no absent required operand"
    return found


def optional(operands: OperandTypes, index: int) -> TensorType | None:
    return operands[index] if index < len(operands) else None


def shape_text(shape: Sequence[Dim]) -> str:
    return f"[{','.join(map(str, shape))}]"


def want_float(name: str, t: TensorType) -> None:
    if t.dtype not in FLOATS:
        raise OpError(f"operand '{name}' must have a float type, got {t.dtype}")


def want_weight(name: str, t: TensorType) -> None:
    """Floats, or a quantised format of weights."""
    if t.dtype not in WEIGHT_FORMATS:
        want_float(name, t)


def want_cache(name: str, t: TensorType) -> None:
    """Floats or q8."""
    if t.dtype != CACHE_FORMAT:
        want_float(name, t)


def want_plain(name: str, t: TensorType) -> None:
    if t.quantised:
        raise OpError(f"operand '{name}' is quantised ({t.dtype}) and must not be: its elements come in groups")


def want_i32(name: str, t: TensorType, shape: Sequence[Dim], meaning: str) -> None:
    """An i32 tensor of `shape`, which `meaning` explains."""
    if t.dtype != "i32":
        raise OpError(f"operand '{name}' must be of type i32, got {t.dtype}")
    want_shape(name, t, shape, meaning)


def want_rank(name: str, t: TensorType, *ranks: int) -> None:
    if t.rank not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise OpError(f"operand '{name}' must have rank {wanted}, got shape {shape_text(t.shape)}")


def want_shape(name: str, t: TensorType, shape: Sequence[Dim], meaning: str) -> None:
    if len(t.shape) != len(shape) or not all(map(same_dim, t.shape, shape)):
        raise OpError(f"operand '{name}' has shape {shape_text(t.shape)}, must be {shape_text(shape)} ({meaning})")


def merged(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """Two shapes that agree, each dimension from the one that knows it."""
    return tuple(y if x == UNKNOWN else x for x, y in zip(a, b, strict=True))


def axis_of(attr: str, axis: Attr, rank: int) -> int:
    """A possibly negative axis as an index. Raises OpError when it is out of range."""
    assert isinstance(axis, int)
    if not -rank <= axis < rank:
        raise OpError(f"attribute '{attr}' is {axis}, out of range for operand 'x' of rank {rank}")
    return axis % rank


def int_attr(attrs: Attrs, name: str) -> int:
    value = attrs[name]
    assert isinstance(value, int)
    return value


def float_attr(attrs: Attrs, name: str) -> float:
    value = attrs[name]
    assert isinstance(value, (int, float))
    return float(value)


def ints_attr(attrs: Attrs, name: str) -> tuple[int, ...]:
    value = attrs[name]
    assert isinstance(value, tuple)
    return value


def traffic(problem: Problem) -> int:
    """Bytes of all operands and results, each once."""
    return sum(t.nbytes() for t in (*problem.operands, *problem.results) if t is not None)


def standard_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Normal numbers for float and quantised operands; integer operands are None, to be filled in by the op."""
    import numpy as np

    from kernelforge.dtype import to_numpy
    from kernelforge.quant import quantize

    arrays: list[Array | None] = []
    for t in problem.operands:
        if t is None or not (t.quantised or t.dtype in FLOATS):
            arrays.append(None)
            continue
        numbers = rng.standard_normal(t.static_shape(), dtype=np.float32)
        arrays.append(quantize(numbers, t.dtype) if t.quantised else numbers.astype(to_numpy(t.dtype), copy=False))
    return arrays
