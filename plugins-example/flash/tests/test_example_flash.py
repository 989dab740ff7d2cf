from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from kernelforge.graph import Graph, Tensor
from kernelforge.module import Module
from kernelforge.passes import Pipeline
from kernelforge.registry import default_registry
from kernelforge.session import Session

SIZES = {"q": (2, 5, 8), "k": (2, 7, 8), "v": (2, 7, 8)}
Change = Callable[[Graph, Tensor], Tensor]


def written_out(change: Change = lambda g, x: x, *, batch: tuple[int, ...] = (), values: int = 8) -> Graph:
    """softmax(q @ k^T) @ v, the scores changed."""
    g = Graph()
    shapes = {**SIZES, "v": (2, 7, values)}
    q, k, v = (g.input(name, (*batch, *shape), "f32") for name, shape in shapes.items())
    g.output(g.softmax(change(g, g.matmul(q, k, transpose_rhs=True))) @ v, "out")
    return g


def fused(g: Graph) -> Module:
    return Pipeline.parse("fuse-attention", default_registry()).run(g.module())


def ops(module: Module) -> Counter[str]:
    return Counter(node.op.partition(".")[2] for node in module.function().nodes)


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_it_computes_the_same(target: str, batch: tuple[int, ...]) -> None:
    module = written_out(batch=batch).module()
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((*batch, *shape)).astype(np.float32) for name, shape in SIZES.items()}
    before, after = (
        np.asarray(Session(target, pipeline=text).compile(module).run(inputs)[0]) for text in ("", "fuse-attention")
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_scores_are_gone() -> None:
    module = fused(written_out())
    assert ops(module) == Counter(transpose=4, attention=1)
    assert str(Pipeline.parse("fuse-attention", default_registry()).run(module)) == str(module)


def test_dynamic_numbers_of_tokens() -> None:
    g = Graph()
    q, k, v = (g.input(name, (2, "tokens", 8), "f32") for name in "qkv")
    g.output(g.softmax(g.matmul(q, k, transpose_rhs=True)) @ v, "out")
    assert ops(fused(g))["attention"] == 1


@pytest.mark.parametrize(
    "g",
    [
        written_out(lambda g, scores: scores + scores),
        written_out(lambda g, scores: g.softmax(scores, axis=1)),
        written_out(values=4),
        written_out(batch=(2, 2)),
    ],
    ids=["scores-changed", "other-axis", "other-width", "rank-5"],
)
def test_what_is_no_attention_stays(g: Graph) -> None:
    assert fused(g).text() == g.module().text()


def test_scores_that_are_wanted_stay() -> None:
    g = Graph()
    q, k, v = (g.input(name, shape, "f32") for name, shape in SIZES.items())
    scores = g.softmax(g.matmul(q, k, transpose_rhs=True))
    g.output(scores, "scores")
    g.output(scores @ v, "out")
    assert "attention" not in ops(fused(g))


def test_fewer_keys_than_queries_stay() -> None:
    g = Graph()
    q, k, v = (g.input(name, (2, size, 8), "f32") for name, size in (("q", 5), ("k", 3), ("v", 3)))
    g.output(g.softmax(g.matmul(q, k, transpose_rhs=True)) @ v, "out")
    assert "attention" not in ops(fused(g))
