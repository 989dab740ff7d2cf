"""The plan of one problem, which runs it alone: to verify, time and compare kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.constant import Named
from kernelforge.errors import UsageError
from kernelforge.plan import Plan, Step, Value
from kernelforge.problem import Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.selection import Selection


def operand_names(problem: Problem, registry: Registry) -> tuple[str, ...]:
    """The names of a problem's operands as `compile_problem` uses them; variadic ones are numbered."""
    op = registry.ops[problem.op]
    names = [o.name for o in op.operands]
    if op.variadic:
        names = names[:-1] + [f"{names[-1]}{i}" for i in range(len(problem.operands) - len(names) + 1)]
    return tuple(names)


def memory_of(t: TensorType) -> TensorType:
    """The row-major tensor that `t` is a view of, from its first element on: `t` itself when it is contiguous, else of
    shape [size, stride] of its outermost axis, the one with the largest stride. Raises UsageError when axes overlap."""
    if t.contiguous or t.constant:
        return t
    strides = t.element_strides()
    outer = max(range(t.rank), key=lambda axis: strides[axis])
    inner = [(d, s) for axis, (d, s) in enumerate(zip(t.shape, strides, strict=True)) if axis != outer]
    if any(isinstance(d, str) for d, _ in inner) or sum((int(d) - 1) * s for d, s in inner) >= strides[outer]:
        raise UsageError(f"{t} does not lie in rows of its outermost axis")
    return TensorType((t.shape[outer], strides[outer]), t.dtype)


def problem_plan(problem: Problem, selection: Selection, registry: Registry) -> Plan:
    """A plan of one step. Results that the op writes in place are the donated inputs themselves."""
    op = registry.ops[problem.op]
    names = operand_names(problem, registry)
    aliases = dict(op.in_place)
    values: list[Value] = []
    operands: list[int | None] = []
    for i, (name, t) in enumerate(zip(names, problem.operands, strict=True)):
        if t is None:
            operands.append(None)
            continue
        operands.append(len(values))
        if t.constant:
            values.append(Value(t, "constant", name, constant=Named(name, t)))
        else:
            memory, donated = memory_of(t), i in aliases.values()
            if donated and memory != t:
                raise UsageError(
                    f"operand '{name}' of {op.full_name} is written in place and must be contiguous, not {t}"
                )
            values.append(Value(memory, "input", name, donated=donated))
            if memory != t:
                values.append(Value(t, "view", base=len(values) - 1))
                operands[-1] = len(values) - 1
    inputs = tuple(i for i, v in enumerate(values) if v.place == "input")
    results: list[int] = []
    for i, t in enumerate(problem.results):
        destination = operands[aliases[i]] if i in aliases else None
        if destination is not None:
            results.append(destination)
        else:
            results.append(len(values))
            name = op.results[i] if not op.variadic_results else f"{op.results[0][1:]}{i}"
            values.append(Value(t, "output", name))
    step = Step(
        problem,
        problem.dims,
        tuple(operands),
        tuple(results),
        selection.variant.name,
        dict(selection.config),
        0,
        "problem",
        selection.chosen.config_source,
    )
    return Plan(selection.variant.target, tuple(values), (step,), inputs, tuple(results))
