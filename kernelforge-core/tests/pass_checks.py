"""What the tests of passes share: running a module on the reference target before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from kernelforge.constant import ArraySource
from kernelforge.dialect import context_for
from kernelforge.dtype import FLOATS, epsilon, from_numpy, to_numpy
from kernelforge.graph import Graph
from kernelforge.mlir import ir
from kernelforge.module import Function, Module
from kernelforge.passes import Pipeline
from kernelforge.planning import make_plan
from kernelforge.plugins import core_registry
from kernelforge.problem import Problem
from kernelforge.reference import INFO, ReferenceDevice
from kernelforge.selection import Selection, select

Array = np.ndarray[Any, np.dtype[Any]]

REGISTRY = core_registry()


def lowered(source: Graph | Module, pipeline: str) -> Module:
    return Pipeline.parse(pipeline, REGISTRY).run(as_module(source))


@cache
def _context() -> ir.Context:
    """One for all modules: to make one takes longer than most tests."""
    return context_for(REGISTRY.ops)


def as_module(source: Graph | Module) -> Module:
    return Module.parse(source.text(), REGISTRY, _context()) if isinstance(source, Graph) else source


def ops(source: Graph | Module) -> Counter[str]:
    """How often each op occurs, by short name."""
    return Counter(node.op.partition(".")[2] for node in as_module(source).function().nodes)


def arrays_for(function: Function, dims: Mapping[str, int], seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and constants: normal floats, and integers in 0..3."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    constants: dict[str, Array] = {}
    for arg in function.args:
        shape = arg.type.static_shape(dims)
        values = rng.standard_normal(shape) if arg.type.dtype in FLOATS else rng.integers(0, 4, shape)
        (constants if arg.constant else inputs)[arg.name] = np.asarray(values).astype(to_numpy(arg.type.dtype))
    return inputs, constants


def execute(module: Module, inputs: Mapping[str, Array], constants: Mapping[str, Array]) -> dict[str, Array]:
    function = module.function()

    def choose(problem: Problem) -> Selection:
        return select(problem, REGISTRY.variants(problem.op, "reference"), INFO)

    plan = make_plan(function, REGISTRY.ops, choose, target="reference")
    executable = ReferenceDevice().compile(plan, ArraySource(constants), REGISTRY)
    outputs = [np.asarray(o) for o in executable.run(inputs)]
    return dict(zip(function.output_names, outputs, strict=True))


def check(source: Graph | Module, pipeline: str, *, again: bool = True) -> Module:
    """Run `pipeline`; the result computes what the source does, and running it again changes nothing, if so wanted.

    Results may differ by a few roundings of their dtype: every op that is fused away is a rounding less.
    """
    before = as_module(source)
    text = str(before)
    after = lowered(before, pipeline)
    assert str(before) == text
    inputs, constants = arrays_for(before.function(), dict.fromkeys(before.function().dims, 3), seed=len(text))
    want, have = execute(before, inputs, constants), execute(after, inputs, constants)
    assert list(have) == list(want)
    for name, expected in want.items():
        assert have[name].shape == expected.shape
        assert have[name].dtype == expected.dtype
        exact = expected.astype(np.float64)
        allowed = 64 * epsilon(from_numpy(expected.dtype)) * max(1.0, np.abs(exact).max(initial=0.0))
        difference = np.abs(have[name].astype(np.float64) - exact).max(initial=0.0)
        assert difference <= allowed, f"{name}: off by {difference}, {allowed} is allowed"
    if again:
        assert str(lowered(after, pipeline)) == str(after)
    return after
