from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from kernelforge.errors import UsageError
from kernelforge.graph import Graph
from kernelforge.module import Module
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.tune.verify import Workload

OP = "primer.squared_relu"


def graph() -> Graph:
    g = Graph()
    x = g.input("x", ("tokens", 5), "f32")
    y = g.op(OP, x)
    assert not isinstance(y, tuple)
    g.output(y + y, "out")
    return g


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        with Session("cpu", threads=2) as opened:
            yield opened


def test_text_parses_back() -> None:
    text = str(graph().module())
    assert OP in text
    assert str(Module.parse(text, default_registry())) == text


def test_verifier_refuses_integers() -> None:
    text = str(graph().module()).replace("f32", "i32")
    with pytest.raises(UsageError, match=r"'primer\.squared_relu' op operand 'x' must have a float type, got i32"):
        Module.parse(text, default_registry())


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_it_runs_everywhere(target: str) -> None:
    x = np.array([[-1, 0, 2, np.nan, np.inf]], np.float32)
    with Session(target) as opened:
        (y,) = opened.compile(graph().module()).run({"x": x})
    np.testing.assert_array_equal(np.asarray(y), [[0, 0, 8, np.nan, np.inf]])


def test_kernel_is_right_and_chosen(session: Session) -> None:
    for problem in session.registry.ops[OP].samples(random.Random(1)):
        selection = session.select(problem)
        assert (selection.variant.name, selection.variant.provenance.plugin) == ("vectorized", "primer")
        for config in selection.variant.config_space(problem, session.device.info):
            Workload(session, problem).verify(session.compile_problem(problem, config=config))


def test_cost() -> None:
    op = default_registry().ops[OP]
    problem = next(iter(op.samples(random.Random(0))))
    size = problem.operand(0).size()
    assert (op.problem_cost(problem).flops, op.problem_cost(problem).bytes) == (2 * size, 8 * size)
