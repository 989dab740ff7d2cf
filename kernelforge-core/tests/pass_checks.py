"""What the tests of passes share: running a module on the reference target before and after."""

from __future__ import annotations

from collections import Counter

from kernelforge.graph import Graph
from kernelforge.module import Module
from kernelforge.passes import Pipeline
from kernelforge.plugins import core_registry
from kernelforge.testing.programs import compare_programs, execute, program_inputs

REGISTRY = core_registry()


def lowered(source: Graph | Module, pipeline: str) -> Module:
    return Pipeline.parse(pipeline, REGISTRY).run(as_module(source))


def as_module(source: Graph | Module) -> Module:
    return source.module(REGISTRY) if isinstance(source, Graph) else source


def ops(source: Graph | Module) -> Counter[str]:
    """How often each op occurs, by short name."""
    return Counter(node.op.partition(".")[2] for node in as_module(source).function().nodes)


def check(source: Graph | Module, pipeline: str, *, again: bool = True) -> Module:
    """Run `pipeline`; the result computes what the source does, and running it again changes nothing, if so wanted.

    Results may differ by a few roundings of their dtype: every op that is fused away is a rounding less.
    """
    before = as_module(source)
    text = str(before)
    after = lowered(before, pipeline)
    assert str(before) == text
    inputs, constants = program_inputs(before.function(), seed=len(text))
    want, have = (execute(module, inputs, constants, REGISTRY) for module in (before, after))
    compare_programs(want, have, "the module")
    if again:
        assert str(lowered(after, pipeline)) == str(after)
    return after
