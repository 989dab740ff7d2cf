"""Pipelines: they leave their input alone, verify after every pass, and the default one lowers a decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
from pass_checks import REGISTRY, check, ops

from kernelforge.errors import KernelForgeError, PluginError, UsageError
from kernelforge.graph import Graph, Tensor
from kernelforge.module import Module
from kernelforge.passes import DEFAULT, Pass, Pipeline
from kernelforge.passes.canonicalize import Canonicalize
from kernelforge.passes.fuse_epilogue import FuseEpilogue


def small() -> Graph:
    g = Graph()
    x = g.input("x", ("tokens", 4), "f32")
    with g.scope("fc"):
        g.output(g.silu(x @ g.constant("w", (4, 4), "f32")), "y")
    return g


@dataclass(frozen=True)
class Breaks(Pass):
    """Makes a matmul that its verifier refuses."""

    name: ClassVar[str] = "breaks"

    def run(self, module: Module) -> None:
        from kernelforge.mlir import ir

        for view in module.main.regions[0].blocks[0].operations:
            if view.operation.name == "transformer.matmul":
                view.operation.attributes["epilogue"] = ir.StringAttr.get("relu")


@dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "raises"
    usage: bool = False

    def run(self, module: Module) -> None:
        raise UsageError("it cannot", hint="ask another") if self.usage else IndexError("out of range")


def test_builtin_passes_are_registered() -> None:
    fusions = ("add-norm", "epilogue", "glu", "norm-quantize", "qkv", "rope-cache")
    names = ["canonicalize", "cse", *(f"fuse-{name}" for name in fusions)]

    assert set(names) <= set(REGISTRY.passes)
    text = ",".join(names)
    assert str(Pipeline.parse(text, REGISTRY)) == text
    assert Pipeline.parse("fuse-epilogue{residual=false}", REGISTRY) == Pipeline((FuseEpilogue(residual=False),))


def test_the_module_given_is_not_changed() -> None:
    module = small().module(REGISTRY)
    text = module.text(locations=True)
    after = Pipeline((FuseEpilogue(),)).run(module)
    assert module.text(locations=True) == text
    assert ops(after) == {"matmul": 1}
    again = Pipeline().run(module)
    assert again is not module
    assert str(again) == str(module)


def test_callback_sees_the_module_after_each_pass() -> None:
    seen: list[tuple[str, int]] = []
    pipeline = Pipeline.parse("canonicalize,fuse-epilogue,cse", REGISTRY)
    pipeline.run(small().module(REGISTRY), lambda step, module: seen.append((str(step), ops(module).total())))
    assert seen == [("canonicalize", 2), ("fuse-epilogue", 1), ("cse", 1)]


def test_every_printed_module_parses_back() -> None:
    texts: list[str] = []
    pipeline = Pipeline.parse(DEFAULT, REGISTRY)
    pipeline.run(decoder().module(REGISTRY), lambda _, module: texts.append(str(module)))
    assert len(texts) == 12
    assert all(str(Module.parse(text, REGISTRY)) == text for text in texts)


def test_a_pass_that_breaks_the_module_is_named() -> None:
    with pytest.raises(
        KernelForgeError, match=r"(?s)pass 'breaks' of test_passes\w+ left a broken module.*fc.*epilogue.*relu"
    ) as caught:
        Pipeline((Canonicalize(), Breaks())).run(small().module(REGISTRY))
    assert caught.value.exit_code == 1


def test_a_pass_that_fails_is_named() -> None:
    with pytest.raises(
        KernelForgeError, match=re.escape("pass 'raises{usage=true}' of test_passes_pipeline failed: it cannot")
    ) as refused:
        Pipeline((Raises(usage=True),)).run(small().module(REGISTRY))
    assert refused.value.hint == "ask another"
    with pytest.raises(
        PluginError, match=re.escape("pass 'raises' of test_passes_pipeline failed: IndexError: out of range")
    ):
        Pipeline((Raises(),)).run(small().module(REGISTRY))


@dataclass(frozen=True)
class Erases(Pass):
    name: ClassVar[str] = "erases"

    def run(self, module: Module) -> None:
        from kernelforge.passes.rewriting import Body

        body = Body(module)
        for product in body.walk("transformer.matmul"):
            body.erase(product)


def test_an_op_in_use_is_not_erased() -> None:
    with pytest.raises(KernelForgeError, match=r"'transformer\.matmul' is still used, so it cannot be erased"):
        Pipeline((Erases(),)).run(small().module(REGISTRY))


def linear(g: Graph, x: Tensor, name: str, n: int, *, bias: bool = False) -> Tensor:
    k = x.shape[-1]
    assert isinstance(k, int)
    y = g.matmul(x, g.constant(f"{name}.weight", (n, k), "bf16"), transpose_rhs=True)
    return y + g.constant(f"{name}.bias", (n,), "f32") if bias else y


def decoder(layers: int = 2, *, bias: bool = False) -> Graph:
    """A small Llama (with biases, Qwen2) over a KV cache."""
    g = Graph()
    width, heads, kv_heads, size, hidden, slots, capacity = 8, 4, 2, 4, 12, 4, 8
    ids, positions, places = (g.input(name, ("tokens",), "i32") for name in ("ids", "positions", "slots"))
    table = g.constant("embedding", (11, width), "bf16")
    x = g.embedding(table, ids).cast("f32")
    for i in range(layers):
        p = f"layers.{i}"
        with g.scope(p):
            normed = g.rms_norm(x, g.constant(f"{p}.norm1", (width,), "bf16"))
            q = linear(g, normed, f"{p}.q", heads * size, bias=bias).reshape("tokens", heads, size)
            k = linear(g, normed, f"{p}.k", kv_heads * size, bias=bias).reshape("tokens", kv_heads, size)
            v = linear(g, normed, f"{p}.v", kv_heads * size, bias=bias).reshape("tokens", kv_heads, size)
            q, k = (g.rope(t, positions, max_position=capacity) for t in (q, k))
            caches = []
            for name, new in (("keys", k), ("values", v)):
                cache = g.input(f"{p}.{name}", (slots, capacity, kv_heads, size), "f32", donated=True)
                caches.append(g.kv_cache_update(cache, new, positions, places))
                g.output(caches[-1], f"{p}.{name}")
            attended = g.attention(q, caches[0], caches[1], positions, places).reshape("tokens", heads * size)
            x = x + linear(g, attended, f"{p}.o", width)
            normed = g.rms_norm(x, g.constant(f"{p}.norm2", (width,), "bf16"))
            gate, up = (linear(g, normed, f"{p}.{name}", hidden) for name in ("gate", "up"))
            x = x + linear(g, g.silu(gate) * up, f"{p}.down", width)
    g.output(linear(g, g.rms_norm(x, g.constant("norm", (width,), "bf16")), "head", 11), "logits")
    return g


@pytest.mark.parametrize("bias", [False, True])
def test_default_pipeline_on_a_decoder(bias: bool) -> None:
    after = check(decoder(bias=bias), DEFAULT)
    assert ops(after) == {
        "embedding": 1,
        "concat": 4 if bias else 2,
        "rms_norm_matmul": 3,  # merged q, k and v; the head
        "matmul": 4,  # o with its residual; down with its residual
        "split": 2,
        "reshape": 8,
        "rope_attention": 2,
        "rms_norm_glu_matmul": 2,
    }


def test_sums_go_to_the_norms_when_epilogues_leave_them() -> None:
    after = check(decoder(), "fuse-glu,fuse-epilogue{residual=false},fuse-add-norm,fuse-qkv")
    assert ops(after)["add_rms_norm"] == 4
    assert ops(after)["rms_norm"] == 1
    assert ops(after)["add"] == 0
