"""`canonicalize` and `cse`: each normal form, and what must stay as it is."""

from __future__ import annotations

import pytest
from pass_checks import REGISTRY, check, lowered, ops

from kernelforge.graph import Graph, Tensor
from kernelforge.module import Function, Module


def graph(dtype: str = "f32", shape: tuple[int | str, ...] = ("tokens", 4, 6)) -> tuple[Graph, Tensor]:
    g = Graph()
    return g, g.input("x", shape, dtype)


def canonical(g: Graph, y: Tensor) -> Function:
    g.output(y, "y")
    return check(g, "canonicalize").function()


def short(function: Function) -> list[str]:
    return [node.op.partition(".")[2] for node in function.nodes]


def test_dead_code_is_removed() -> None:
    g, x = graph()
    g.silu(g.gelu(x))
    g.kv_cache_update(g.input("c", (4, 8, 4, 6), "f32"), x, *(g.input(n, ("tokens",), "i32") for n in ("p", "s")))
    assert short(canonical(g, x + x)) == ["add"]


def test_idle_ops_are_removed() -> None:
    g, x = graph()
    y = x.reshape("tokens", 4, 6).cast("f32").transpose(0, 1, 2)
    y = g.slice(y, (0, 0, 0), (-1, 4, -1))
    y = g.concat(*y.split((6,)), axis=1)
    assert short(canonical(g, g.silu(y))) == ["silu"]


def test_idle_ops_may_leave_nothing() -> None:
    g, x = graph()
    assert short(canonical(g, x.reshape("tokens", 4, 6))) == []


def test_layout_ops_that_do_something_stay() -> None:
    g, x = graph(shape=(4, 4, 6))
    g.output(x.transpose(1, 0, 2), "transposed")
    g.output(g.slice(x, (0, 1, 0), (-1, 3, -1)), "cut")
    g.output(x.reshape(6, 4, 4), "reshaped")
    g.output(x.split((2, 4))[1], "piece")
    g.output(g.concat(x, x), "twice")
    assert ops(check(g, "canonicalize")) == ops(g)


def test_reshapes_become_one() -> None:
    g, x = graph()
    function = canonical(g, g.silu(x.reshape("tokens", 24).reshape("tokens", 2, 12).reshape(2, "tokens", 3, 4)))
    assert short(function) == ["reshape", "silu"]
    assert function.nodes[0].problem.attr("shape") == (2, -1, 3, 4)


def test_reshapes_that_cancel_are_removed() -> None:
    g, x = graph()
    assert short(canonical(g, g.silu(x.reshape("tokens", 24).reshape("tokens", 4, 6)))) == ["silu"]


def test_reshapes_of_static_shapes() -> None:
    g, x = graph(shape=(2, 4, 6))
    function = canonical(g, g.silu(x.reshape(-1, 6).reshape(3, -1).reshape(48)))
    assert function.nodes[0].problem.attr("shape") == (48,)


def test_reshape_used_twice_is_looked_through() -> None:
    g, x = graph()
    flat = x.reshape("tokens", 24)
    g.output(g.silu(flat), "flat")
    assert short(canonical(g, g.silu(flat.reshape("tokens", 6, 4)))) == ["reshape", "silu", "reshape", "silu"]


@pytest.mark.parametrize(("first", "second"), [((1, 2, 0), (1, 2, 0)), ((2, 1, 0), (0, 2, 1)), ((1, 0, 2), (2, 0, 1))])
def test_transposes_become_one(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    g, x = graph()
    assert short(canonical(g, g.silu(x.transpose(*first).transpose(*second)))) == ["transpose", "silu"]


def test_transposes_that_cancel_are_removed() -> None:
    g, x = graph()
    assert short(canonical(g, g.silu(x.transpose(1, 2, 0).transpose(2, 0, 1)))) == ["silu"]


LOSSLESS = ["bf16 f32 bf16", "f16 f32 f16", "f16 f32 bf16", "bf16 f32 f64", "f32 f64 f16", "i32 f64 f32", "i8 f16 f32"]
LOSSY = ["f32 bf16 f32", "f32 f16 f64", "f16 bf16 f32", "bf16 f16 f32", "f64 f32 f64", "i32 f32 f64", "f32 i32 f32"]


@pytest.mark.parametrize("dtypes", LOSSLESS)
def test_lossless_casts_are_skipped(dtypes: str) -> None:
    source, between, target = dtypes.split()
    g, x = graph(source)
    function = canonical(g, x.cast(between).cast(target))
    assert short(function) == ([] if source == target else ["cast"])


@pytest.mark.parametrize("dtypes", LOSSY)
def test_casts_that_round_stay(dtypes: str) -> None:
    source, between, target = dtypes.split()
    g, x = graph(source)
    assert short(canonical(g, x.cast(between).cast(target))) == ["cast", "cast"]


def looked_up(dtype: str) -> tuple[Graph, Tensor]:
    g = Graph()
    return g, g.embedding(g.constant("table", (5, 6), "bf16"), g.input("ids", ("tokens",), "i32"), dtype=dtype)


@pytest.mark.parametrize("dtype", ["", "bf16", "f32"])
def test_embedding_casts_its_rows(dtype: str) -> None:
    g, rows = looked_up(dtype)
    function = canonical(g, rows.cast("f64"))
    assert short(function) == ["embedding"]
    assert function.nodes[0].problem.attr("dtype") == "f64"


@pytest.mark.parametrize(("dtype", "found"), [("", ["embedding", "rms_norm"]), ("bf16", ["rms_norm", "embedding"])])
def test_rows_are_picked_before_they_are_normalised(dtype: str, found: list[str]) -> None:
    g, x = graph(shape=(9, 6))
    normed = g.rms_norm(x, g.constant("w", (6,), "f32"), eps=1e-3)
    function = canonical(g, g.embedding(normed, g.input("rows", ("rows",), "i32"), dtype=dtype))
    assert short(function) == found
    assert next(n for n in function.nodes if n.op.endswith("norm")).problem.attr("eps") == 1e-3


def test_a_norm_of_constants_stays_one_constant() -> None:
    """It is computed once, when compiling."""
    g, _ = graph()
    normed = g.rms_norm(g.constant("table", (9, 6), "f32"), g.constant("w", (6,), "f32"))
    assert short(canonical(g, g.embedding(normed, g.input("rows", ("rows",), "i32")))) == ["rms_norm", "embedding"]


def test_rows_of_a_norm_that_others_read_are_picked_after_it() -> None:
    g, x = graph(shape=(9, 6))
    normed = g.rms_norm(x, g.constant("w", (6,), "f32"))
    g.output(normed, "normed")
    assert short(canonical(g, g.embedding(normed, g.input("rows", ("rows",), "i32")))) == ["rms_norm", "embedding"]


def test_embedding_that_rounds_keeps_its_cast() -> None:
    g, rows = looked_up("f16")
    assert short(canonical(g, rows.cast("f32"))) == ["embedding", "cast"]


def test_embedding_that_is_used_twice_keeps_its_cast() -> None:
    g, rows = looked_up("")
    g.output(rows, "rows")
    assert short(canonical(g, rows.cast("f32"))) == ["embedding", "cast"]


def test_embedding_whose_other_user_is_dead_casts() -> None:
    g, rows = looked_up("")
    g.silu(rows)
    assert short(canonical(g, rows.cast("f32"))) == ["embedding"]


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_transposed_weight_becomes_an_attribute(transpose_rhs: bool) -> None:
    g, x = graph(shape=("tokens", 6))
    w = g.constant("w", (6, 8) if transpose_rhs else (8, 6), "f32").T
    b, r = g.constant("b", (8,), "f32"), g.input("r", ("tokens", 8), "f32")
    function = canonical(g, g.matmul(x, w, b, r, transpose_rhs=transpose_rhs, epilogue="silu"))
    assert short(function) == ["matmul"]
    assert function.nodes[0].problem.attr("transpose_rhs") is not transpose_rhs


def test_transposed_batches() -> None:
    g, x = graph(shape=(2, 4, 6))
    y = g.input("y", (2, 5, 6), "f32")
    g.output(g.matmul(x, y.transpose(0, 2, 1)), "swapped")
    z = g.input("z", (6, 2, 5), "f32")
    function = canonical(g, g.matmul(x, z.transpose(1, 0, 2)))
    assert short(function) == ["matmul", "transpose", "matmul"]


@pytest.mark.parametrize("name", ["add", "mul"])
def test_what_is_broadcast_or_constant_comes_second(name: str) -> None:
    g, x = graph(shape=("tokens", 6))
    make = getattr(g, name)
    c, full = g.constant("c", (6,), "f32"), g.input("f", ("tokens", 6), "f32")
    table = g.constant("t", (3, 6), "f32")
    g.output(make(c, x), "broadcast")
    g.output(make(x, full), "as they are")
    g.output(make(table, g.input("s", (3, 6), "f32")), "constant")
    function = check(g, "canonicalize").function()
    names = [arg.name for arg in function.args]
    operands = [[names[v] for v in node.operands if v is not None] for node in function.nodes]
    assert operands == [["x", "c"], ["x", "f"], ["s", "t"]]


def test_order_stays_where_the_dtype_would_change() -> None:
    g, x = graph("bf16", shape=("tokens", 6))
    c = g.constant("c", (6,), "f32")
    g.output(c + x, "wide")
    g.output(c * c, "constants")
    function = check(g, "canonicalize").function()
    assert [node.operands[0] for node in function.nodes] == [1, 1]


STATED = """
func.func @main(%x: tensor<?x8xf32>) -> tensor<3x8xf32> {
  %0 = "transformer.reshape"(%x) {shape = array<i64: -1, 2, 4>} : (tensor<?x8xf32>) -> tensor<3x2x4xf32>
  %1 = "transformer.transpose"(%0) {perm = array<i64: 1, 0, 2>} : (tensor<3x2x4xf32>) -> tensor<2x3x4xf32>
  %2 = "transformer.transpose"(%1) {perm = array<i64: 1, 0, 2>} : (tensor<2x3x4xf32>) -> tensor<3x2x4xf32>
  %3 = "transformer.reshape"(%2) {shape = array<i64: 3, 8>} : (tensor<3x2x4xf32>) -> tensor<3x8xf32>
  %4 = "transformer.cast"(%x) {dtype = "f64"} : (tensor<?x8xf32>) -> tensor<3x8xf64>
  %5 = "transformer.cast"(%4) {dtype = "f32"} : (tensor<3x8xf64>) -> tensor<3x8xf32>
  %6 = "transformer.add"(%3, %5) : (tensor<3x8xf32>, tensor<3x8xf32>) -> tensor<3x8xf32>
  return %6 : tensor<3x8xf32>
}"""


def test_sizes_that_only_the_module_states_are_kept() -> None:
    """The result of the second reshape could not be inferred from the first one's operand."""
    after = str(lowered(Module.parse(STATED, REGISTRY), "canonicalize"))
    assert after.count("reshape") == 2
    assert "transpose" not in after
    assert '"transformer.cast"(%arg0) {dtype = "f32"} : (tensor<?x8xf32>) -> tensor<3x8xf32>' in after


def test_equal_ops_are_computed_once() -> None:
    g, x = graph(shape=("tokens", 6))
    w = g.constant("w", (6, 6), "f32")
    g.output(g.silu(x @ w) + g.silu(x @ w), "y")
    g.output(g.matmul(x, w, transpose_rhs=True), "other attribute")
    assert ops(check(g, "cse")) == {"matmul": 2, "silu": 1, "add": 1}


def test_equal_cache_updates_are_computed_once() -> None:
    g, new = graph()
    cache = g.input("c", (4, 8, 4, 6), "f32", donated=True)
    p, s = (g.input(n, ("tokens",), "i32") for n in ("p", "s"))
    g.output(g.kv_cache_update(cache, new, p, s) + g.kv_cache_update(cache, new, p, s), "y")
    assert ops(lowered(g, "cse")) == {"kv_cache_update": 1, "add": 1}
