"""Rotary position embedding."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Required, TypedDict

from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    float_attr,
    int_attr,
    required,
    standard_inputs,
    traffic,
    want_float,
    want_i32,
    want_rank,
)
from kernelforge.dialects.transformer.models import ACTIVATIONS, LARGE, MODELS, TOKENS, f32, i32, make
from kernelforge.errors import UsageError
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.dialects.transformer.checks import Array, Arrays


def rotated_size(head_size: int, attrs: Attrs) -> int:
    """How many leading elements of a head are rotated."""
    return int_attr(attrs, "rotary_dim") or head_size


def check_rope(name: str, x: TensorType, positions: TensorType, attrs: Attrs) -> None:
    """`x` is a tensor of heads that these attributes rotate by these positions."""
    want_float(name, x)
    want_rank(name, x, 3)
    want_i32("positions", positions, x.shape[:1], f"one for each token of operand '{name}'")
    for attr in ("theta", "factor", "low_freq_factor", "high_freq_factor", "max_position"):
        if not float_attr(attrs, attr) > 0:
            raise OpError(f"attribute '{attr}' is {attrs[attr]}, must be positive")
    size = x.shape[-1]
    if isinstance(size, int):
        rotary = rotated_size(size, attrs)
        if rotary % 2 or not 0 <= rotary <= size:
            raise OpError(
                f"attribute 'rotary_dim' is {attrs['rotary_dim']}: an even number of the {size} elements of a head of "
                f"operand '{name}' is rotated"
            )
    if attrs["scaling"] == "llama3":
        if int_attr(attrs, "original_max_position") <= 0:
            raise OpError("attribute 'original_max_position' must be positive for scaling 'llama3'")
        if float_attr(attrs, "high_freq_factor") <= float_attr(attrs, "low_freq_factor"):
            raise OpError(
                f"attribute 'high_freq_factor' is {attrs['high_freq_factor']}, must be above low_freq_factor, "
                f"{attrs['low_freq_factor']}"
            )


def infer_rope(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    check_rope("x", x, required(operands, 1), attrs)
    return (TensorType(x.shape, x.dtype),)


def inverse_frequencies(head_size: int, attrs: Attrs) -> Array:
    """Radians per position of each rotated pair, float64 [rotary_dim / 2].

    theta^(-2i/d) (Su et al. 2021, "RoFormer"), divided by `factor` for linear scaling (Chen et al. 2023). For "llama3"
    (Llama 3.1, 2024) only wavelengths above original_max_position / low_freq_factor are divided, those below
    original_max_position / high_freq_factor stay, and what lies between is interpolated.
    """
    import numpy as np

    rotary = rotated_size(head_size, attrs)
    frequencies = float_attr(attrs, "theta") ** (-np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    factor = float_attr(attrs, "factor")
    if attrs["scaling"] == "linear":
        return np.asarray(frequencies / factor)
    if attrs["scaling"] == "llama3":
        low, high = float_attr(attrs, "low_freq_factor"), float_attr(attrs, "high_freq_factor")
        turns = int_attr(attrs, "original_max_position") * frequencies / (2.0 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return np.asarray(frequencies * (kept + (1.0 - kept) / factor))
    return np.asarray(frequencies)


def rope_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    """Rotate the pairs (i, i + d/2), or (2i, 2i + 1) if interleaved, by position * frequency[i].

    Negative positions count as 0, where finite rows stay as they are. Raises UsageError for a position that is not below
    `max_position`.
    """
    import numpy as np

    x, positions = arrays
    limit = int_attr(attrs, "max_position")
    if positions.size and int(positions.max()) >= limit:
        raise UsageError(f"position {int(positions.max())} is not below max_position {limit} of transformer.rope")
    size = x.shape[-1]
    rotary = rotated_size(size, attrs)
    angles = np.maximum(positions, 0)[:, None] * inverse_frequencies(size, attrs)  # [T, rotary/2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    pairs = (slice(0, rotary, 2), slice(1, rotary, 2))
    if not attrs["interleaved"]:
        pairs = (slice(0, rotary // 2), slice(rotary // 2, rotary))
    out = x.copy()
    first, second = x[..., pairs[0]], x[..., pairs[1]]
    out[..., pairs[0]] = first * cos - second * sin
    out[..., pairs[1]] = second * cos + first * sin
    return (out,)


def rope_cost(problem: Problem) -> Cost:
    return Cost(3 * problem.operand(0).size(), traffic(problem))


def rope_inputs(problem: Problem, rng: np.random.Generator) -> list[Array | None]:
    """Positions from -1 (padding) to the last one that is allowed."""
    import numpy as np

    arrays = standard_inputs(problem, rng)
    limit = int_attr(dict(problem.attrs), "max_position")
    arrays[1] = rng.integers(-1, limit, problem.operand(1).static_shape()).astype(np.int32)
    return arrays


def rope_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(ROPE, f32(1, 1, 2), i32(1), max_position=8)
    yield make(ROPE, f32(5, 3, 8), i32(5), max_position=64, interleaved=True)
    yield make(ROPE, f32(5, 3, 16), i32(5), max_position=64, rotary_dim=6)
    yield make(ROPE, f32(5, 3, 16), i32(5), max_position=64, rotary_dim=6, interleaved=True)
    yield make(ROPE, f32(4, 2, 8), i32(4), max_position=4096, scaling="linear", factor=4.0)
    llama3: dict[str, Attr] = {"scaling": "llama3", "factor": 32.0, "original_max_position": 8192, "theta": 500000.0}
    yield make(ROPE, f32(9, LARGE.heads, LARGE.head_dim), i32(9), max_position=131072, **llama3)
    for dtype in ACTIVATIONS:
        tokens = rng.randrange(2, 20)
        yield make(ROPE, TensorType((tokens, 4, 32), dtype), i32(tokens), max_position=1024)
    for model in MODELS:
        for tokens in TOKENS:
            for heads in (model.heads, model.kv_heads):
                yield make(ROPE, f32(tokens, heads, model.head_dim), i32(tokens), max_position=2048)


ATTRIBUTES = (
    Attribute("theta", "float", 10000.0, doc="base of the frequencies"),
    Attribute("rotary_dim", "int", 0, doc="leading elements of a head that are rotated; 0: all"),
    Attribute("interleaved", "bool", False, doc="pairs are neighbours; else half a head apart"),
    Attribute("scaling", "str", "none", ("none", "linear", "llama3"), "how frequencies are stretched"),
    Attribute("factor", "float", 1.0, doc="of the stretching"),
    Attribute("low_freq_factor", "float", 1.0, doc="llama3: fewer turns than this are stretched whole"),
    Attribute("high_freq_factor", "float", 4.0, doc="llama3: more turns than this are not stretched"),
    Attribute("original_max_position", "int", 0, doc="llama3: length in which turns are counted"),
    Attribute("max_position", "int", doc="positions are below this"),
)


class RopeAttributes(TypedDict, total=False):
    """ATTRIBUTES as arguments; what is left out has the default of the op."""

    max_position: Required[int]
    theta: float
    rotary_dim: int
    interleaved: bool
    scaling: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


ROPE = OpDef(
    name="rope",
    summary="rotate pairs of each head's elements by position times frequency",
    operands=(Operand("x"), Operand("positions")),
    results=("out",),
    attributes=ATTRIBUTES,
    infer=infer_rope,
    reference=rope_reference,
    sample=rope_samples,
    cost=rope_cost,
    inputs=rope_inputs,
    dialect=DIALECT,
)
