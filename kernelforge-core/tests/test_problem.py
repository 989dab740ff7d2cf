"""Problems and tensor types: keys that round-trip, layouts, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelforge.errors import UsageError
from kernelforge.problem import Problem, TensorType, parse_problem, parse_tensor_type

dims = st.one_of(st.integers(0, 30000), st.sampled_from(["tokens", "?0", "?1"]))
"""Four of the largest still are a tensor that memory could have: larger ones are refused, see below."""
dtypes = st.sampled_from(["f64", "f32", "bf16", "f16", "i32", "i8"])


@st.composite
def tensor_types(draw: st.DrawFn) -> TensorType:
    shape = tuple(draw(st.lists(dims, max_size=4)))
    strides = draw(st.none() | st.lists(st.integers(0, 9999), min_size=len(shape), max_size=len(shape)).map(tuple))
    return TensorType(shape, draw(dtypes), strides, draw(st.booleans()))


attr_values = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12),
    st.lists(st.integers(-9, 9), max_size=4).map(tuple),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    operands = tuple(draw(st.lists(st.none() | tensor_types(), min_size=1, max_size=4)))
    results = tuple(draw(st.lists(tensor_types(), min_size=1, max_size=2)))
    attrs = draw(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), attr_values, max_size=4))
    return Problem("transformer.matmul", operands, results, tuple(sorted(attrs.items())))


@given(problems())
def test_problem_key_round_trips(problem: Problem) -> None:
    back = parse_problem(str(problem))
    assert back == problem
    assert [type(v) for _, v in back.attrs] == [type(v) for _, v in problem.attrs]


@given(tensor_types())
def test_tensor_type_round_trips(t: TensorType) -> None:
    assert parse_tensor_type(str(t)) == t


def test_canonical_renames_dynamic_dimensions_by_first_appearance() -> None:
    x = TensorType(("rows", 8), "f32")
    y = TensorType(("tokens", "rows"), "f32")
    problem = Problem("d.op", (x, y), (x,)).canonical()
    assert [t.shape for t in problem.operands if t] == [("?0", 8), ("?1", "?0")]
    assert problem.canonical() is problem
    assert Problem("d.op", (x, y), (x,)).with_dims({"rows": 3}).operand(0).shape == (3, 8)


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((2, 3), None, True),
        ((2, 3), (3, 1), True),
        ((2, 3), (4, 1), False),
        ((1, 3), (99, 1), True),
        (("tokens", 3), (3, 1), True),
        (("tokens", 3), (6, 1), False),
        ((2, "tokens"), (5, 1), False),
    ],
)
def test_contiguity(shape: tuple[int | str, ...], strides: tuple[int, ...] | None, contiguous: bool) -> None:
    assert TensorType(shape, "f32", strides).contiguous is contiguous


def test_sizes_of_dynamic_types_need_the_dimension() -> None:
    t = TensorType(("tokens", 4), "bf16")
    assert t.nbytes({"tokens": 3}) == 24
    with pytest.raises(UsageError, match="dynamic dimension 'tokens' has no size"):
        t.size()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorType((2,), "f23"), "unknown dtype 'f23'"),
        (lambda: TensorType((-1,), "f32"), "negative dimension -1"),
        (lambda: TensorType((1 << 30, "?0", 0, 1 << 30), "f32"), "more elements than memory can have"),
        (lambda: TensorType((2, 2), "f32", (1,)), "1 strides for a tensor of rank 2"),
        (lambda: parse_tensor_type("f32(2)"), "is not a tensor type"),
        (lambda: parse_tensor_type("f32[2,x y]"), "is not a dimension"),
        (lambda: parse_problem("matmul"), "is not a problem"),
        (lambda: Problem("matmul", (), ()), "is not an op name"),
        (lambda: Problem("a.b", (), (), (("z", 1), ("a", 2))), "must be sorted and unique"),
        (lambda: Problem("a.b", (None,), ()).operand(0), "has no operand 0"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]
