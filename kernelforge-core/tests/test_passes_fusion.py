"""The fusions: what they fuse, what they leave alone, and that the results stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pass_checks import REGISTRY, check, lowered, ops

from kernelforge.graph import Graph, Tensor
from kernelforge.module import Module
from kernelforge.problem import Attr

FUSE_CACHE = "fuse-rope-cache"
D = "f64"
"""Most graphs are in float64, so that a wrong fusion cannot hide among roundings."""


def linear(g: Graph, x: Tensor, name: str, n: int, *, dtype: str = D, bias: bool = False) -> Tensor:
    k = x.shape[-1]
    assert isinstance(k, int)
    w = g.constant(f"{name}.w", (n, k), dtype)
    return g.matmul(x, w, g.constant(f"{name}.b", (n,), dtype) if bias else None, transpose_rhs=True)


def start(*shape: int | str, dtype: str = D) -> tuple[Graph, Tensor]:
    g = Graph()
    return g, g.input("x", shape or ("tokens", 6), dtype)


# fuse-epilogue


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", ["", "first", "second"])
@pytest.mark.parametrize("residual", ["", "first", "second"])
def test_epilogue_takes_bias_activation_and_residual(activation: str, bias: str, residual: str) -> None:
    g, x = start()
    y = linear(g, x, "w", 8)
    if bias:
        b = g.constant("b", (8,), D)
        y = b + y if bias == "first" else y + b
    if activation == "silu":
        y = g.silu(y)
    elif activation != "none":
        y = g.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual:
        r = g.input("r", ("tokens", 8), D)
        y = r + y if residual == "first" else y + r
    g.output(y, "y")
    after = check(g, "fuse-epilogue")
    assert ops(after) == {"matmul": 1}
    (node,) = after.function().nodes
    assert node.problem.attr("epilogue") == activation
    assert [t is not None for t in node.problem.operands[2:]] == [bool(bias), bool(residual)]
    assert node.problem.attr("transpose_rhs") is True


def test_epilogue_extends_what_a_matmul_has() -> None:
    g, x = start()
    y = g.silu(linear(g, x, "w", 6, bias=True))
    g.output(y + x, "y")
    assert ops(check(g, "fuse-epilogue")) == {"matmul": 1}


def test_epilogue_of_batched_matmul() -> None:
    g = Graph()
    x, y = g.input("x", (2, 3, 4), D), g.input("y", (2, 4, 5), D)
    g.output(g.gelu(g.matmul(x, y) + g.constant("b", (5,), D)) + g.input("r", (2, 3, 5), D), "out")
    assert ops(check(g, "fuse-epilogue")) == {"matmul": 1}


def test_residual_may_be_defined_after_the_matmul() -> None:
    g, x = start()
    product = linear(g, x, "w", 6)
    late = g.rms_norm(x, g.constant("n", (6,), D))
    g.output(product + late, "y")
    after = check(g, "fuse-epilogue")
    assert [n.op for n in after.function().nodes] == ["transformer.rms_norm", "transformer.matmul"]


def test_sum_of_two_products_takes_one_as_residual() -> None:
    g, x = start()
    g.output(linear(g, x, "a", 8) + linear(g, x, "b", 8), "y")
    assert ops(check(g, "fuse-epilogue")) == {"matmul": 2}


def _used_twice(g: Graph, x: Tensor) -> Tensor:
    product = linear(g, x, "w", 6)
    return g.silu(product) * product


def _squared(g: Graph, x: Tensor) -> Tensor:
    product = linear(g, x, "w", 6)
    return product + product


def _is_output(g: Graph, x: Tensor) -> Tensor:
    product = linear(g, x, "w", 6)
    g.output(product, "product")
    return product + x


def _bias_after_activation(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "w", 6)) + g.constant("b", (6,), D)


def _bias_after_residual(g: Graph, x: Tensor) -> Tensor:
    return (linear(g, x, "w", 6) + x) + g.constant("b", (6,), D)


def _activation_after_residual(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "w", 6) + x)


def _two_activations(g: Graph, x: Tensor) -> Tensor:
    return g.gelu(g.silu(linear(g, x, "w", 6)))


def _two_residuals(g: Graph, x: Tensor) -> Tensor:
    return (linear(g, x, "w", 6) + x) + x


def _second_bias(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6, bias=True) + g.constant("c", (6,), D)


def _input_as_bias(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.input("b", (6,), D)


def _scalar_bias(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.constant("b", (1,), D)


def _row_residual(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.input("r", (1, 6), D)


def _column_residual(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.input("r", ("tokens", 1), D)


def _broadcast_product(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.input("r", (2, "tokens", 6), D)


def _wide_bias(g: Graph, x: Tensor) -> Tensor:
    return g.constant("b", (6,), "f64") + linear(g, x.cast("f32"), "w", 6)


def _narrow_bias(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + g.constant("b", (6,), "bf16")


def _wide_residual(g: Graph, x: Tensor) -> Tensor:
    return x + linear(g, x.cast("f32"), "w", 6)


def _narrow_residual(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "w", 6) + x.cast("f32")


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (_used_twice, {"matmul": 1, "silu": 1, "mul": 1}),
        (_squared, {"matmul": 1, "add": 1}),
        (_is_output, {"matmul": 1, "add": 1}),
        (_bias_after_activation, {"matmul": 1, "add": 1}),
        (_bias_after_residual, {"matmul": 1, "add": 1}),
        (_activation_after_residual, {"matmul": 1, "silu": 1}),
        (_two_activations, {"matmul": 1, "gelu": 1}),
        (_two_residuals, {"matmul": 1, "add": 1}),
        (_second_bias, {"matmul": 1, "add": 1}),
        (_input_as_bias, {"matmul": 1, "add": 1}),
        (_scalar_bias, {"matmul": 1, "add": 1}),
        (_row_residual, {"matmul": 1, "add": 1}),
        (_column_residual, {"matmul": 1, "add": 1}),
        (_broadcast_product, {"matmul": 1, "add": 1}),
        (_wide_bias, {"cast": 1, "matmul": 1, "add": 1}),
        (_narrow_bias, {"matmul": 1, "add": 1}),
        (_wide_residual, {"cast": 1, "matmul": 1, "add": 1}),
        (_narrow_residual, {"cast": 1, "matmul": 1, "add": 1}),
    ],
)
def test_epilogue_leaves_alone(build: object, left: dict[str, int]) -> None:
    assert callable(build)
    g, x = start()
    g.output(build(g, x), "y")
    assert ops(check(g, "fuse-epilogue")) == left


def test_epilogue_without_residual() -> None:
    g, x = start()
    g.output(g.silu(linear(g, x, "w", 6) + g.constant("b", (6,), D)) + x, "y")
    assert ops(check(g, "fuse-epilogue{residual=false}")) == {"matmul": 1, "add": 1}


# fuse-glu


def gated(
    g: Graph,
    x: Tensor,
    up_x: Tensor | None = None,
    *,
    activation: str = "silu",
    swapped: bool = False,
    fused: bool = False,
) -> Tensor:
    gate = linear(g, x, "gate", 8)
    if fused:
        gate = g.matmul(x, g.constant("gate2.w", (8, 6), D), transpose_rhs=True, epilogue=activation)
    elif activation == "silu":
        gate = g.silu(gate)
    else:
        gate = g.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    up = linear(g, x if up_x is None else up_x, "up", 8)
    return up * gate if swapped else gate * up


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_glu(activation: str, swapped: bool, fused: bool) -> None:
    g, x = start()
    g.output(gated(g, x, activation=activation, swapped=swapped, fused=fused), "y")
    after = check(g, "canonicalize,fuse-glu")
    assert ops(after) == {"glu_matmul": 1}
    assert after.function().nodes[0].problem.attr("activation") == activation


def test_glu_after_fuse_epilogue() -> None:
    g, x = start()
    g.output(gated(g, x), "y")
    assert ops(check(g, "fuse-epilogue,fuse-glu")) == {"glu_matmul": 1}


def test_glu_of_weights_as_they_are_multiplied() -> None:
    g, x = start()
    gate, up = (g.constant(name, (6, 8), D) for name in ("gate", "up"))
    g.output(g.silu(x @ gate) * (x @ up), "y")
    assert ops(check(g, "fuse-glu")) == {"glu_matmul": 1}


def _other_x(g: Graph, x: Tensor) -> Tensor:
    return gated(g, x, g.input("z", ("tokens", 6), D))


def _no_activation(g: Graph, x: Tensor) -> Tensor:
    return linear(g, x, "gate", 8) * linear(g, x, "up", 8)


def _both_activated(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 8)) * g.silu(linear(g, x, "up", 8))


def _biased_gate(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 8, bias=True)) * linear(g, x, "up", 8)


def _biased_up(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 8)) * linear(g, x, "up", 8, bias=True)


def _mixed_layouts(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 6)) * (x @ g.constant("up", (6, 6), D))


def _mixed_dtypes(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 6)) * linear(g, x, "up", 6, dtype="f32")


def _input_weight(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 6)) * g.matmul(x, g.input("up", (6, 6), D), transpose_rhs=True)


def _gate_used_twice(g: Graph, x: Tensor) -> Tensor:
    gate = linear(g, x, "gate", 6)
    g.output(gate, "gate")
    return g.silu(gate) * linear(g, x, "up", 6)


def _up_used_twice(g: Graph, x: Tensor) -> Tensor:
    up = linear(g, x, "up", 6)
    g.output(up, "up")
    return g.silu(linear(g, x, "gate", 6)) * up


def _activation_used_twice(g: Graph, x: Tensor) -> Tensor:
    gate = g.silu(linear(g, x, "gate", 6))
    g.output(gate, "gate")
    return gate * linear(g, x, "up", 6)


def _broadcast_gate(g: Graph, x: Tensor) -> Tensor:
    return g.silu(linear(g, x, "gate", 1)) * linear(g, x, "up", 6)


def _transposed_x(g: Graph, x: Tensor) -> Tensor:
    turned = g.input("turned", (6, 4), D)
    gate, up = (g.matmul(turned, g.constant(n, (6, 8), D), transpose_lhs=True) for n in ("gate", "up"))
    return g.silu(gate) * up


def _square(g: Graph, x: Tensor) -> Tensor:
    gate = g.silu(linear(g, x, "gate", 6))
    return gate * gate


@pytest.mark.parametrize(
    "build",
    [
        _other_x,
        _no_activation,
        _both_activated,
        _biased_gate,
        _biased_up,
        _mixed_layouts,
        _mixed_dtypes,
        _input_weight,
        _gate_used_twice,
        _up_used_twice,
        _activation_used_twice,
        _broadcast_gate,
        _transposed_x,
        _square,
    ],
)
def test_glu_leaves_alone(build: object) -> None:
    assert callable(build)
    g, x = start()
    g.output(build(g, x), "y")
    assert ops(check(g, "fuse-glu")) == ops(g)


# fuse-add-norm


def test_add_norm_has_both_results() -> None:
    g, x = start()
    total = x + g.input("r", ("tokens", 6), D)
    normed = g.rms_norm(total, g.constant("n", (6,), D), eps=1e-3)
    g.output(total * normed, "y")
    after = check(g, "fuse-add-norm")
    assert ops(after) == {"add_rms_norm": 1, "mul": 1}
    assert after.function().nodes[0].problem.attr("eps") == 1e-3


def test_add_norm_stands_before_all_users_of_the_sum() -> None:
    g, x = start()
    total = x + g.input("r", ("tokens", 6), D)
    early = g.silu(total)
    weights = [g.constant(f"n{i}", (6,), D) for i in range(2)]
    normed = [g.rms_norm(total, w) for w in weights]
    g.output(early * normed[0] * normed[1], "y")
    assert ops(check(g, "fuse-add-norm")) == {"add_rms_norm": 1, "silu": 1, "rms_norm": 1, "mul": 2}


@pytest.mark.parametrize("case", ["broadcast", "dtype", "late weight", "no sum"])
def test_add_norm_leaves_alone(case: str) -> None:
    g, x = start()
    total = {
        "broadcast": lambda: x + g.constant("b", (6,), D),
        "dtype": lambda: x + g.input("r", ("tokens", 6), "f32"),
        "late weight": lambda: x + x,
        "no sum": lambda: x * x,
    }[case]()
    w = g.constant("n", (6,), D)
    g.output(g.rms_norm(total, g.silu(w) if case == "late weight" else w), "y")
    assert ops(check(g, "fuse-add-norm")) == ops(g)


# fuse-rope-cache

HEADS, GROUPS, SIZE, CAPACITY = 4, 2, 6, 8
POSITION: dict[str, Attr] = {"max_position": CAPACITY, "theta": 100.0}


class Layer:
    """The inputs of an attention over a cache."""

    def __init__(self) -> None:
        self.g = Graph()
        self.positions, self.slots = (self.g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
        self.q = self.g.input("q", ("tokens", HEADS, SIZE), D)
        self.k, self.v = (self.g.input(name, ("tokens", GROUPS, SIZE), D) for name in "kv")
        self.key_cache, self.value_cache = (self.cache(name) for name in ("keys", "values"))

    def cache(self, name: str) -> Tensor:
        return self.g.input(name, (4, CAPACITY, GROUPS, SIZE), D, donated=True)

    def rope(self, x: Tensor, **attrs: Any) -> Tensor:
        return self.g.rope(x, self.positions, **{**POSITION, **attrs})

    def update(self, cache: Tensor, new: Tensor) -> Tensor:
        return self.g.kv_cache_update(cache, new, self.positions, self.slots)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Graph:
        self.g.output(self.g.attention(q, keys, values, self.positions, self.slots), "y")
        self.g.output(keys, "new_keys")
        if values is not keys:
            self.g.output(values, "new_values")
        return self.g


def test_rope_and_the_updates_of_both_caches_become_one() -> None:
    layer = Layer()
    q, k = layer.rope(layer.q), layer.rope(layer.k)
    after = check(
        layer.attend(q, layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v)), FUSE_CACHE
    )
    assert ops(after) == {"rope_cache_update": 1, "attention": 1}
    fused, attention = after.function().nodes
    assert fused.problem.attr("theta") == 100.0
    assert attention.operands[:3] == fused.results


def test_rope_and_cache_updates_in_another_order() -> None:
    layer = Layer()
    values = layer.update(layer.value_cache, layer.v)
    keys = layer.update(layer.key_cache, layer.rope(layer.g.silu(layer.k)))
    late = layer.g.silu(layer.q)
    assert ops(check(layer.attend(layer.rope(late), keys, values), FUSE_CACHE))["rope_cache_update"] == 1


def test_each_layer_gets_its_own_rope_and_caches() -> None:
    layer = Layer()
    caches = [(layer.key_cache, layer.value_cache), (layer.cache("keys.1"), layer.cache("values.1"))]
    q = layer.q
    for i, (key_cache, value_cache) in enumerate(caches):
        keys, values = layer.update(key_cache, layer.rope(layer.k)), layer.update(value_cache, layer.v)
        layer.g.output(keys, f"new_keys.{i}")
        layer.g.output(values, f"new_values.{i}")
        q = layer.g.attention(layer.rope(q), keys, values, layer.positions, layer.slots)
    layer.g.output(q, "y")
    after = check(layer.g, FUSE_CACHE)
    assert ops(after) == {"rope_cache_update": 2, "attention": 2}


FUSE_ATTENTION = "fuse-rope-cache,fuse-rope-attention"


def test_attention_takes_in_rope_and_the_updates() -> None:
    layer = Layer()
    q, k = layer.rope(layer.q), layer.rope(layer.k)
    keys, values = layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v)
    layer.g.output(layer.g.attention(q, keys, values, layer.positions, layer.slots, scale=0.3, window=2), "y")
    layer.g.output(keys, "new_keys")
    layer.g.output(values, "new_values")
    after = check(layer.g, FUSE_ATTENTION)
    assert ops(after) == {"rope_attention": 1}
    attrs = dict(after.function().nodes[0].problem.attrs)
    assert (attrs["theta"], attrs["scale"], attrs["window"]) == (100.0, 0.3, 2)


def queries_of_two_readers(layer: Layer) -> Graph:
    q, k = layer.rope(layer.q), layer.rope(layer.k)
    keys, values = layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v)
    layer.g.output(layer.g.silu(q), "other")
    return layer.attend(q, keys, values)


def keys_read_before(layer: Layer) -> Graph:
    q, k = layer.rope(layer.q), layer.rope(layer.k)
    keys, values = layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v)
    layer.g.output(layer.g.silu(keys), "other")
    return layer.attend(q, keys, values)


def attention_that_sees_all(layer: Layer) -> Graph:
    q, k = layer.rope(layer.q), layer.rope(layer.k)
    keys, values = layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v)
    lengths = layer.g.input("lengths", (4,), "i32")
    y = layer.g.attention(q, keys, values, layer.positions, layer.slots, lengths, causal=False)
    for name, value in (("y", y), ("new_keys", keys), ("new_values", values)):
        layer.g.output(value, name)
    return layer.g


@pytest.mark.parametrize("build", [queries_of_two_readers, keys_read_before, attention_that_sees_all])
def test_attention_is_left_alone(build: Callable[[Layer], Graph]) -> None:
    graph = build(Layer())
    assert ops(check(graph, FUSE_ATTENTION)) == ops(check(graph, FUSE_CACHE))
    assert ops(check(graph, FUSE_CACHE))["rope_cache_update"] == 1


def other_positions(layer: Layer) -> Graph:
    other = layer.g.input("other", ("tokens",), "i32")
    q = layer.g.rope(layer.q, other, max_position=CAPACITY, theta=100.0)
    return layer.attend(q, layer.update(layer.key_cache, layer.rope(layer.k)), layer.update(layer.value_cache, layer.v))


def other_slots(layer: Layer) -> Graph:
    other = layer.g.input("other", ("tokens",), "i32")
    values = layer.g.kv_cache_update(layer.value_cache, layer.v, layer.positions, other)
    return layer.attend(layer.rope(layer.q), layer.update(layer.key_cache, layer.rope(layer.k)), values)


def other_angles(layer: Layer) -> Graph:
    keys = layer.update(layer.key_cache, layer.rope(layer.k, theta=99.0))
    return layer.attend(layer.rope(layer.q), keys, layer.update(layer.value_cache, layer.v))


def keys_read_besides(layer: Layer) -> Graph:
    k = layer.rope(layer.k)
    layer.g.output(k, "k")
    return layer.attend(layer.rope(layer.q), layer.update(layer.key_cache, k), layer.update(layer.value_cache, layer.v))


def keys_as_they_are(layer: Layer) -> Graph:
    keys = layer.update(layer.key_cache, layer.k)
    return layer.attend(layer.rope(layer.q), keys, layer.update(layer.value_cache, layer.v))


def values_of_another_type(layer: Layer) -> Graph:
    values = layer.update(layer.value_cache, layer.v.cast("f32"))
    return layer.attend(layer.rope(layer.q), layer.update(layer.key_cache, layer.rope(layer.k)), values)


def values_computed_from_queries(layer: Layer) -> Graph:
    q = layer.rope(layer.q)
    values = layer.update(layer.value_cache, q[:, :GROUPS])
    return layer.attend(q, layer.update(layer.key_cache, layer.rope(layer.k)), values)


def one_cache_after_the_other(layer: Layer) -> Graph:
    keys = layer.update(layer.key_cache, layer.rope(layer.k))
    return layer.attend(layer.rope(layer.q), keys, layer.update(keys, layer.v))


def keys_as_values(layer: Layer) -> Graph:
    keys = layer.update(layer.key_cache, layer.rope(layer.k))
    return layer.attend(layer.rope(layer.q), keys, keys)


def keys_seen_before(layer: Layer) -> Graph:
    keys = layer.update(layer.key_cache, layer.rope(layer.k))
    early = layer.g.attention(layer.q, keys, layer.value_cache, layer.positions, layer.slots)
    layer.g.output(early, "early")
    return layer.attend(layer.rope(layer.q), keys, layer.update(layer.value_cache, layer.v))


@pytest.mark.parametrize(
    "build",
    [
        other_positions,
        other_slots,
        other_angles,
        keys_read_besides,
        keys_as_they_are,
        values_of_another_type,
        values_computed_from_queries,
        one_cache_after_the_other,
        keys_as_values,
        keys_seen_before,
    ],
)
def test_rope_and_cache_updates_are_left_alone(build: Callable[[Layer], Graph]) -> None:
    g = build(Layer())
    assert ops(check(g, FUSE_CACHE)) == ops(g)


# fuse-norm-quantize


def quantised(*reads: str) -> Graph:
    """A norm that is read in these formats; "" is as it is."""
    g, x = start("tokens", 64, dtype="f32")
    normed = g.rms_norm(x, g.constant("n", (64,), "f32"), eps=1e-3)
    for i, name in enumerate(reads):
        y = g.quantize(normed, name) if name else normed
        w = g.quantize(g.constant(f"w{i}", (8, 64), "f32"), "q8")
        g.output(g.matmul(y, w, transpose_rhs=True), f"y{i}")
    return g


def test_a_norm_that_is_read_in_8_bits_is_written_in_8_bits() -> None:
    after = check(quantised("q8a"), "fuse-norm-quantize")
    assert ops(after) == {"rms_norm_quantize": 1, "quantize": 1, "matmul": 1}
    assert (
        next(n for n in after.function().nodes if n.op == "transformer.rms_norm_quantize").problem.attr("eps") == 1e-3
    )
    assert ops(check(quantised("q8a", "q8a"), "cse,fuse-norm-quantize"))["rms_norm_quantize"] == 1


@pytest.mark.parametrize("reads", [("q8a", ""), ("",)])
def test_norm_quantize_leaves_alone(reads: tuple[str, ...]) -> None:
    g = quantised(*reads)
    assert ops(check(g, "fuse-norm-quantize")) == ops(g)


def test_norm_quantize_leaves_formats_of_weights_alone() -> None:
    g, x = start("tokens", 64, dtype="f32")
    weight = g.rms_norm(g.constant("w", (8, 64), "f32"), g.constant("n", (64,), "f32"))
    g.output(g.matmul(x, g.quantize(weight, "q8"), transpose_rhs=True), "y")
    assert ops(check(g, "fuse-norm-quantize")) == ops(g)


# fuse-norm-matmul

NORM_MATMUL = "fuse-norm-matmul"


def normalised() -> tuple[Graph, Tensor]:
    g, x = start()
    return g, g.rms_norm(x, g.constant("n", (6,), D), eps=1e-3)


@pytest.mark.parametrize("epilogue", ["none", "silu"])
def test_a_norm_moves_into_its_product(epilogue: str) -> None:
    g, normed = normalised()
    b, r = g.constant("b", (8,), D), g.input("r", ("tokens", 8), D)
    w = g.constant("w", (8, 6), D)
    g.output(g.matmul(normed, w, b, r, transpose_rhs=True, epilogue=epilogue), "y")
    after = check(g, NORM_MATMUL)
    assert ops(after) == {"rms_norm_matmul": 1}
    attrs = dict(after.function().nodes[0].problem.attrs)
    assert attrs == {"eps": 1e-3, "epilogue": epilogue, "transpose_rhs": True}


def test_a_norm_moves_into_a_gated_pair() -> None:
    g, normed = normalised()
    gate, up = (g.constant(name, (6, 8), D) for name in ("gate", "up"))
    g.output(g.glu_matmul(normed, gate, up, activation="gelu"), "y")
    after = check(g, NORM_MATMUL)
    assert ops(after) == {"rms_norm_glu_matmul": 1}
    attrs = dict(after.function().nodes[0].problem.attrs)
    assert attrs == {"activation": "gelu", "eps": 1e-3, "transpose_rhs": False}


def norm_of_two_readers() -> Graph:
    g, normed = normalised()
    g.output(linear(g, normed, "w", 8), "y")
    g.output(g.silu(normed), "other")
    return g


def norm_that_is_an_output() -> Graph:
    g, normed = normalised()
    g.output(normed, "norm")
    g.output(linear(g, normed, "w", 8), "y")
    return g


def norm_of_a_transposed_side() -> Graph:
    g, x = start(3, 6)
    normed = g.rms_norm(x, g.constant("n", (6,), D))
    g.output(g.matmul(normed, g.constant("w", (3, 8), D), transpose_lhs=True), "y")
    return g


def norm_of_a_computed_side() -> Graph:
    g, normed = normalised()
    g.output(g.matmul(normed, g.input("w", (6, 8), D)), "y")
    return g


def norm_on_the_right() -> Graph:
    g, normed = normalised()
    g.output(g.matmul(g.constant("w", (8, 6), D), normed, transpose_rhs=True), "y")
    return g


@pytest.mark.parametrize(
    "build",
    [
        norm_of_two_readers,
        norm_that_is_an_output,
        norm_of_a_transposed_side,
        norm_of_a_computed_side,
        norm_on_the_right,
    ],
)
def test_a_norm_is_left_alone(build: Callable[[], Graph]) -> None:
    g = build()
    assert ops(check(g, NORM_MATMUL)) == ops(g)


EIGHT_BITS = "fuse-norm-quantize,fuse-norm-matmul"


def eight_bits(*, norm: bool = True) -> tuple[Graph, Tensor]:
    g, x = start("tokens", 64, dtype="f32")
    x = g.rms_norm(x, g.constant("n", (64,), "f32"), eps=1e-3) if norm else x
    return g, g.quantize(x, "q8a")


def in_groups(g: Graph, name: str, n: int, dtype: str = "q4") -> Tensor:
    return g.quantize(g.constant(name, (n, 64), "f32"), dtype)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("epilogue", ["none", "gelu"])
def test_what_is_multiplied_in_8_bits_is_quantised_in_the_product(norm: bool, epilogue: str) -> None:
    g, x = eight_bits(norm=norm)
    b, r = g.constant("b", (8,), "f32"), g.input("r", ("tokens", 8), "f32")
    g.output(g.matmul(x, in_groups(g, "w", 8), b, r, transpose_rhs=True, epilogue=epilogue), "y")
    after = check(g, EIGHT_BITS)
    assert ops(after) == {"quantize": 1, "rms_norm_quantize_matmul" if norm else "quantize_matmul": 1}
    problem = after.function().nodes[-1].problem
    eps = {"eps": 1e-3} if norm else {}
    assert dict(problem.attrs) == {**eps, "epilogue": epilogue, "transpose_rhs": True}
    assert [t.dtype for t in problem.operands if t is not None] == ["f32"] * (1 + norm) + ["q4", "f32", "f32"]


@pytest.mark.parametrize("norm", [False, True])
def test_what_a_gated_pair_multiplies_in_8_bits_is_quantised_in_it(norm: bool) -> None:
    g, x = eight_bits(norm=norm)
    gate, up = (in_groups(g, name, 8, "q8") for name in ("gate", "up"))
    g.output(g.glu_matmul(x, gate, up, transpose_rhs=True, activation="gelu_tanh"), "y")
    after = check(g, EIGHT_BITS)
    assert ops(after) == {"quantize": 2, "rms_norm_quantize_glu_matmul" if norm else "quantize_glu_matmul": 1}
    assert after.function().nodes[-1].problem.attr("activation") == "gelu_tanh"


def quantised_for_two() -> Graph:
    g, x = eight_bits()
    for name in ("v", "w"):
        g.output(g.matmul(x, in_groups(g, name, 8), transpose_rhs=True), name)
    return g


def quantised_that_is_read_otherwise() -> Graph:
    g, x = eight_bits(norm=False)
    g.output(g.dequantize(x), "x")
    g.output(g.matmul(x, in_groups(g, "w", 8), transpose_rhs=True), "y")
    return g


def quantised_weights() -> Graph:
    g, x = start("tokens", 64, dtype="f32")
    g.output(g.matmul(x, in_groups(g, "w", 8), transpose_rhs=True), "y")
    return g


@pytest.mark.parametrize("build", [quantised_for_two, quantised_that_is_read_otherwise, quantised_weights])
def test_what_is_quantised_is_left_alone(build: Callable[[], Graph]) -> None:
    g = build()
    assert ops(check(g, NORM_MATMUL)) == ops(g)


# fuse-qkv


def test_qkv_of_different_widths() -> None:
    g, x = start()
    for i, n in enumerate((8, 4, 4)):
        g.output(linear(g, x, f"w{i}", n), f"y{i}")
    after = check(g, "fuse-qkv")
    assert ops(after) == {"concat": 1, "matmul": 1, "split": 1}
    wide = next(n for n in after.function().nodes if n.op == "transformer.matmul")
    assert wide.problem.results[0].shape == ("tokens", 16)
    assert wide.problem.operand(1).constant


def test_qkv_with_biases() -> None:
    g, x = start(2, 3, 6)
    for i, n in enumerate((8, 4, 4)):
        g.output(g.silu(linear(g, x, f"w{i}", n, bias=True)), f"y{i}")
    assert ops(check(g, "fuse-qkv")) == {"concat": 2, "matmul": 1, "split": 1, "silu": 3}


def test_qkv_of_weights_as_they_are_multiplied() -> None:
    g, x = start()
    for i, n in enumerate((8, 4, 4)):
        g.output(x @ g.constant(f"w{i}", (6, n), D), f"y{i}")
    assert ops(check(g, "fuse-qkv")) == {"concat": 1, "matmul": 1, "split": 1}


def test_qkv_stands_where_the_first_one_stood() -> None:
    g, x = start()
    first = g.silu(linear(g, x, "a", 6))
    second = linear(g, x, "b", 6)
    g.output(first * second, "y")
    assert ops(check(g, "fuse-qkv")) == {"concat": 1, "matmul": 1, "split": 1, "silu": 1, "mul": 1}


def test_qkv_of_what_another_qkv_makes() -> None:
    g, x = start()
    for layer in range(3):
        a, b = (linear(g, x, f"{layer}{side}", 6) for side in "ab")
        g.output(b, f"y{layer}")
        x = a
    g.output(x, "y")
    assert ops(check(g, "fuse-qkv"))["matmul"] == 3


def test_qkv_groups_by_what_can_be_merged() -> None:
    g, x = start()
    z = g.input("z", ("tokens", 6), D)
    outputs = [
        linear(g, x, "a", 4),
        linear(g, x, "b", 4, bias=True),
        linear(g, z, "c", 4),
        linear(g, x, "d", 5),
        linear(g, x, "e", 5, bias=True),
        linear(g, x, "f", 5, dtype="f32"),
        x @ g.constant("g", (6, 5), D),
    ]
    for i, y in enumerate(outputs):
        g.output(y, f"y{i}")
    assert ops(check(g, "fuse-qkv")) == {"concat": 3, "matmul": 5, "split": 2}


def test_qkv_leaves_alone() -> None:
    g, x = start()
    outputs = [
        linear(g, x, "a", 6),
        g.matmul(x, g.constant("c", (6, 6), D), transpose_rhs=True, epilogue="silu"),
        g.matmul(x, g.constant("d", (6, 6), D), None, x, transpose_rhs=True),
        g.matmul(x, g.input("e", (6, 6), D), transpose_rhs=True),
        g.matmul(x, g.constant("f", (6, 6), D), g.input("b", (6,), D), transpose_rhs=True),
    ]
    for i, y in enumerate(outputs):
        g.output(y, f"y{i}")
    assert ops(check(g, "fuse-qkv")) == ops(g)


def test_qkv_leaves_results_of_a_size_that_the_module_does_not_say() -> None:
    """They could not be split off again."""
    g, x = start()
    for name in ("a", "b"):
        g.output(linear(g, x, name, 4), f"y{name}")
    text = g.text().replace("tensor<?x4xf64>", "tensor<?x?xf64>")
    assert text.count("tensor<?x?xf64>") == 6
    assert ops(check(Module.parse(text, REGISTRY), "fuse-qkv")) == {"matmul": 2}


def test_qkv_of_weights_that_are_computed_later() -> None:
    g, x = start()
    for name in "qkv":
        late = g.silu(g.mul(g.constant(name, (6, 6), D), g.constant(f"{name}.scale", (6,), D)))
        g.output(g.matmul(x, late, g.silu(g.constant(f"{name}.b", (6,), D)), transpose_rhs=True), name)
    after = ops(check(g, "fuse-qkv"))
    assert after == {"mul": 3, "silu": 6, "concat": 2, "matmul": 1, "split": 1}


def test_qkv_of_computed_weights() -> None:
    g, x = start()
    weights = [g.silu(g.constant(f"w{i}", (6, 6), D)) for i in range(2)]
    for i, w in enumerate(weights):
        g.output(x @ w, f"y{i}")
    assert ops(check(g, "fuse-qkv")) == {"silu": 2, "concat": 1, "matmul": 1, "split": 1}


def test_qkv_of_more_widths_than_a_split_can_have() -> None:
    g, x = start()
    for n in range(1, 20):
        for i in range(2):
            g.output(linear(g, x, f"w{n}.{i}", n), f"y{n}.{i}")
    assert ops(check(g, "fuse-qkv")) == {"concat": 3, "matmul": 3, "split": 3}


# locations


def test_fused_ops_keep_the_locations_of_their_parts() -> None:
    g, x = start()
    with g.scope("mlp"):
        with g.scope("fc1"):
            y = linear(g, x, "w", 6)
        with g.scope("act"):
            y = g.silu(y)
    g.output(y, "y")
    after = lowered(g, "fuse-epilogue")
    assert after.function().nodes[0].location == "mlp.fc1"
    assert '"mlp.act"' in after.text(locations=True)
