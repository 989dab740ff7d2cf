"""`quantize`: what it puts into 8 or 4 bits, what it leaves alone, and that the fusions work around it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from pass_checks import REGISTRY, Array, arrays_for, execute, lowered, ops

from kernelforge.dtype import to_numpy
from kernelforge.errors import KernelForgeError, KernelForgeWarning, UsageError
from kernelforge.graph import Graph
from kernelforge.module import Module
from kernelforge.passes import DEFAULT, Pipeline
from kernelforge.quant import dequantize, quantize


def block(dtype: str = "f32") -> Graph:
    """Q, k and v, an output projection, a gated MLP, a tied table; rows of 64 elements."""
    g = Graph()
    ids = g.input("ids", ("tokens",), "i32")
    table = g.constant("table", (90, 64), dtype)
    x = g.embedding(table, ids, dtype="f32")
    q, k, v = (
        g.matmul(x, g.constant(n, (m, 64), dtype), transpose_rhs=True) for n, m in (("q", 64), ("k", 32), ("v", 32))
    )
    mixed = g.softmax(q) + g.concat(g.softmax(k), g.softmax(v))
    h = g.matmul(mixed, g.constant("o", (64, 64), dtype))  # [K, N]
    gate, up = (g.matmul(h, g.constant(n, (96, 64), dtype), transpose_rhs=True) for n in ("gate", "up"))
    y = g.matmul(g.silu(gate) * up, g.constant("down", (64, 96), dtype), transpose_rhs=True)
    g.output(g.matmul(x + y, table, transpose_rhs=True), "logits")
    return g


def formats(module: Module) -> dict[str, list[str]]:
    """By op: the types of the weights."""
    found: dict[str, list[str]] = {}
    for node in module.function().nodes:
        name = node.op.partition(".")[2]
        at = {"matmul": 1, "glu_matmul": 1, "embedding": 0}.get(name)
        if at is not None:
            found.setdefault(name, []).append(node.problem.operand(at).dtype)
    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("pipeline", ["Q", "Q,DEFAULT", "DEFAULT,Q"])
def test_results_are_those_of_the_dequantised_weights(pipeline: str, dtype: str) -> None:
    module = block(dtype).module(REGISTRY)
    after = lowered(module, pipeline.replace("DEFAULT", DEFAULT).replace("Q", "quantize{format=q8}"))
    assert str(Module.parse(str(after), REGISTRY)) == str(after)
    inputs, constants = arrays_for(module.function(), {"tokens": 3}, seed=0)
    rounded: dict[str, Array] = {
        # o is stored [K, N]: its groups lie along the first axis.
        name: dequantize(quantize(a.T if name == "o" else a, "q8")).astype(np.float32)
        for name, a in constants.items()
    }
    rounded["o"] = np.ascontiguousarray(rounded["o"].T)
    want = execute(block("f32").module(REGISTRY), inputs, rounded)
    np.testing.assert_allclose(execute(after, inputs, constants)["logits"], want["logits"], rtol=2e-4, atol=2e-3)


def test_everything_is_fused_as_before() -> None:
    before = ops(lowered(block(), DEFAULT))
    first = lowered(block(), f"quantize{{format=q4}},{DEFAULT}")
    assert formats(first) == {"embedding": ["q4"], "matmul": ["q4"] * 4, "glu_matmul": ["q4"]}
    after = ops(first)
    assert {name: after[name] for name in before if name != "transpose"} == dict(before)
    assert after["quantize"] == 8


def test_a_table_may_have_another_format_also_where_the_head_multiplies_by_it() -> None:
    for chosen, table in (("q8", "q8"), ("none", "f32"), ("same", "q4")):
        found = formats(lowered(block(), f"quantize{{format=q4 embeddings={chosen}}}"))
        assert found["embedding"] == [table]
        assert found["matmul"] == ["q4"] * 7 + [table]


def test_weights_are_skipped_by_name() -> None:
    after = lowered(block(), f"{DEFAULT},quantize{{format=q8 skip=^(down|table|q)$}}")
    assert formats(after) == {"embedding": ["f32"], "matmul": ["q8", "q8", "f32", "f32"], "glu_matmul": ["q8"]}
    assert formats(lowered(block(), "quantize{format=q8 skip=up}"))["matmul"].count("f32") == 1
    merged = lowered(block(), f"{DEFAULT},quantize{{format=q8 skip=q}}")  # q, k and v are one by now
    assert formats(merged)["matmul"][0] == "f32"
    with pytest.raises(KernelForgeError, match="option 'skip' is not a regular expression"):
        lowered(block(), 'quantize{format=q8 skip="("}')


def test_a_second_time_changes_nothing() -> None:
    once = lowered(block(), "quantize{format=q4}")
    assert str(lowered(once, "quantize{format=q8}")) == str(once)


def test_what_cannot_be_quantised_stays_and_is_named_once() -> None:
    g = Graph()
    x = g.input("x", ("tokens", 48), "f32")
    for i in range(5):
        g.output(g.matmul(x, g.constant(f"odd{i}", (8, 48), "f32"), transpose_rhs=True), f"y{i}")
    z = g.input("z", (8, 64), "f32")
    g.output(g.matmul(z, g.input("w", (64, 4), "f32")), "activations")
    g.output(g.matmul(g.input("b", (2, 8, 64), "f32"), g.constant("batched", (2, 64, 4), "f32")), "batches")
    with pytest.warns(KernelForgeWarning) as caught:
        after = lowered(g, "quantize{format=q4}")
    assert [str(w.message) for w in caught] == [
        "not quantised, as their rows are no multiple of 32 elements: odd0, odd1, odd2 and 2 more"
    ]
    assert set(formats(after)["matmul"]) == {"f32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(g, "quantize{format=q4 skip=odd}")


def test_the_result_of_an_embedding_keeps_its_type() -> None:
    g = Graph()
    g.output(g.embedding(g.constant("t", (9, 32), "bf16"), g.input("ids", (3,), "i32")), "y")
    after = lowered(g, "quantize{format=q8}")
    assert "tensor<3x32xbf16>" in str(after)
    table = np.random.default_rng(0).standard_normal((9, 32)).astype(to_numpy("bf16"))
    found = execute(after, {"ids": np.array([8, 0, 3], np.int32)}, {"t": table})
    want = dequantize(quantize(table, "q8"))[[8, 0, 3]].astype(to_numpy("bf16"))
    np.testing.assert_array_equal(found["y"], want)


def test_text_and_options() -> None:
    text = "quantize{format=q4 embeddings=q8 skip=lm_head|down}"
    assert str(Pipeline.parse(text, REGISTRY)) == text
    with pytest.raises(UsageError, match="pass 'quantize' needs option 'format'"):
        Pipeline.parse("quantize", REGISTRY)
    with pytest.raises(UsageError, match="option 'format' of pass 'quantize' must be one of q8, q4, got 'q5'"):
        Pipeline.parse("quantize{format=q5}", REGISTRY)


@pytest.mark.parametrize("pipeline", ["Q", "Q,DEFAULT"])
def test_activations_are_quantised_once_for_all_that_multiply_them(pipeline: str) -> None:
    module = block().module(REGISTRY)
    text = pipeline.replace("DEFAULT", DEFAULT).replace("Q", "quantize{format=q8 activations=q8}")
    after = lowered(module, text)
    assert str(Module.parse(str(after), REGISTRY)) == str(after)
    nodes, found = after.function().nodes, ops(after)
    made = [n for n in nodes if n.problem.results[0].dtype == "q8a" or "quantize_" in n.op]
    assert len(made) == len({n.operands[0] for n in made}) == 5  # of x, mixed, h, the gated product and the last sum
    if pipeline == "Q":
        products = [n for n in nodes if n.op == "transformer.matmul"]
        assert {n.problem.operand(0).dtype for n in products} == {"q8a"}
    else:
        assert (found["quantize_matmul"], found["quantize_glu_matmul"], found["matmul"]) == (4, 1, 0)
    inputs, constants = arrays_for(module.function(), {"tokens": 3}, seed=0)
    plain = execute(lowered(module, "quantize{format=q8}"), inputs, constants)["logits"]
    got = execute(after, inputs, constants)["logits"]
    assert 0 < np.abs(got - plain).max() < 0.05 * np.abs(plain).max()


def test_activations_of_other_types_stay() -> None:
    g = Graph()
    x = g.input("x", ("tokens", 64), "bf16")
    g.output(g.matmul(x, g.constant("w", (32, 64), "f32"), transpose_rhs=True), "y")
    after = lowered(g.module(REGISTRY), "quantize{format=q4 activations=q8}")
    assert [n.problem.operand(0).dtype for n in after.function().nodes if n.op == "transformer.matmul"] == ["bf16"]
