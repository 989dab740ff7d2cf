"""Layout ops: views of their operand wherever strides can express them, else copies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.checks import (
    DIALECT,
    Attrs,
    axis_of,
    ints_attr,
    merged,
    required,
    shape_text,
    traffic,
    want_plain,
)
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, f32, make
from kernelforge.dialects.transformer.strides import known_strides, reshaped_strides
from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, View, same_dim
from kernelforge.problem import Dim, Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays


def move_cost(problem: Problem) -> Cost:
    return Cost(0, traffic(problem))


def _reshaped(x: TensorType, shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """The result shape of a reshape: -1 is the operand's dynamic dimension, or what is left over."""
    if shape.count(-1) > 1 or any(d < -1 for d in shape):
        raise OpError(f"attribute 'shape' is {shape_text(shape)}: sizes, of which one may be -1, are wanted")
    dynamic = [d for d in x.shape if isinstance(d, str)]
    have = prod(d for d in x.shape if isinstance(d, int))
    want = prod(d for d in shape if d != -1)
    if len(dynamic) > 1:
        raise OpError(f"operand 'x' of shape {shape_text(x.shape)} has more than one dynamic dimension")
    if dynamic:
        if -1 not in shape or have != want:
            raise OpError(
                f"attribute 'shape' is {shape_text(shape)}, must keep the dynamic dimension of operand 'x' "
                f"{shape_text(x.shape)} as -1 and have {have} elements besides it"
            )
        return tuple(dynamic[0] if d == -1 else d for d in shape)
    if -1 in shape:
        if want == 0 or have % want:
            raise OpError(
                f"operand 'x' of shape {shape_text(x.shape)} does not fit attribute 'shape' {shape_text(shape)}"
            )
        return tuple(have // want if d == -1 else d for d in shape)
    if have != want:
        raise OpError(f"operand 'x' has {have} elements but attribute 'shape' {shape_text(shape)} has {want}")
    return shape


def infer_reshape(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x = required(operands, 0)
    want_plain("x", x)
    return (TensorType(_reshaped(x, ints_attr(attrs, "shape")), x.dtype),)


def reshape_view(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    x = required(operands, 0)
    shape = _reshaped(x, ints_attr(attrs, "shape"))
    strides = known_strides(x)
    found = None if strides is None else reshaped_strides(x.shape, strides, shape)
    return None if found is None else (View(shape, found, 0),)


def reshape_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0].reshape(ints_attr(attrs, "shape")),)


def reshape_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RESHAPE, f32(1), shape=())
    yield make(RESHAPE, f32(4, 6), shape=(2, 2, -1))
    yield make(RESHAPE, TensorType((4, 6), "f32", (1, 4)), shape=(24,))
    for dtype in ACTIVATIONS:
        tokens = rng.randrange(2, 20)
        yield make(RESHAPE, TensorType((tokens, 24), dtype), shape=(-1, 3, 8))
    for model in MODELS:
        yield make(RESHAPE, f32(7, model.heads * model.head_dim), shape=(-1, model.heads, model.head_dim))


RESHAPE = OpDef(
    name="reshape",
    summary="the same elements, in row-major order, in another shape",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("shape", "ints", doc="one -1: the dynamic dimension, or what is left"),),
    infer=infer_reshape,
    reference=reshape_reference,
    sample=reshape_samples,
    cost=move_cost,
    view=reshape_view,
    exact=True,
    dialect=DIALECT,
)


def infer_transpose(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, perm = required(operands, 0), ints_attr(attrs, "perm")
    want_plain("x", x)
    if sorted(perm) != list(range(x.rank)):
        raise OpError(f"attribute 'perm' is {shape_text(perm)}, not an order of the {x.rank} axes of operand 'x'")
    return (TensorType(tuple(x.shape[i] for i in perm), x.dtype),)


def transpose_view(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    x, perm = required(operands, 0), ints_attr(attrs, "perm")
    strides = known_strides(x)
    return None if strides is None else (View(tuple(x.shape[i] for i in perm), tuple(strides[i] for i in perm), 0),)


def transpose_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0].transpose(ints_attr(attrs, "perm")),)


def transpose_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(TRANSPOSE, f32(1), perm=(0,))
    yield make(TRANSPOSE, f32(2, 3, 4, 5), perm=tuple(rng.sample(range(4), 4)))
    for dtype in ACTIVATIONS:
        yield make(TRANSPOSE, TensorType((rng.randrange(2, 40), 17), dtype), perm=(1, 0))
    for model in MODELS:
        yield make(TRANSPOSE, f32(64, model.heads, model.head_dim), perm=(1, 0, 2))


TRANSPOSE = OpDef(
    name="transpose",
    summary="axes in another order: axis i of the result is axis perm[i] of x",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(Attribute("perm", "ints", doc="an order of all axes"),),
    infer=infer_transpose,
    reference=transpose_reference,
    sample=transpose_samples,
    cost=move_cost,
    view=transpose_view,
    exact=True,
    dialect=DIALECT,
)


def infer_slice(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, starts, sizes = required(operands, 0), ints_attr(attrs, "starts"), ints_attr(attrs, "sizes")
    want_plain("x", x)
    for name, values in (("starts", starts), ("sizes", sizes)):
        if len(values) != x.rank:
            raise OpError(f"attribute '{name}' has {len(values)} entries for the {x.rank} axes of operand 'x'")
    shape: list[Dim] = []
    for axis, (dim, start, size) in enumerate(zip(x.shape, starts, sizes, strict=True)):
        if isinstance(dim, str):
            if (start, size) != (0, -1):
                raise OpError(
                    f"axis {axis} of operand 'x' is dynamic ({dim}) and cannot be cut: start 0 and size -1 keep it"
                )
            shape.append(dim)
            continue
        kept = dim - start if size == -1 else size
        if start < 0 or kept < 0 or start + kept > dim:
            raise OpError(f"axis {axis} of operand 'x' has size {dim}: start {start} and size {size} do not lie in it")
        shape.append(kept)
    return (TensorType(tuple(shape), x.dtype),)


def slice_view(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    x = required(operands, 0)
    strides = known_strides(x)
    if strides is None:
        return None
    (out,) = infer_slice(operands, attrs)
    offset = sum(start * stride for start, stride in zip(ints_attr(attrs, "starts"), strides, strict=True))
    return (View(out.shape, strides, offset),)


def slice_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    pairs = zip(ints_attr(attrs, "starts"), ints_attr(attrs, "sizes"), strict=True)
    return (arrays[0][tuple(slice(start, None if size == -1 else start + size) for start, size in pairs)],)


def slice_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(SLICE, f32(3), starts=(1,), sizes=(1,))
    yield make(SLICE, f32(4, 6, 5), starts=(1, 0, 2), sizes=(2, -1, -1))
    for dtype in ACTIVATIONS:
        tokens = rng.randrange(4, 20)
        yield make(SLICE, TensorType((tokens, 33), dtype), starts=(tokens - 1, 0), sizes=(1, 32))
    for model in MODELS:
        yield make(SLICE, f32(64, model.heads, model.head_dim), starts=(0, 0, 0), sizes=(-1, -1, model.head_dim // 2))


SLICE = OpDef(
    name="slice",
    summary="a box of x: `sizes` elements from `starts`",
    operands=(Operand("x"),),
    results=("out",),
    attributes=(
        Attribute("starts", "ints", doc="first index of each axis"),
        Attribute("sizes", "ints", doc="elements of each axis; -1: to its end"),
    ),
    infer=infer_slice,
    reference=slice_reference,
    sample=slice_samples,
    cost=move_cost,
    view=slice_view,
    exact=True,
    dialect=DIALECT,
)


def infer_split(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    x, sizes = required(operands, 0), ints_attr(attrs, "sizes")
    axis = axis_of("axis", attrs["axis"], x.rank)
    want_plain("x", x)
    if not sizes or min(sizes) < 0:
        raise OpError(f"attribute 'sizes' is {shape_text(sizes)}, must be one or more sizes")
    if isinstance(x.shape[axis], str):
        raise OpError(f"axis {axis} of operand 'x' is dynamic ({x.shape[axis]}) and cannot be split")
    if sum(sizes) != x.shape[axis]:
        raise OpError(
            f"attribute 'sizes' {shape_text(sizes)} sums to {sum(sizes)}, axis {axis} of 'x' has {x.shape[axis]}"
        )
    return tuple(TensorType((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype) for size in sizes)


def split_view(operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
    x, sizes = required(operands, 0), ints_attr(attrs, "sizes")
    strides = known_strides(x)
    if strides is None:
        return None
    step = strides[axis_of("axis", attrs["axis"], x.rank)]
    starts = accumulate(sizes[:-1], initial=0)
    pairs = zip(infer_split(operands, attrs), starts, strict=True)
    return tuple(View(t.shape, strides, start * step) for t, start in pairs)


def split_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    import numpy as np

    axis = attrs["axis"]
    assert isinstance(axis, int)
    return tuple(np.split(arrays[0], list(accumulate(ints_attr(attrs, "sizes")))[:-1], axis=axis))


def split_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(SPLIT, f32(3), axis=0, sizes=(3,))
    yield make(SPLIT, f32(6, 4), axis=0, sizes=(1, 5))
    for dtype in ACTIVATIONS:
        yield make(SPLIT, TensorType((rng.randrange(2, 20), 21), dtype), axis=-1, sizes=(8, 8, 5))
    for model in MODELS:
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        yield make(SPLIT, f32(7, q + 2 * kv), axis=-1, sizes=(q, kv, kv))


SPLIT = OpDef(
    name="split",
    summary="consecutive pieces of x along an axis",
    operands=(Operand("x"),),
    results=("*out",),
    attributes=(
        Attribute("axis", "int", doc="may be negative"),
        Attribute("sizes", "ints", doc="of the pieces; they sum to the axis' size"),
    ),
    infer=infer_split,
    reference=split_reference,
    sample=split_samples,
    cost=move_cost,
    view=split_view,
    exact=True,
    dialect=DIALECT,
)


def infer_concat(operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
    types = [required(operands, i) for i in range(len(operands))]
    first = types[0]
    axis = axis_of("axis", attrs["axis"], first.rank)
    shape = first.shape
    if first.dtype == ACTIVATION_FORMAT:
        raise OpError(f"operand 'xs' is of activations ({first.dtype}): only weights are concatenated in groups")
    if first.quantised and axis == first.rank - 1:
        raise OpError(f"operand 'xs' is quantised ({first.dtype}): its rows cannot be concatenated")
    for i, t in enumerate(types):
        if t.dtype != first.dtype:
            raise OpError(f"operand 'xs' number {i} has type {t.dtype}, the first has {first.dtype}")
        others = zip(t.shape, first.shape, strict=False)
        if t.rank != first.rank or not all(a == axis or same_dim(x, y) for a, (x, y) in enumerate(others)):
            have, want = shape_text(t.shape), shape_text(first.shape)
            raise OpError(
                f"operand 'xs' number {i} has shape {have}, differing from the first, {want}, off axis {axis}"
            )
        if isinstance(t.shape[axis], str) and len(types) > 1:
            raise OpError(
                f"axis {axis} of operand 'xs' number {i} is dynamic ({t.shape[axis]}) and cannot be concatenated"
            )
        shape = merged(shape, t.shape)
    if len(types) == 1:
        return (TensorType(shape, first.dtype),)
    total = sum(d for t in types if isinstance(d := t.shape[axis], int))
    return (TensorType((*shape[:axis], total, *shape[axis + 1 :]), first.dtype),)


def concat_reference(arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
    import numpy as np

    axis = attrs["axis"]
    assert isinstance(axis, int)
    return (np.concatenate(arrays, axis=axis),)


def concat_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(CONCAT, f32(3), axis=0)
    yield make(CONCAT, f32(2, 3), f32(4, 3), axis=0)
    for dtype in ACTIVATIONS:
        tokens = rng.randrange(2, 20)
        yield make(CONCAT, *(TensorType((tokens, n), dtype) for n in (8, 5, 1)), axis=-1)
    for model in MODELS:
        half = f32(7, model.heads, model.head_dim // 2)
        yield make(CONCAT, half, half, axis=2)


CONCAT = OpDef(
    name="concat",
    summary="operands one after the other along an axis",
    operands=(Operand("xs", variadic=True),),
    results=("out",),
    attributes=(Attribute("axis", "int", doc="may be negative"),),
    infer=infer_concat,
    reference=concat_reference,
    sample=concat_samples,
    cost=move_cost,
    exact=True,
    dialect=DIALECT,
)
