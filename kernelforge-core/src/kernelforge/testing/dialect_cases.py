"""Cases of dialects: each op's types, text, verifier, reference, views and samples agree with each other."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge.dtype import FLOATS, INTEGERS, epsilon, to_numpy
from kernelforge.errors import UsageError
from kernelforge.module import Module
from kernelforge.op import OpDef, OpError
from kernelforge.parts import evaluate_parts
from kernelforge.problem import Problem, TensorType, parse_problem
from kernelforge.syntax import tensor_text
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure
from kernelforge.testing.pass_cases import sample_graphs
from kernelforge.tolerance import Mismatch, compare, expect

if TYPE_CHECKING:
    from kernelforge.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]

SMALL = 1 << 20
"""Bytes of a sample that is computed here."""
MOST = 10
DYNAMIC = "n"
PART_ROUNDINGS = 4.0
"""Times the tolerance of the whole, for what its parts round on the way."""


def dialect_cases(registry: Registry, plugin: str) -> list[Case]:
    cases: list[Case] = []
    for dialect in registry.dialects.values():
        if dialect.provenance.plugin != plugin:
            continue
        for op in registry.ops.values():
            if op.dialect == dialect.name:
                for level, label, check in CHECKS:
                    name = f"dialect/{op.full_name}/{level}/{label}"
                    cases.append(Case(name, level, "dialect", op.full_name, partial(check, op=op)))
    return cases


def small_samples(op: OpDef) -> list[Problem]:
    found = op.samples(random.Random(0))
    return [p for p in found if sum(t.nbytes() for t in (*p.operands, *p.results) if t is not None) <= SMALL][:MOST]


def check_samples(bench: Bench, op: OpDef) -> None:
    """There are small ones; they are the op's own, static, the same for the same seed, and their costs are numbers."""
    samples = small_samples(op)
    if not samples:
        raise Failure("error", f"{op.full_name} has no sample of at most {SMALL >> 20} MiB")
    if samples != small_samples(op):
        raise Failure("not-deterministic", f"the samples of {op.full_name} differ for the same seed")
    for problem in samples:
        again = op.problem(problem.operands, dict(problem.attrs))
        if problem.dims or again != problem or parse_problem(str(problem)) != problem:
            raise Failure("round-trip", f"a sample of {op.full_name} is {problem}, its own op makes {again} of it")
        cost = op.problem_cost(problem)
        if min(cost.flops, cost.bytes) < 0 or not all(isinstance(n, int) for n in (cost.flops, cost.bytes)):
            raise Failure("error", f"the cost of {problem} is {cost}")


def check_text(bench: Bench, op: OpDef) -> None:
    """Modules of the samples print as text that reads back as the same module, with the sample's problem."""
    for graph, problem in sample_graphs(op):
        key = str(problem)
        module = Module.parse(graph.text(), bench.registry)
        printed = str(module)
        if str(Module.parse(printed, bench.registry)) != printed:
            raise Failure("round-trip", f"the module of {key} prints otherwise after it was read")
        (node,) = module.function().nodes
        if str(node.problem) != key:
            raise Failure("round-trip", f"the module of {key} holds {node.problem}")


def check_verifier(bench: Bench, op: OpDef) -> None:
    """MLIR refuses a result of another type, an attribute that the op does not have, and too many operands."""
    for graph, problem in sample_graphs(op):
        text = graph.text()
        for wrong, why in _wrong_texts(text, op, problem):
            try:
                Module.parse(wrong, bench.registry)
            except UsageError:
                continue
            raise Failure("not-refused", f"{op.full_name}: the verifier takes {why} for {problem}")
        return


def _wrong_texts(text: str, op: OpDef, problem: Problem) -> Iterator[tuple[str, str]]:
    line = next(row for row in text.splitlines() if f'"{op.full_name}"(' in row)
    head, _, results = line.rpartition(" -> ")
    have = tensor_text(problem.results[0].shape, problem.results[0].dtype)
    for shape, dtype, why in (
        (problem.results[0].shape, "i8" if problem.results[0].dtype != "i8" else "f32", "a result of another type"),
        ((*problem.results[0].shape, 2), problem.results[0].dtype, "a result of another rank"),
    ):
        if problem.results[0].quantised:
            continue
        wrong = results.replace(have, tensor_text(shape, dtype), 1)
        returned = re.sub(
            r"(return %\w+(?:#\d+)?[^:]* : )" + re.escape(have), rf"\g<1>{tensor_text(shape, dtype)}", text
        )
        signature = returned.replace(f"-> ({have} {{", f"-> ({tensor_text(shape, dtype)} {{", 1)
        yield signature.replace(line, f"{head} -> {wrong}"), why
    attribute = "{no_such_attribute = 1 : i64"
    braced = re.sub(r"\) \{", f") {attribute}, ", line, count=1)
    if braced == line:
        braced = re.sub(r'("\(.*?\)) :', rf"\1 {attribute}}} :", line, count=1)
    yield text.replace(line, braced), "an unknown attribute"


def check_attributes(bench: Bench, op: OpDef) -> None:
    """Unknown and ill-typed attributes, absent and surplus operands are refused."""
    problem = small_samples(op)[0]
    attrs = dict(problem.attrs)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (problem.operands, {**attrs, "no_such_attribute": 1}, "an unknown attribute"),
        ((), attrs, "no operands"),
    ]
    if not op.variadic:
        wrong.append(((*problem.operands, *problem.operands), attrs, "twice its operands"))
    for attribute in op.attributes:
        odd: Any = 1.5 if attribute.kind in ("str", "bool", "ints") else "text"
        wrong.append((problem.operands, {**attrs, attribute.name: odd}, f"{attribute.name} = {odd!r}"))
        if attribute.choices:
            wrong.append((problem.operands, {**attrs, attribute.name: "no such choice"}, f"any {attribute.name}"))
    for operands, given, why in wrong:
        try:
            op.problem(operands, given)
        except OpError:
            continue
        raise Failure("not-refused", f"{op.full_name} takes {why}")


def check_inference(bench: Bench, op: OpDef) -> None:
    """Operand types that are changed at random are refused with OpError, or computed with the types that were inferred."""
    rng = random.Random(1)
    for problem in small_samples(op):
        for _ in range(6):
            operands = _changed(problem, rng)
            try:
                made = op.problem(operands, dict(problem.attrs))
            except OpError:
                continue
            bench.note(f"the reference on {made}")
            try:
                arrays = op.make_inputs(made, np.random.default_rng(0))
                outputs = op.compute(made, arrays)
            except Exception as error:
                message = f"{op.full_name} takes {made}, but its reference raises {type(error).__name__}: {error}"
                raise Failure("not-refused", message) from None
            _check_types(made, outputs)


def _changed(problem: Problem, rng: random.Random) -> list[TensorType | None]:
    operands = list(problem.operands)
    i = rng.choice([i for i, t in enumerate(operands) if t is not None])
    t = problem.operand(i)
    if t.quantised:
        return operands
    shape = list(t.static_shape())
    change = rng.randrange(4)
    if change == 0:
        operands[i] = replace(t, dtype=rng.choice((*FLOATS, *INTEGERS)))
    elif change == 1 and shape:
        shape[rng.randrange(len(shape))] += 1
        operands[i] = TensorType(tuple(shape), t.dtype)
    elif change == 2 and shape:
        operands[i] = TensorType(tuple(shape[1:]), t.dtype)
    else:
        operands[i] = TensorType((2, *shape), t.dtype)
    return operands


def _check_types(problem: Problem, outputs: tuple[Array, ...]) -> None:
    if len(outputs) != len(problem.results):
        raise Failure("wrong-shape", f"the reference gives {len(outputs)} results for {problem}")
    for output, t in zip(outputs, problem.results, strict=True):
        if not t.quantised and output.shape != t.static_shape():
            raise Failure("wrong-shape", f"the reference gives shape {output.shape} for {problem}")


def check_reference(bench: Bench, op: OpDef) -> None:
    """It gives the inferred shapes, floats in float64, the same for any layout and at every call, and leaves its operands
    alone."""
    for problem in small_samples(op):
        arrays = op.make_inputs(problem, np.random.default_rng(0))
        before = [None if a is None else a.copy() for a in arrays]
        outputs = tuple(o.copy() for o in op.compute(problem, arrays))
        _check_types(problem, outputs)
        for a, b, name in zip(arrays, before, _names(op, problem), strict=True):
            if a is not None and b is not None and a.tobytes() != b.tobytes():
                raise Failure("input-mutated", f"the reference of {problem} writes to its operand '{name}'")
        for output, t in zip(outputs, problem.results, strict=True):
            if t.dtype in FLOATS and not op.exact and output.dtype != np.float64:
                raise Failure("wrong-dtype", f"the reference of {problem} gives {output.dtype}, must give float64")
        turned = [None if a is None else np.array(a, order="F") for a in arrays]
        for again, when in ((op.compute(problem, arrays), "twice"), (op.compute(problem, turned), "in another layout")):
            for a, b in zip(outputs, again, strict=True):
                scale = float(np.abs(a.astype(np.float64)).max(initial=0.0)) if a.dtype.names is None else 0.0
                same = np.array_equal(a, b) if not scale else _close(a, b, scale)
                if not same:
                    raise Failure("not-deterministic", f"the reference of {problem} gives other results {when}")
        if (magnitudes := op.magnitudes(problem, arrays)) is not None:
            _check_types(problem, magnitudes)


def _close(a: Array, b: Array, scale: float) -> bool:
    with np.errstate(all="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return bool(np.all((difference <= 1e-9 * scale) | (np.isnan(a.astype(float)) & np.isnan(b.astype(float)))))


def _names(op: OpDef, problem: Problem) -> list[str]:
    return [op.operands[min(i, len(op.operands) - 1)].name for i in range(len(problem.operands))]


def check_dynamic(bench: Bench, op: OpDef) -> None:
    """Types with a dynamic dimension are refused, or inferred as the static ones are."""
    for problem in small_samples(op):
        leads = [t.shape[0] for t in problem.operands if t is not None and t.rank]
        if not leads or any(t is not None and t.quantised and t.rank < 2 for t in problem.operands):
            continue
        lead = leads[0]
        operands = [
            TensorType((DYNAMIC, *t.shape[1:]), t.dtype) if t is not None and t.rank and t.shape[0] == lead else t
            for t in problem.operands
        ]
        try:
            made = op.problem(operands, dict(problem.attrs))
        except (OpError, UsageError):
            continue
        static = [t.shape for t in problem.results]
        if [t.static_shape({DYNAMIC: int(lead)}) for t in made.results] != static:
            raise Failure("wrong-shape", f"{made} is inferred where {problem} is for {DYNAMIC} = {lead}")


def check_views(bench: Bench, op: OpDef) -> None:
    """Results that are said to be views of the first operand's memory are what the reference gives."""
    for problem in small_samples(op):
        views = op.views(problem.operands, dict(problem.attrs))
        if views is None:
            continue
        arrays = op.make_inputs(problem, np.random.default_rng(0))
        first, t = arrays[0], problem.operand(0)
        assert first is not None
        memory = np.zeros(
            sum((int(d) - 1) * s for d, s in zip(t.shape, t.element_strides(), strict=True)) + 1, first.dtype
        )
        as_strided(memory, first.shape, [s * t.itemsize for s in t.element_strides()])[...] = first
        for view, want, result in zip(views, op.evaluate(problem, arrays), problem.results, strict=True):
            shape = TensorType(view.shape, result.dtype).static_shape()
            if shape != want.shape:
                raise Failure("wrong-shape", f"the view of {problem} has shape {shape}, its result {want.shape}")
            flat = memory[view.offset :]
            got = as_strided(flat, shape, [s * t.itemsize for s in view.strides])
            if not np.array_equal(got.astype(to_numpy(result.dtype)), want):
                raise Failure("wrong-values", f"the view of {problem} is not what the reference gives")


def check_in_place(bench: Bench, op: OpDef) -> None:
    """What is overwritten has the type of the result."""
    for problem in small_samples(op):
        for result, operand in op.in_place:
            have, want = problem.results[result], problem.operand(operand)
            if (have.shape, have.dtype) != (want.shape, want.dtype):
                raise Failure("wrong-shape", f"{problem} writes a {have} over a {want}")


def check_parts(bench: Bench, op: OpDef) -> None:
    """The ops that it stands for give what it gives, but for the roundings between them."""
    for problem in small_samples(op):
        if not op.parts_of(problem):
            continue
        arrays = op.make_inputs(problem, np.random.default_rng(0))
        try:
            made = evaluate_parts(problem, arrays, bench.registry.ops)
        except Exception as error:
            raise Failure("error", f"the parts of {problem} fail: {type(error).__name__}: {error}") from None
        between = max((epsilon(t.dtype) for t in problem.results if t.dtype in FLOATS), default=0.0)
        expected = expect(problem, op, arrays, factor=PART_ROUNDINGS, between=between)
        for got, want, t in zip(made, expected, problem.results, strict=True):
            try:
                compare(got, want.exact, want.allowed, t.dtype, f"a result of the parts of {problem}")
            except Mismatch as mismatch:
                raise Failure(mismatch.kind, str(mismatch)) from None


Check = Callable[..., None]
CHECKS: tuple[tuple[int, str, Check], ...] = (
    (1, "samples", check_samples),
    (1, "text", check_text),
    (1, "reference", check_reference),
    (2, "verifier", check_verifier),
    (2, "attributes", check_attributes),
    (2, "inference", check_inference),
    (2, "parts", check_parts),
    (3, "dynamic", check_dynamic),
    (3, "views", check_views),
    (3, "in-place", check_in_place),
)
