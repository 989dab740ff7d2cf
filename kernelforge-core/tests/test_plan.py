"""Planning: views, in-place ops, constants, groups and the arena, each proved by running the plan on the reference target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from kernelforge.constant import ArraySource
from kernelforge.errors import AssetError, PluginError, UsageError
from kernelforge.graph import Graph
from kernelforge.module import Module
from kernelforge.op import Part
from kernelforge.plan import ALIGNMENT, Plan, Step, Value
from kernelforge.planning import make_plan
from kernelforge.plugins import core_registry
from kernelforge.problem import Problem, TensorType
from kernelforge.reference import INFO, HostBuffer, ReferenceDevice
from kernelforge.selection import select

REGISTRY = core_registry()

NO_BIAS = "operandSegmentSizes = array<i32: 1, 1, 0, 0>"


def plan_of(text: str, **options: Any) -> Plan:
    function = Module.parse(text, REGISTRY).function()
    variants = REGISTRY.variants
    return make_plan(
        function, REGISTRY.ops, lambda p: select(p, variants(p.op, "reference"), INFO), target="reference", **options
    )


def run(plan: Plan, inputs: Mapping[str, Any], constants: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    return ReferenceDevice().compile(plan, ArraySource(constants or {}), REGISTRY).run(inputs)


def ops(plan: Plan) -> list[str]:
    return [step.problem.op.removeprefix("transformer.") for step in plan.steps]


CACHED = f"""
func.func @main(%x: tensor<?x8xf32> {{kernelforge.name = "x"}},
                %w: tensor<8x12xf32> {{kernelforge.name = "w", kernelforge.constant}},
                %c: tensor<1x16x2x4xf32> {{kernelforge.name = "cache", kernelforge.donated}},
                %p: tensor<?xi32> {{kernelforge.name = "positions"}}, %s: tensor<?xi32> {{kernelforge.name = "slots"}})
    -> (tensor<?x4xf32> {{kernelforge.name = "y"}}, tensor<1x16x2x4xf32> {{kernelforge.name = "cache_out"}}) {{
  %0 = "transformer.matmul"(%x, %w) {{{NO_BIAS}}} : (tensor<?x8xf32>, tensor<8x12xf32>) -> tensor<?x12xf32>
  %a = "transformer.slice"(%0) {{starts = array<i64: 0, 0>, sizes = array<i64: -1, 4>}} : (tensor<?x12xf32>) -> tensor<?x4xf32>
  %b = "transformer.slice"(%0) {{starts = array<i64: 0, 4>, sizes = array<i64: -1, 8>}} : (tensor<?x12xf32>) -> tensor<?x8xf32>
  %k = "transformer.reshape"(%b) {{shape = array<i64: -1, 2, 4>}} : (tensor<?x8xf32>) -> tensor<?x2x4xf32>
  %u = "transformer.kv_cache_update"(%c, %k, %p, %s)
      : (tensor<1x16x2x4xf32>, tensor<?x2x4xf32>, tensor<?xi32>, tensor<?xi32>) -> tensor<1x16x2x4xf32>
  return %a, %u : tensor<?x4xf32>, tensor<1x16x2x4xf32>
}}
"""


def cached_inputs(rng: np.random.Generator, tokens: int = 3) -> dict[str, Any]:
    return {
        "x": rng.standard_normal((tokens, 8)).astype(np.float32),
        "cache": HostBuffer(np.zeros((1, 16, 2, 4), np.float32)),
        "positions": np.arange(tokens, dtype=np.int32),
        "slots": np.zeros(tokens, np.int32),
    }


def test_layout_ops_become_views_and_the_cache_is_written_in_place() -> None:
    plan = plan_of(CACHED)
    assert ops(plan) == ["matmul", "kv_cache_update", "cast"]  # the cast copies the sliced output out of the arena
    rng = np.random.default_rng(0)
    inputs, w = cached_inputs(rng), rng.standard_normal((8, 12)).astype(np.float32)
    y, cache = run(plan, inputs, {"w": w})
    product = inputs["x"] @ w
    np.testing.assert_allclose(y, product[:, :4], rtol=1e-5)
    assert cache is inputs["cache"]
    np.testing.assert_allclose(cache.array[0, :3].reshape(3, 8), product[:, 4:], rtol=1e-5)
    assert not cache.array[0, 3:].any()


def picked() -> Graph:
    g = Graph()
    x, ids = g.input("x", ("tokens", 8), "f32"), g.input("ids", ("rows",), "i32")
    g.output(g.silu(g.embedding(g.silu(x), ids)), "y")
    g.output(g.embedding(g.constant("table", (1, 8), "f32"), ids), "constant")
    return g


def test_the_one_row_of_a_table_is_no_step() -> None:
    x, table = (np.random.default_rng(i).standard_normal((1, 8)).astype(np.float32) for i in range(2))
    inputs = {"x": x, "ids": np.zeros(1, np.int32)}
    several, one = (plan_of(picked().text(), dims=dims) for dims in ({}, {"tokens": 1, "rows": 1}))
    assert (ops(several).count("embedding"), ops(one).count("embedding")) == (2, 1)  # of constants there is no view
    for want, got in zip(*(run(plan, inputs, {"table": table}) for plan in (several, one)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_donated_array_is_copied_a_donated_buffer_is_not() -> None:
    inputs = cached_inputs(np.random.default_rng(1))
    inputs["cache"] = inputs["cache"].array
    _, cache = run(plan_of(CACHED), inputs, {"w": np.ones((8, 12), np.float32)})
    assert cache.any()
    assert not inputs["cache"].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(", kernelforge.donated", ""),  # the caller keeps the buffer
        lambda t: t.replace("return %a, %u", "return %a, %c"),  # the old contents are an output
    ],
)
def test_in_place_ops_copy_when_the_old_contents_must_survive(change: Any) -> None:
    text = change(CACHED)
    plan = plan_of(text)
    assert ops(plan)[:3] == ["matmul", "cast", "kv_cache_update"]
    inputs = cached_inputs(np.random.default_rng(2))
    before = inputs["cache"].array.copy()
    run(plan, inputs, {"w": np.ones((8, 12), np.float32)})
    np.testing.assert_array_equal(inputs["cache"].array, before)


def test_a_cache_is_copied_where_the_same_op_reads_it_otherwise() -> None:
    """What is written to it comes from itself: without a copy, rows would be read that were overwritten already."""
    g = Graph()
    cache = g.input("cache", (1, 16, 2, 4), "f32", donated=True)
    positions, slots = (g.input(name, (16,), "i32") for name in ("positions", "slots"))
    g.output(g.kv_cache_update(cache, cache.reshape(16, 2, 4), positions, slots), "out")
    plan = plan_of(g.text())
    assert ops(plan)[:2] == ["cast", "kv_cache_update"]
    assert plan.root(plan.steps[1].operands[0] or 0) != plan.root(plan.steps[1].operands[1] or 0)


QUANTISED_CACHE = """
func.func @main(%c: tensor<1x16x2x32x!transformer.q8> {kernelforge.name = "cache", kernelforge.donated},
                %k: tensor<?x2x32xf32> {kernelforge.name = "k"},
                %p: tensor<?xi32> {kernelforge.name = "positions"}, %s: tensor<?xi32> {kernelforge.name = "slots"})
    -> (tensor<1x16x2x32x!transformer.q8> {kernelforge.name = "cache_out"}) {
  %u = "transformer.kv_cache_update"(%c, %k, %p, %s)
      : (tensor<1x16x2x32x!transformer.q8>, tensor<?x2x32xf32>, tensor<?xi32>, tensor<?xi32>)
      -> tensor<1x16x2x32x!transformer.q8>
  return %u : tensor<1x16x2x32x!transformer.q8>
}
"""


def test_the_old_contents_of_a_quantised_cache_cannot_be_kept() -> None:
    assert ops(plan_of(QUANTISED_CACHE)) == ["kv_cache_update"]
    message = r"'cache' \(q8\[1, ?16, ?2, ?32\]\) is read after transformer.kv_cache_update at .* overwrites it"
    with pytest.raises(UsageError, match=message) as error:
        plan_of(QUANTISED_CACHE.replace("return %u", "return %c"))
    assert error.value.hint == "read it before, or read the result of that op instead"


def fused(cache: str = "f32", *, shared: bool = False) -> Graph:
    """RoPE and both cache updates, followed by attention, in one op."""
    g = Graph()
    positions, slots = (g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
    q, k, v = (g.input(name, ("tokens", heads, 32), "f32") for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    keys, values = (g.input(name, (1, 16, 2, 32), cache, donated=True) for name in ("keys", "values"))
    caches = (keys, keys) if shared else (keys, values)
    rotated, keys_out, values_out = g.rope_cache_update(q, k, v, *caches, positions, slots, max_position=16)
    g.output(rotated, "rotated")
    g.output(keys_out, "keys_out")
    g.output(values_out, "values_out")
    return g


def fused_inputs(tokens: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    heads = {"q": 4, "k": 2, "v": 2}
    arrays = {name: rng.standard_normal((tokens, n, 32)).astype(np.float32) for name, n in heads.items()}
    caches = {name: HostBuffer(np.zeros((1, 16, 2, 32), np.float32)) for name in ("keys", "values")}
    return {**arrays, **caches, "positions": np.arange(tokens, dtype=np.int32), "slots": np.zeros(tokens, np.int32)}


def test_one_op_writes_two_caches_in_place() -> None:
    plan = plan_of(fused().text())
    assert ops(plan) == ["rope_cache_update"]
    inputs = fused_inputs()
    _, keys, values = run(plan, inputs)
    assert (keys, values) == (inputs["keys"], inputs["values"])
    np.testing.assert_array_equal(values.array[0, :3], inputs["v"])
    assert not values.array[0, 3:].any()
    np.testing.assert_array_equal(keys.array[0, 0], inputs["k"][0])  # position 0 is not turned
    assert np.abs(keys.array[0, 2] - inputs["k"][2]).max() > 0.1


def test_one_op_that_writes_one_tensor_twice_gets_a_copy() -> None:
    plan = plan_of(fused(shared=True).text())
    assert ops(plan) == ["cast", "rope_cache_update", "cast"]
    inputs = fused_inputs()
    del inputs["values"]
    _, keys, values = run(plan, {**inputs, "values": HostBuffer(np.zeros((1, 16, 2, 32), np.float32))})
    keys, values = (a.array if isinstance(a, HostBuffer) else a for a in (keys, values))
    np.testing.assert_array_equal(values[0, :3], inputs["v"])
    assert np.abs(keys[0, 2] - inputs["k"][2]).max() > 0.1


def test_parts_have_parts_and_operands_that_are_absent() -> None:
    g = Graph()
    positions, slots = (g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
    q, k, v = (g.input(name, ("tokens", heads, 32), "f32") for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    keys, values = (g.input(name, (1, 16, 2, 32), "f32", donated=True) for name in ("keys", "values"))
    found = g.rope_attention(q, k, v, keys, values, positions, slots, max_position=16, scale=0.25)
    for name, value in zip(("out", "keys_out", "values_out"), found, strict=True):
        g.output(value, name)
    whole, apart = plan_of(g.text()), plan_of(g.text(), keep_whole=lambda _: False)
    assert ops(whole) == ["rope_attention"]
    assert ops(apart) == ["rope", "rope", "kv_cache_update", "kv_cache_update", "attention"]
    assert apart.steps[-1].operands[5] is None
    results = [run(plan, fused_inputs()) for plan in (whole, apart)]
    for one, other in zip(*results, strict=True):
        arrays = [a.array if isinstance(a, HostBuffer) else a for a in (one, other)]
        np.testing.assert_allclose(arrays[0], arrays[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cache", ["f32", "q8"])
def test_an_op_without_a_kernel_is_planned_as_its_parts(cache: str) -> None:
    text = fused(cache).text()
    asked: list[str] = []

    def no_kernel(problem: Problem) -> bool:
        asked.append(problem.op)
        return False

    plan = plan_of(text, keep_whole=no_kernel)
    assert ops(plan) == ["rope", "rope", "kv_cache_update", "kv_cache_update"]
    assert set(asked) == {"transformer.rope_cache_update"}  # parts have none
    assert [plan.values[plan.root(v)].name for v in plan.outputs] == ["rotated", "keys", "values"]
    if cache == "f32":
        inputs, others = fused_inputs(), fused_inputs()
        results = run(plan, inputs), run(plan_of(text), others)
        for a, b in zip(*results, strict=True):
            a, b = (x.array if isinstance(x, HostBuffer) else x for x in (a, b))
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part("transformer.silu", ("x",), ("out",)), "op 'transformer.silu' is one of its own parts"),
        (
            Part("transformer.sinh", ("x",), ("out",)),
            "parts of op 'transformer.silu' name op 'transformer.sinh', which",
        ),
        (Part("transformer.gelu", ("y",), ("out",)), "parts of op 'transformer.silu' name 'y', which is not there"),
        (Part("transformer.gelu", ("x",), ("y",)), "parts of op 'transformer.silu' do not give 'out'"),
    ],
)
def test_parts_that_do_not_make_the_whole_are_told(part: Part, message: str) -> None:
    g = Graph()
    g.output(g.silu(g.input("x", (4,), "f32")), "y")
    silu = replace(REGISTRY.ops["transformer.silu"], parts=lambda _: (part,))
    with pytest.raises(PluginError, match=message):
        make_plan(
            Module.parse(g.text(), REGISTRY).function(),
            {**REGISTRY.ops, "transformer.silu": silu},
            lambda p: select(p, REGISTRY.variants(p.op, "reference"), INFO),
            target="reference",
            keep_whole=lambda _: False,
        )


def test_parts_that_lead_back_to_their_op_are_told() -> None:
    g = Graph()
    g.output(g.silu(g.input("x", (4,), "f32")), "y")
    ring = {"transformer.silu": "transformer.gelu", "transformer.gelu": "transformer.silu"}
    circling = {
        name: replace(REGISTRY.ops[name], parts=lambda _, other=other: (Part(other, ("x",), ("out",)),))
        for name, other in ring.items()
    }
    with pytest.raises(PluginError, match=r"parts of op 'transformer\.silu' have parts without end"):
        make_plan(
            Module.parse(g.text(), REGISTRY).function(),
            {**REGISTRY.ops, **circling},
            lambda p: select(p, REGISTRY.variants(p.op, "reference"), INFO),
            target="reference",
            keep_whole=lambda _: False,
        )


def test_dims_fix_dynamic_dimensions_in_every_problem() -> None:
    plan = plan_of(CACHED, dims={"tokens": 1})
    assert plan.dims == ()
    assert all(step.dims == () for step in plan.steps)
    assert str(plan.steps[0].problem).startswith("transformer.matmul(f32[1,8], f32[8,12]@const, _, _)")
    with pytest.raises(UsageError, match="no dynamic dimension 'batch'"):
        plan_of(CACHED, dims={"batch": 1})


def test_ops_on_constants_are_folded() -> None:
    g = Graph("main")
    given = g.input("x", (2, 4), "f32")
    both = g.concat(g.constant("a", (3, 4), "bf16"), g.constant("b", (5, 4), "bf16"), axis=0)
    g.output(g.matmul(given, g.cast(both, "f32"), transpose_rhs=True), "y")
    text = g.text()
    plan = plan_of(text)
    assert ops(plan) == ["matmul"]
    import ml_dtypes

    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((n, 4)).astype(ml_dtypes.bfloat16) for n in (3, 5))
    x = rng.standard_normal((2, 4)).astype(np.float32)
    (y,) = run(plan, {"x": x}, {"a": a, "b": b})
    np.testing.assert_allclose(y, x @ np.concatenate([a, b]).astype(np.float32).T, rtol=1e-5)
    with pytest.raises(AssetError, match=r"constant 'a' is f32\[3,4\], the module wants bf16\[3, 4\]"):
        run(plan, {"x": x}, {"a": a.astype(np.float32), "b": b})
    with pytest.raises(AssetError, match="no constant 'b'"):
        run(plan, {"x": x}, {"a": a})


def chain(length: int) -> str:
    """x -> silu -> silu ..., and a sum of all of them, so that lifetimes of every length occur."""
    lines = [f'%{i + 1} = "transformer.silu"(%{i}) : (tensor<?x7xf32>) -> tensor<?x7xf32>' for i in range(length)]
    total = "%1"
    for i in range(2, length + 1):
        lines.append(
            f'%s{i} = "transformer.add"({total}, %{i}) : (tensor<?x7xf32>, tensor<?x7xf32>) -> tensor<?x7xf32>'
        )
        total = f"%s{i}"
    body = "\n".join(lines)
    return f"func.func @main(%0: tensor<?x7xf32>) -> tensor<?x7xf32> {{\n{body}\nreturn {total} : tensor<?x7xf32> }}"


def test_values_that_live_together_never_share_memory_and_memory_is_reused() -> None:
    plan = plan_of(chain(9))
    layout = plan.pack({"tokens": 5})
    spans = plan.lifetimes
    size = -(-5 * 7 * 4 // ALIGNMENT) * ALIGNMENT
    for v, offset in layout.offsets.items():
        assert offset % ALIGNMENT == 0
        for other, place in layout.offsets.items():
            together = spans[v][0] <= spans[other][1] and spans[other][0] <= spans[v][1]
            if v != other and together:
                assert offset + size <= place or place + size <= offset
    assert layout.nbytes < len(layout.offsets) * size
    line = plan_of(chain(9).replace("return %s9", "return %9"))
    assert line.pack({"tokens": 5}).nbytes < layout.nbytes


@pytest.mark.parametrize("seed", range(8))
def test_values_of_any_size_that_live_together_never_share_memory(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = tuple(Value(TensorType((int(n),), "f32"), "arena") for n in rng.integers(1, 600, 24))
    spans = {v: sorted(rng.integers(0, 12, 2).tolist()) for v in range(len(values))}
    problem = REGISTRY.ops["transformer.silu"].problem([TensorType((1,), "f32")], {})
    steps = tuple(Step(problem, (), (v,), (v,), "", {}, group) for v, span in spans.items() for group in span)
    plan = Plan("reference", values, steps, (), ())
    layout = plan.pack({})
    places = {v: range(o, o + 4 * int(values[v].type.shape[0])) for v, o in layout.offsets.items()}
    assert max(place.stop for place in places.values()) <= layout.nbytes
    for (v, a), (w, b) in combinations(places.items(), 2):
        if spans[v][0] <= spans[w][1] and spans[w][0] <= spans[v][1]:
            assert a.stop <= b.start or b.stop <= a.start


def test_independent_steps_share_a_group_and_dependent_ones_never() -> None:
    text = """
    func.func @main(%x: tensor<4xf32>, %y: tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>) {
      %a = "transformer.silu"(%x) : (tensor<4xf32>) -> tensor<4xf32>
      %b = "transformer.silu"(%y) : (tensor<4xf32>) -> tensor<4xf32>
      %c = "transformer.add"(%a, %b) : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
      return %c, %a : tensor<4xf32>, tensor<4xf32>
    }"""
    assert [step.group for step in plan_of(text).steps] == [0, 0, 1]


@pytest.mark.parametrize(("x", "y"), [(16, 64), (64, 16)])
def test_memory_is_not_reused_within_a_group(x: int, y: int) -> None:
    text = """
    func.func @main(%x: tensor<Xxf32>, %y: tensor<Yxf32>) -> (tensor<Xxf32>, tensor<Yxf32>) {
      %a = "transformer.silu"(%x) : (tensor<Xxf32>) -> tensor<Xxf32>
      %b = "transformer.silu"(%a) : (tensor<Xxf32>) -> tensor<Xxf32>
      %c = "transformer.silu"(%y) : (tensor<Yxf32>) -> tensor<Yxf32>
      %d = "transformer.silu"(%b) : (tensor<Xxf32>) -> tensor<Xxf32>
      %e = "transformer.silu"(%c) : (tensor<Yxf32>) -> tensor<Yxf32>
      return %d, %e : tensor<Xxf32>, tensor<Yxf32>
    }"""
    plan = plan_of(text.replace("X", str(x)).replace("Y", str(y)))
    assert [step.group for step in plan.steps] == [0, 1, 1, 2, 2]
    assert plan.pack({}).nbytes == 4 * (2 * x + y)  # %a is read while %b and %c are written


def test_memory_is_not_overwritten_while_it_is_read() -> None:
    cache = "tensor<1x16x2x4xf32>"
    text = f"""
    func.func @main(%c: {cache} {{kernelforge.donated}}, %k: tensor<?x2x4xf32>, %p: tensor<?xi32>, %s: tensor<?xi32>)
        -> ({cache}, {cache}) {{
      %r = "transformer.silu"(%c) : ({cache}) -> {cache}
      %u = "transformer.kv_cache_update"(%c, %k, %p, %s)
          : ({cache}, tensor<?x2x4xf32>, tensor<?xi32>, tensor<?xi32>) -> {cache}
      return %r, %u : {cache}, {cache}
    }}"""
    assert [step.group for step in plan_of(text).steps] == [0, 1]


def test_an_input_that_is_an_output_is_copied_a_donated_buffer_is_not() -> None:
    text = """func.func @main(%x: tensor<4xf32> {kernelforge.name = "x"DONATED}) -> tensor<4xf32> {
      return %x : tensor<4xf32> }"""
    x = np.arange(4, dtype=np.float32)
    (y,) = run(plan_of(text.replace("DONATED", "")), {"x": x})
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(y, x)
    buffer = HostBuffer(x)
    (same,) = run(plan_of(text.replace("DONATED", ", kernelforge.donated")), {"x": buffer})
    assert same is buffer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "input 'x' is missing"),
        ({"z": np.zeros(1)}, "unknown input 'z'"),
        ({"x": np.zeros((3, 8))}, "has dtype float64, wants f32"),
        ({"x": np.zeros(8, np.float32)}, r"has shape \(8,\), wants \['tokens', 8\]"),
        ({"x": np.zeros((3, 9), np.float32)}, r"has shape \(3, 9\)"),
        ({"x": np.zeros((4, 8), np.float32)}, "tokens="),
    ],
)
def test_inputs_are_checked(change: dict[str, Any], message: str) -> None:
    inputs = {**cached_inputs(np.random.default_rng(4)), **change}
    given = {k: v for k, v in inputs.items() if v is not None}
    with pytest.raises(UsageError, match=message):
        run(plan_of(CACHED), given, {"w": np.ones((8, 12), np.float32)})


def test_strided_inputs_are_accepted() -> None:
    inputs = cached_inputs(np.random.default_rng(5))
    wide = np.zeros((3, 16), np.float32)
    wide[:, ::2] = inputs["x"]
    w = np.random.default_rng(6).standard_normal((8, 12)).astype(np.float32)
    y, _ = run(plan_of(CACHED), {**inputs, "x": wide[:, ::2]}, {"w": w})
    np.testing.assert_allclose(y, (inputs["x"] @ w)[:, :4], rtol=1e-5)
