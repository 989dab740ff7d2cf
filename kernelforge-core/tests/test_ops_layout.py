from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from kernelforge.dialects.transformer.layout import CONCAT, RESHAPE, SLICE, SPLIT, TRANSPOSE
from kernelforge.dialects.transformer.strides import reshaped_strides
from kernelforge.dtype import from_numpy
from kernelforge.op import OpDef
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]


def run(op: OpDef, *arrays: Array, **attrs: Attr) -> tuple[Array, ...]:
    problem = op.problem([TensorType(a.shape, from_numpy(a.dtype)) for a in arrays], attrs)
    out = op.evaluate(problem, arrays)
    assert [o.shape for o in out] == [t.shape for t in problem.results]
    assert all(o.dtype == arrays[0].dtype for o in out)
    return out


def counting(*shape: int) -> Array:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


CASES: list[tuple[OpDef, tuple[int, ...], dict[str, Attr]]] = [
    (RESHAPE, (4, 6), {"shape": (2, 2, -1)}),
    (RESHAPE, (4, 6), {"shape": (1, 24, 1)}),
    (RESHAPE, (1,), {"shape": ()}),
    (RESHAPE, (0, 3), {"shape": (3, -1)}),
    (TRANSPOSE, (2, 3, 4), {"perm": (2, 0, 1)}),
    (TRANSPOSE, (), {"perm": ()}),
    (SLICE, (4, 6, 5), {"starts": (1, 0, 2), "sizes": (2, -1, -1)}),
    (SLICE, (4,), {"starts": (4,), "sizes": (0,)}),
    (SPLIT, (6, 4), {"axis": 0, "sizes": (1, 0, 5)}),
    (SPLIT, (3, 8), {"axis": -1, "sizes": (2, 4, 2)}),
    (SPLIT, (3,), {"axis": 0, "sizes": (3,)}),
]


def expected(op: OpDef, x: Array, attrs: dict[str, Any]) -> list[Array]:
    if op is RESHAPE:
        return [x.reshape(attrs["shape"])]
    if op is TRANSPOSE:
        return [np.transpose(x, attrs["perm"])]
    if op is SLICE:
        ends = [d if n == -1 else s + n for d, s, n in zip(x.shape, attrs["starts"], attrs["sizes"], strict=True)]
        return [x[tuple(slice(s, e) for s, e in zip(attrs["starts"], ends, strict=True))]]
    moved, pieces, start = np.moveaxis(x, attrs["axis"], 0), [], 0
    for size in attrs["sizes"]:
        pieces.append(np.moveaxis(moved[start : start + size], 0, attrs["axis"]))
        start += size
    return pieces


@pytest.mark.parametrize(("op", "shape", "attrs"), CASES)
def test_values_are_numpys(op: OpDef, shape: tuple[int, ...], attrs: dict[str, Attr]) -> None:
    x = counting(*shape)
    for got, want in zip(run(op, x, **attrs), expected(op, x, attrs), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("op", "shape", "attrs"), CASES)
def test_views_read_the_same_elements(op: OpDef, shape: tuple[int, ...], attrs: dict[str, Attr]) -> None:
    x = counting(*shape)
    views = op.views([TensorType(shape, "f32")], op.complete_attrs(attrs))
    assert views is not None
    memory = np.append(x.reshape(-1), np.float32(-1))  # an empty view may point one past the end
    for view, want in zip(views, expected(op, x, attrs), strict=True):
        got = as_strided(memory[view.offset :], view.shape, [s * 4 for s in view.strides])  # type: ignore[arg-type]  # static
        np.testing.assert_array_equal(got, want)


def all_reshapes(size: int) -> list[tuple[int, ...]]:
    factors = [f for f in range(1, size + 1) if size % f == 0]
    return [s for rank in (1, 2, 3) for s in itertools.product(factors, repeat=rank) if np.prod(s) == size]


@pytest.mark.parametrize("perm", list(itertools.permutations(range(3))))
def test_reshape_of_a_strided_view_is_a_view_when_numpy_finds_one(perm: tuple[int, int, int]) -> None:
    x = counting(2, 3, 4).transpose(perm)[:, :, :]
    t = TensorType(x.shape, "f32", tuple(s // 4 for s in x.strides))
    for shape in all_reshapes(24):
        views = RESHAPE.views([t], {"shape": shape})
        reshaped = x.reshape(shape)
        if np.shares_memory(x, reshaped):
            assert views is not None, shape
            got = as_strided(x, shape, [s * 4 for s in views[0].strides])
            np.testing.assert_array_equal(got, reshaped)
        else:
            assert views is None, shape


def test_views_of_views_keep_strides_and_offsets() -> None:
    x = TensorType((6, 12), "f32", (40, 2))
    assert SLICE.views([x], {"starts": (2, 3), "sizes": (2, 4)}) == SLICE.views(
        [x], {"starts": (2, 3), "sizes": (2, 4)}
    )
    (cut,) = SLICE.views([x], {"starts": (2, 3), "sizes": (-1, 4)}) or ()
    assert (cut.shape, cut.strides, cut.offset) == ((4, 4), (40, 2), 86)
    first, second = SPLIT.views([x], {"axis": 1, "sizes": (5, 7)}) or ()
    assert (first.offset, second.offset, second.strides, second.shape) == (0, 10, (40, 2), (6, 7))
    (turned,) = TRANSPOSE.views([x], {"perm": (1, 0)}) or ()
    assert (turned.shape, turned.strides) == ((12, 6), (2, 40))
    (heads,) = RESHAPE.views([x], {"shape": (6, 3, 4)}) or ()
    assert heads.strides == (40, 8, 2)
    assert RESHAPE.views([x], {"shape": (72,)}) is None


def test_views_with_a_dynamic_dimension() -> None:
    x = TensorType(("tokens", 12), "f32")
    (heads,) = RESHAPE.views([x], {"shape": (-1, 3, 4)}) or ()
    assert (heads.shape, heads.strides) == (("tokens", 3, 4), (12, 4, 1))
    (batch,) = RESHAPE.views([x], {"shape": (1, -1, 12)}) or ()
    assert (batch.shape, batch.strides[1:]) == ((1, "tokens", 12), (12, 1))
    (turned,) = TRANSPOSE.views([TensorType(("tokens", 3, 4), "f32")], {"perm": (1, 0, 2)}) or ()
    assert (turned.shape, turned.strides) == ((3, "tokens", 4), (4, 12, 1))
    (back,) = TRANSPOSE.views([TensorType(turned.shape, "f32", turned.strides)], {"perm": (1, 0, 2)}) or ()
    assert back.strides == (12, 4, 1)
    (cut,) = SLICE.views([x], {"starts": (0, 4), "sizes": (-1, 4)}) or ()
    assert (cut.shape, cut.strides, cut.offset) == (("tokens", 4), (12, 1), 4)
    parts = SPLIT.views([x], {"axis": -1, "sizes": (8, 4)}) or ()
    assert [(p.shape, p.offset) for p in parts] == [(("tokens", 8), 0), (("tokens", 4), 8)]


def test_no_view_where_a_stride_would_depend_on_a_dynamic_dimension() -> None:
    inner = TensorType((3, "tokens", 4), "f32")
    assert TRANSPOSE.views([inner], {"perm": (1, 0, 2)}) is None
    assert SLICE.views([inner], {"starts": (1, 0, 0), "sizes": (1, -1, -1)}) is None
    assert SPLIT.views([inner], {"axis": 0, "sizes": (1, 2)}) is None
    assert RESHAPE.views([inner], {"shape": (-1, 12)}) is None
    assert reshaped_strides(("tokens", 6), (6, 1), (2, "tokens", 3)) is None
    turned = TensorType(("tokens", 3, 4), "f32", (4, 99, 1))
    assert RESHAPE.views([turned], {"shape": (-1, 12)}) is None


def test_a_reshape_may_move_the_dynamic_dimension_past_strides_that_allow_it() -> None:
    assert reshaped_strides((2, "tokens", 6), (600, 6, 1), (2, "tokens", 2, 3)) == (600, 6, 3, 1)
    assert reshaped_strides((1, "tokens", 6), (0, 6, 1), ("tokens", 1, 6)) == (6, 6, 1)


def test_concat() -> None:
    parts = [counting(2, n, 3) + 100 * n for n in (1, 4, 2)]
    for axis in (1, -2):
        (out,) = run(CONCAT, *parts, axis=axis)
        np.testing.assert_array_equal(out, np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(run(CONCAT, parts[0], axis=0)[0], parts[0])
    assert CONCAT.views([TensorType((2,), "f32")], {"axis": 0}) is None


def test_concat_of_dynamic_rows() -> None:
    types = [TensorType(("tokens", n), "f32") for n in (3, 5)]
    assert CONCAT.problem(types, {"axis": -1}).results[0].shape == ("tokens", 8)
    assert CONCAT.problem(types[:1], {"axis": 0}).results[0].shape == ("tokens", 3)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.int32, np.int8])
def test_elements_of_any_type_move_unchanged(dtype: type) -> None:
    x: Array = counting(2, 3).astype(dtype)
    np.testing.assert_array_equal(run(TRANSPOSE, x, perm=(1, 0))[0], x.T)
    nan: Array = np.array([np.nan, -0.0], np.float32)
    assert run(RESHAPE, nan, shape=(2, 1))[0].tobytes() == nan.tobytes()


def test_costs_count_what_moves() -> None:
    x = TensorType((3, 8), "f32")
    whole = RESHAPE.problem_cost(RESHAPE.problem([x], {"shape": (24,)}))
    assert (whole.flops, whole.bytes) == (0, 192)
    assert SPLIT.problem_cost(SPLIT.problem([x], {"axis": 1, "sizes": (3, 5)})).bytes == 192
    assert SLICE.problem_cost(SLICE.problem([x], {"starts": (0, 0), "sizes": (1, 1)})).bytes == 100
