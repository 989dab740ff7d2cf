"""Cases of passes: what a program computes stays, the pass comes to rest, its text reads back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from kernelforge.graph import Graph
from kernelforge.lazy import resolve
from kernelforge.op import OpDef
from kernelforge.passes import Pipeline
from kernelforge.passes.spec import write_call
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure
from kernelforge.testing.programs import Program, compare_programs, execute, program_inputs

if TYPE_CHECKING:
    from kernelforge.module import Module
    from kernelforge.problem import Problem, TensorType
    from kernelforge.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]

SEEDS = {1: range(3), 2: range(3, 12), 5: range(12, 30)}
"""Of the random programs, by level."""
OPTION_SEEDS = range(40, 43)
STEPS = 16
REST = 40
"""Runs after which a pass must have come to rest: one that removes what is dead may take as many as a program is deep."""
SMALL = 1 << 16
"""Bytes of the samples that programs of one op are made of."""


def pass_cases(registry: Registry, plugin: str) -> list[Case]:
    cases: list[Case] = []
    for spec in registry.passes.values():
        if spec.provenance.plugin != plugin:
            continue
        name = spec.name

        def add(level: int, label: str, check: Any, name: str = name, **arguments: Any) -> None:
            cases.append(Case(f"pass/{name}/{level}/{label}", level, "pass", name, partial(check, **arguments)))

        cls = resolve(spec.load)
        for text in plain_texts(cls, name):
            mark = _mark(text)
            add(1, f"text{mark}", check_text, text=text)
            add(2, f"single-ops{mark}", check_single_ops, text=text)
            for level, seeds in SEEDS.items():
                for seed in seeds:
                    add(level, f"program-{seed}{mark}", check_program, text=text, seed=seed)
        for text in option_texts(cls, name):
            for seed in OPTION_SEEDS:
                add(2, f"program-{seed}{_mark(text)}", check_program, text=text, seed=seed)
    return cases


def _mark(text: str) -> str:
    options = text.partition("{")[2].rstrip("}").replace(" ", ".")
    return f".{options}" if options else ""


def _values(cls: type) -> dict[str, list[str]]:
    """The values of each option that has a few, as they are written, but for the default."""
    hints = get_type_hints(cls)
    found: dict[str, list[str]] = {}
    for field in fields(cls):
        kind = hints[field.name]
        values = (False, True) if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
        found[field.name] = [str(v).lower() if isinstance(v, bool) else v for v in values if v != field.default]
    return found


def plain_texts(cls: type, name: str) -> list[str]:
    """The pass with nothing but what it needs: once for each value of a required option that has a few."""
    values = _values(cls)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    chosen = product(*([f"{option}={value}" for value in values[option]] for option in needed))
    return [f"{name}{{{' '.join(options)}}}" if options else name for options in chosen]


def option_texts(cls: type, name: str) -> list[str]:
    """The pass with one option more, one of those that have a few values."""
    texts: list[str] = []
    for plain in plain_texts(cls, name)[:1]:
        given = plain.partition("{")[2].rstrip("}")
        for option, values in _values(cls).items():
            if f"{option}=" not in given:
                texts += [f"{name}{{{f'{given} {option}={value}'.strip()}}}" for value in values]
    return texts


def check_text(bench: Bench, text: str) -> None:
    """`str(pass)` reads back as an equal pass, with and without options. Raises Failure."""
    name = text.partition("{")[0]
    for each in (text, *option_texts(resolve(bench.registry.passes[name].load), name)):
        (made,) = Pipeline.parse(each, bench.registry).passes
        written = str(made)
        try:
            back = Pipeline.parse(written, bench.registry).passes
        except Exception as error:
            raise Failure(
                "round-trip", f"pass '{each}' writes itself as '{written}', which is refused: {error}"
            ) from None
        if back != (made,):
            raise Failure("round-trip", f"pass '{each}' writes itself as '{written}', which reads as another pass")
        if written != write_call(name, made):
            raise Failure("round-trip", f"pass '{each}' writes itself as '{written}', not '{write_call(name, made)}'")


def check_program(bench: Bench, text: str, seed: int) -> None:
    """A random program. Raises Failure."""
    check_module(bench, bench.module(Program(seed).grow(STEPS)), text, f"random program {seed}")


def check_single_ops(bench: Bench, text: str) -> None:
    """Programs of a single op, for `telling` small samples of every op of every dialect. Raises Failure."""
    for op in bench.registry.ops.values():
        for graph, problem in telling(sample_graphs(op)):
            arrays = op.make_inputs(problem, np.random.default_rng(0))
            named = {f"x{i}": (a, t.constant) for i, (a, t) in _present(arrays, problem)}
            given = tuple({n: a for n, (a, constant) in named.items() if constant == kind} for kind in (False, True))
            check_module(bench, bench.module(graph), text, f"the program of {problem}", given)


def _present(arrays: Sequence[Array | None], problem: Problem) -> Iterator[tuple[int, tuple[Array, TensorType]]]:
    for i, (a, t) in enumerate(zip(arrays, problem.operands, strict=True)):
        if a is not None and t is not None:
            yield i, (a, t)


def telling(samples: Iterable[tuple[Graph, Problem]]) -> Iterator[tuple[Graph, Problem]]:
    """Those that have an attribute's value or an optional operand that no sample before them has."""
    seen: set[tuple[object, ...]] = set()
    for graph, problem in samples:
        has = {*problem.attrs, *((i, t is None) for i, t in enumerate(problem.operands))}
        if not has <= seen:
            seen |= has
            yield graph, problem


def sample_graphs(op: OpDef) -> Iterator[tuple[Graph, Problem]]:
    """Programs of one op, and its problem, for the op's small samples."""
    for problem in op.samples(random.Random(0)):
        tensors = [*problem.operands, *problem.results]
        if any(t is not None and (t.strides is not None or t.quantised or t.nbytes() > SMALL) for t in tensors):
            continue
        graph = Graph()
        operands = [
            None if t is None else (graph.constant if t.constant else graph.input)(f"x{i}", t.static_shape(), t.dtype)
            for i, t in enumerate(problem.operands)
        ]
        found = graph.op(op, *operands, **dict(problem.attrs))
        for i, result in enumerate(found if isinstance(found, tuple) else (found,)):
            graph.output(result, f"y{i}")
        yield graph, problem


def check_module(
    bench: Bench, before: Module, text: str, what: str, given: tuple[dict[str, Array], ...] | None = None
) -> None:
    """The module after the pass verifies, takes and gives the same, computes the same, and comes to rest. `given` are
    inputs and constants, random ones when None. Raises Failure."""
    bench.note(f"{text} on {what}")
    pipeline = Pipeline.parse(text, bench.registry)
    source = str(before)
    after = pipeline.run(before)
    if str(before) != source:
        raise Failure("input-mutated", f"pass '{text}' changed the module that it was to copy ({what})")
    old, new = before.function(), after.function()
    if old.args != new.args:
        raise Failure("wrong-values", f"pass '{text}' changed the arguments of {what}: {new.args} were {old.args}")
    inputs, constants = given or program_inputs(old, seed=len(source))
    want, have = (execute(module, inputs, constants, bench.registry) for module in (before, after))
    compare_programs(want, have, f"{what} after '{text}'")
    texts = [str(after)]
    for _ in range(REST):
        after = pipeline.run(after)
        texts.append(str(after))
        if texts[-1] == texts[-2]:
            break
    else:
        raise Failure("not-idempotent", f"pass '{text}' still changes {what} when it is run the {REST + 1}th time")
    compare_programs(want, execute(after, inputs, constants, bench.registry), f"{what} after '{text}' at rest")
