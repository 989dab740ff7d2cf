from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.dialects.transformer.rope import ATTRIBUTES
from kernelforge.errors import UsageError
from kernelforge.graph import Graph, Tensor
from kernelforge.module import Module
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes
from kernelforge.problem import TensorType

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Catalog:
    ops: Mapping[str, OpDef]


CATALOG = Catalog({op.full_name: op for op in OPS})


def graph() -> Graph:
    return Graph(catalog=CATALOG)


def execute(module: Module, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a module's function with the ops' references."""
    function = module.function()
    values: dict[int | None, Array | None] = {i: inputs[arg.name] for i, arg in enumerate(function.args)}
    values[None] = None
    for node in function.nodes:
        outputs = module.ops[node.op].evaluate(node.problem, [values[v] for v in node.operands])
        values.update(zip(node.results, outputs, strict=True))
    found: dict[str, Array] = {}
    for name, v in zip(function.output_names, function.outputs, strict=True):
        value = values[v]
        assert value is not None
        found[name] = value
    return found


def evaluate(build: Callable[[Graph, Tensor], Tensor], x: Array) -> Array:
    g = graph()
    shape: tuple[int | str, ...] = ("tokens", *x.shape[1:])
    out = build(g, g.input("x", shape, "f64"))
    g.output(out, "y")
    result = execute(g.module(), {"x": x})["y"]
    assert len(out.shape) == result.ndim
    assert all(isinstance(d, str) or d == n for d, n in zip(out.shape, result.shape, strict=True))
    return result


X = np.random.default_rng(0).standard_normal((5, 4, 6))


@pytest.mark.parametrize(
    ("build", "want"),
    [
        (lambda g, x: x + x * x, X + X * X),
        (lambda g, x: x.reshape(-1, 24), X.reshape(-1, 24)),
        (lambda g, x: x.reshape(x.shape[0], 2, 12), X.reshape(5, 2, 12)),
        (lambda g, x: x.transpose(1, 0, 2), X.transpose(1, 0, 2)),
        (lambda g, x: x.T, X.T),
        (lambda g, x: x[:, 1:3], X[:, 1:3]),
        (lambda g, x: x[:, 1:, -2:], X[:, 1:, -2:]),
        (lambda g, x: x[..., 2], X[..., 2]),
        (lambda g, x: x[:, -1, :4], X[:, -1, :4]),
        (lambda g, x: x[:, 2, 3], X[:, 2, 3]),
        (lambda g, x: x[:, :99], X[:, :99]),
        (lambda g, x: x[:, 3:1], X[:, 3:1]),
        (lambda g, x: x[...], X),
        (lambda g, x: x[:], X),
        (lambda g, x: x.split((1, 3), axis=1)[1], X[:, 1:]),
        (lambda g, x: g.concat(*reversed(x.split((2, 4))), axis=-1), np.concatenate([X[..., 2:], X[..., :2]], -1)),
        (lambda g, x: x @ x.transpose(0, 2, 1), X @ X.transpose(0, 2, 1)),
        (lambda g, x: x.cast("f32"), X.astype(np.float32)),
        (lambda g, x: g.argmax(x), X.argmax(-1)),
    ],
)
def test_reads_like_numpy(build: Callable[[Graph, Tensor], Tensor], want: Array) -> None:
    np.testing.assert_allclose(evaluate(build, X), want, rtol=1e-13)


def small_decoder(g: Graph, *, layers: int = 2) -> None:
    """A decoder of width 16, 4 heads of 4 over 2 kv heads, vocabulary 11, cache [2, 8]."""
    tokens, positions, slots = (g.input(n, ("tokens",), "i32") for n in ("tokens", "positions", "slots"))
    rows = g.input("rows", ("rows",), "i32")
    embed = g.constant("embed", (11, 16), "bf16")
    x = g.embedding(embed, tokens, dtype="f32")

    def weight(name: str, *shape: int) -> Tensor:
        return g.constant(name, shape, "bf16" if len(shape) == 2 else "f32")

    for i in range(layers):
        with g.scope(f"layers.{i}"):
            with g.scope("attention"):
                h = g.rms_norm(x, weight(f"{i}.norm1", 16), eps=1e-6)
                q, k, v = g.matmul(h, weight(f"{i}.qkv", 32, 16), transpose_rhs=True).split((16, 8, 8))
                q = g.rope(q.reshape(-1, 4, 4), positions, max_position=8)
                k = g.rope(k.reshape(-1, 2, 4), positions, max_position=8)
                caches = [g.input(f"{kind}.{i}", (2, 8, 2, 4), "f32", donated=True) for kind in ("key", "value")]
                keys = g.kv_cache_update(caches[0], k, positions, slots)
                values = g.kv_cache_update(caches[1], v.reshape(-1, 2, 4), positions, slots)
                g.output(keys, f"key.{i}")
                g.output(values, f"value.{i}")
                mixed = g.attention(q, keys, values, positions, slots).reshape(-1, 16)
                x = g.matmul(mixed, weight(f"{i}.o", 16, 16), residual=x, transpose_rhs=True)
            with g.scope("mlp"):
                h = g.rms_norm(x, weight(f"{i}.norm2", 16))
                gate, up = weight(f"{i}.gate", 24, 16), weight(f"{i}.up", 24, 16)
                h = g.glu_matmul(h, gate, up, transpose_rhs=True)
                x = x + g.matmul(h, weight(f"{i}.down", 16, 24), transpose_rhs=True)
    logits = g.matmul(g.embedding(x, rows), embed, transpose_rhs=True)
    g.output(logits, "logits")
    g.output(g.argmax(logits), "token")


def decoder_inputs(module: Module, tokens: int) -> dict[str, Array]:
    from kernelforge.dtype import to_numpy

    rng = np.random.default_rng(1)
    inputs: dict[str, Array] = {}
    for arg in module.function().args:
        shape = arg.type.static_shape({"tokens": tokens, "rows": 1})
        inputs[arg.name] = (0.3 * rng.standard_normal(shape)).astype(to_numpy(arg.type.dtype))
    inputs["tokens"] = rng.integers(0, 11, tokens).astype(np.int32)
    inputs["positions"] = np.arange(tokens, dtype=np.int32)
    inputs["slots"] = np.ones(tokens, np.int32)
    inputs["rows"] = np.array([tokens - 1], np.int32)
    return inputs


def test_a_decoder_step_by_step_equals_the_whole_prompt() -> None:
    g = graph()
    small_decoder(g)
    module = g.module()
    inputs = decoder_inputs(module, 6)
    whole = execute(module, inputs)
    caches = {name: array for name, array in inputs.items() if name.startswith(("key", "value"))}
    for t in range(6):
        step = {name: inputs[name][t : t + 1] for name in ("tokens", "positions", "slots")}
        out = execute(module, {**inputs, **step, "rows": np.zeros(1, np.int32), **caches})
        caches = {name: out[name] for name in caches}
    np.testing.assert_allclose(out["logits"], whole["logits"], rtol=1e-5, atol=1e-6)
    assert out["token"] == whole["token"] == whole["logits"].argmax()


def test_text_is_deterministic_and_a_fixpoint() -> None:
    texts = []
    for _ in range(2):
        g = graph()
        small_decoder(g)
        texts.append(g.text())
    assert texts[0] == texts[1]
    module = Module.parse(texts[0], CATALOG)
    assert Module.parse(module.text(), CATALOG).text() == module.text()
    located = module.text(locations=True)
    assert Module.parse(located, CATALOG).text(locations=True) == located


def test_without_scopes_the_text_is_what_mlir_prints() -> None:
    g = graph()
    x = g.input('a "name"', ("tokens", 4), "f32")
    state = g.input("state", (2, "context"), "f32", donated=True)
    w = g.constant("w", (4, 4), "f16")
    y = g.matmul(x, w, residual=x, epilogue="gelu")
    first, second = y.split((1, 3))
    g.output(g.concat(first, second, axis=1), "y")
    g.output(state, "state")
    assert str(g.module()) == g.text()
    assert 'kernelforge.dims = ["context"], kernelforge.donated, kernelforge.name = "state"' in g.text()


def test_arguments_keep_names_flags_and_dimensions() -> None:
    g = graph()
    small_decoder(g, layers=1)
    function = g.module().function()
    named = {arg.name: arg for arg in function.args}
    assert named["rows"].type == TensorType(("rows",), "i32")
    assert named["embed"].constant
    assert named["key.0"].donated
    assert function.output_names == ("key.0", "value.0", "logits", "token")
    assert function.dims == ("tokens", "rows")


def test_scopes_become_locations() -> None:
    g = graph()
    small_decoder(g)
    where = [(n.op, n.location) for n in g.module().function().nodes]
    assert ("transformer.rope", "layers.1.attention") in where
    assert ("transformer.glu_matmul", "layers.0.mlp") in where
    assert where[0][1].startswith("-:")


def test_a_scope_ends_even_when_an_error_leaves_it() -> None:
    g = graph()
    x = g.input("x", (2, 2), "f32")
    y = g.input("y", (3,), "f32")
    message = r"'transformer\.add' at outer\.inner: operand 'b' has shape"
    with pytest.raises(UsageError, match=message), g.scope("outer"), g.scope("inner"):
        g.add(x, y)
    g.output(x + x, "z")
    assert "outer" not in g.text()


def test_every_op_has_a_method_with_its_attributes_and_their_defaults() -> None:
    renamed = {"concat": {"xs"}}
    for op in OPS:
        parameters = dict(inspect.signature(getattr(Graph, op.name)).parameters)
        if rope := parameters.pop("attrs", None):
            assert rope.annotation == "Unpack[RopeAttributes]"
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters |= {a.name: inspect.Parameter(a.name, keyword, default=a.default) for a in ATTRIBUTES}
        assert set(parameters) == {"self", *(o.name for o in op.operands), *(a.name for a in op.attributes)}, op.name
        for attribute in op.attributes:
            default = parameters[attribute.name].default
            if attribute.default is not None or rope:
                assert default == attribute.default
            else:
                assert default is inspect.Parameter.empty or op.name in ("split", "concat")
        for operand in op.operands:
            variadic = parameters[operand.name].kind is inspect.Parameter.VAR_POSITIONAL
            assert variadic == operand.variadic == (operand.name in renamed.get(op.name, ()))
            assert (parameters[operand.name].default is None) == operand.optional


def twice() -> OpDef:
    def infer(operands: OperandTypes, attrs: object) -> tuple[TensorType, ...]:
        assert operands[0] is not None
        return (TensorType(operands[0].shape, operands[0].dtype),)

    return OpDef(
        name="twice",
        summary="factor * x",
        operands=(Operand("x"),),
        results=("out",),
        attributes=(Attribute("factor", "float", 2.0),),
        infer=infer,
        reference=lambda arrays, attrs: (arrays[0] * attrs["factor"],),
        sample=lambda rng: iter(()),
        cost=lambda problem: Cost(1, 1),
        dialect="third",
    )


def test_ops_of_other_dialects() -> None:
    catalog = Catalog({**CATALOG.ops, "third.twice": twice()})
    g = Graph(catalog=catalog)
    x = g.input("x", ("tokens",), "f32")
    y = g.op("third.twice", x, factor=5.0)
    assert isinstance(y, Tensor)
    pieces = g.op("transformer.split", g.input("z", (4,), "f32"), axis=0, sizes=(1, 3))
    assert isinstance(pieces, tuple)
    g.output(y, "y")
    out = execute(g.module(), {"x": np.ones(3, np.float32), "z": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(out["y"], [5, 5, 5])
    with pytest.raises(UsageError, match=r"'third\.twice': attribute 'times' is unknown to twice"):
        g.op("third.twice", x, times=1)
    with pytest.raises(UsageError, match=r"unknown op 'third\.thrice'") as refused:
        g.op("third.thrice", x)
    assert refused.value.hint is not None
    assert "third.twice" in refused.value.hint


def test_errors_come_when_the_op_is_added_and_say_why() -> None:
    g = graph()
    x = g.input("x", ("tokens", 9), "f32")
    with pytest.raises(
        UsageError, match=r"'transformer\.matmul': operand 'rhs' has 8 rows but operand 'lhs' has 9 columns"
    ):
        g.matmul(x, g.constant("w", (8, 4), "f32"))
    with pytest.raises(
        UsageError, match=r"operand 'b' has shape \[rows,9\], which does not broadcast with 'a' \[tokens,9\]"
    ):
        x + g.input("r", ("rows", 9), "f32")
    with pytest.raises(UsageError, match="attribute 'epilogue' is 'relu'"):
        g.matmul(x, g.constant("v", (9, 4), "f32"), epilogue="relu")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0,), "the dynamic dimension 'tokens' can only be taken whole"),
        ((slice(0, 2),), "the dynamic dimension 'tokens' can only be taken whole"),
        ((slice(None), 4), "index 4 is out of range for a dimension of size 4"),
        ((slice(None), -5), "index -5 is out of range for a dimension of size 4"),
        ((slice(None), slice(None, None, 2)), "slices with a step are not supported"),
        ((slice(None), slice(None, None, -1)), "slices with a step are not supported"),
        ((slice(None), None), "None is not an index"),
        ((slice(None), [1, 2]), r"\[1, 2\] is not an index"),
        ((slice(None),) * 3, r"too many indices for a tensor of shape \['tokens', 4\]"),
    ],
)
def test_indices_that_are_none(index: tuple[object, ...], message: str) -> None:
    x = graph().input("x", ("tokens", 4), "f32")
    with pytest.raises(UsageError, match=message):
        x[index]


def test_names_are_used_once() -> None:
    g = graph()
    x = g.input("x", (2,), "f32")
    with pytest.raises(UsageError, match="the graph has an argument 'x' already"):
        g.constant("x", (2,), "f32")
    g.output(x, "y")
    with pytest.raises(UsageError, match="the graph has an output 'y' already"):
        g.output(x, "y")


def test_what_a_graph_refuses() -> None:
    g = graph()
    x = g.input("x", (2,), "f32")
    with pytest.raises(UsageError, match="the graph has no output"):
        g.text()
    with pytest.raises(UsageError, match=r"constant 'w' cannot have dynamic dimensions: f32\[tokens\]"):
        g.constant("w", ("tokens",), "f32")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(UsageError, match="'two words' cannot name a dimension of 'z'"):
        g.input("z", ("two words",), "f32")
    with pytest.raises(UsageError, match="unknown dtype 'f8'"):
        g.input("z", (2,), "f8")
    assert g.input("n", (np.int64(3),), "f32").shape == (3,)  # type: ignore[arg-type]  # what numpy shapes may hold
    with pytest.raises(UsageError, match="negative dimension -2"):
        g.input("z", (-2,), "f32")
    with pytest.raises(UsageError, match="is not a tensor of this graph"):
        g.add(x, graph().input("x", (2,), "f32"))
    with pytest.raises(UsageError, match=r"3\.0 is not a tensor of this graph"):
        g.add(x, 3.0)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(UsageError, match="'not a name' is not a function name"):
        Graph("not a name")
    with pytest.raises(TypeError, match=r"cannot be iterated; split\(\) cuts it in pieces"):
        list(x)
    assert repr(x) == "Tensor(%arg0: f32[2])"


def test_building_needs_neither_mlir_nor_numpy() -> None:
    code = (
        "import sys; from kernelforge.graph import Graph; g = Graph(); x = g.input('x', ('tokens', 4), 'f32');"
        "g.output(x[:, :2] * x[:, 2:], 'y'); g.text();"
        "print([m for m in ('torch_mlir', 'numpy', 'numba', 'llvmlite') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
