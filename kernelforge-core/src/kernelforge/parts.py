"""Fused ops as the ops that they stand for, where a target has no kernel for the whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from kernelforge.errors import PluginError
from kernelforge.module import Function, Node
from kernelforge.op import OpDef, Part
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

T = TypeVar("T")


def taken_apart(function: Function, nodes: Collection[int], ops: Mapping[str, OpDef]) -> Function:
    """`function` with these of its nodes, given by index, replaced by their ops' parts. Raises PluginError for parts that name
    what is not there, or leave out a result."""
    if not nodes:
        return function
    fresh = count(1 + max(v for node in function.nodes for v in node.results))
    made: list[Node] = []
    for index, node in enumerate(function.nodes):
        made += _parts(node, ops, fresh) if index in nodes else (node,)
    return replace(function, nodes=tuple(made))


def typed_parts(problem: Problem, ops: Mapping[str, OpDef]) -> Iterator[tuple[Part, Problem]]:
    """The parts of a problem's op, in order, each with the problem that it is. Raises PluginError for parts that name what is
    not there."""
    op = ops[problem.op]
    types: dict[str, TensorType | None] = dict(zip((o.name for o in op.operands), problem.operands, strict=True))
    for part in op.parts_of(problem):
        if unknown := [f"op '{part.op}'"] * (part.op not in ops) + [f"'{v}'" for v in part.operands if v not in types]:
            raise PluginError(f"the parts of op '{op.full_name}' name {unknown[0]}, which is not there")
        inner = ops[part.op].problem([types[name] for name in part.operands], part.attrs)
        types.update(zip(part.results, inner.results, strict=True))
        yield part, inner


def _padded(values: Iterable[T], problem: Problem) -> tuple[T | None, ...]:
    """With None for the optional operands that a part leaves out."""
    given = tuple(values)
    return (*given, *(None,) * (len(problem.operands) - len(given)))


def _parts(node: Node, ops: Mapping[str, OpDef], fresh: count[int]) -> list[Node]:
    op = ops[node.op]
    values = dict(zip((o.name for o in op.operands), node.operands, strict=True))
    results = dict(zip(op.results, node.results, strict=True))
    made: list[Node] = []
    for part, problem in typed_parts(node.problem, ops):
        operands = _padded((values[name] for name in part.operands), problem)
        numbers = tuple(results[name] if name in results else next(fresh) for name in part.results)
        values.update(zip(part.results, numbers, strict=True))
        made.append(Node(part.op, operands, numbers, problem, node.location))
    if missing := [name for name in results if name not in values]:
        raise PluginError(f"the parts of op '{node.op}' do not give '{missing[0]}'")
    return made


def part_problems(problem: Problem, ops: Mapping[str, OpDef]) -> tuple[Problem, ...]:
    """The problems of a problem's parts, in order; empty where its op stands for itself. Raises as `typed_parts`."""
    return tuple(inner for _, inner in typed_parts(problem, ops))


def evaluate_parts(problem: Problem, arrays: Sequence[Array | None], ops: Mapping[str, OpDef]) -> tuple[Array, ...]:
    """The results of a problem's op, computed part by part by their references, each rounded to its type."""
    op = ops[problem.op]
    have = dict(zip((o.name for o in op.operands), arrays, strict=True))
    for part, inner in typed_parts(problem, ops):
        made = ops[part.op].evaluate(inner, _padded((have[name] for name in part.operands), inner))
        have.update(zip(part.results, made, strict=True))
    return tuple(a for name in op.results if (a := have[name]) is not None)
