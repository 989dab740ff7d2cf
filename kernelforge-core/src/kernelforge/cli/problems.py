"""What `tune` and `why` are about: an op with sizes, a problem's key, or every problem of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from kernelforge.bench.matmul import MATMUL, matmul_problem
from kernelforge.cli.shapes import key_example, shape_example, shaped_problem
from kernelforge.errors import AssetError, UsageError
from kernelforge.faults import leave_out
from kernelforge.op import OpDef, OpError
from kernelforge.parts import part_problems
from kernelforge.problem import Problem, parse_problem
from kernelforge.registry import Registry, lookup
from kernelforge.variant import Accept

if TYPE_CHECKING:
    from kernelforge.importer import ImportedModel
    from kernelforge.session import Session
    from kernelforge.variant import Config


@dataclass(frozen=True)
class Asked:
    """A problem, and where a model has it."""

    problem: Problem
    """As it is run: dimensions may be dynamic."""
    static: Problem
    """With the sizes at which it is measured."""
    programs: tuple[str, ...] = ()
    steps: int = 1
    """How many steps of those programs are this problem."""
    shared: Config | None = None
    """The config that a program runs it with so that a constant is kept once (`kernelforge.layouts`), if it is another one
    than is selected."""

    @classmethod
    def of(cls, problem: Problem) -> Asked:
        return cls(problem, problem)


@dataclass(frozen=True)
class Formats:
    """The options that say how to read a model."""

    weights: str = "native"
    activations: str = "auto"
    kv_dtype: str = "auto"
    context: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not as by default: an importer that does not know one is only asked to when it is used."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def check(self, model: str | None) -> None:
        """Raises UsageError for one that was given when there is no model."""
        for name in self.given() if model is None else ():
            raise UsageError(f"--{name.replace('_', '-')} needs --model")


@dataclass(frozen=True)
class Request:
    """The options of a verb that name problems: op, problem or model, or a model and the op that is meant of it."""

    op: str | None
    sizes: tuple[int | None, int | None, int | None]
    """m, n, k."""
    dtype: str
    constant: bool
    problem: str | None
    model: str | None
    formats: Formats = Formats()
    shape: str | None = None
    attrs: Sequence[str] = ()

    def resolve(self, session: Session) -> list[Asked]:
        """The problems. Raises UsageError for options that name none, AssetError for a model that nobody reads."""
        named = self.model if self.model is not None else self.op
        if (named is None) == (self.problem is None):
            raise UsageError("name one of: an op (matmul --shape 64x128,128x64), --problem KEY, --model PATH")
        self.formats.check(self.model)
        if self.model is not None:
            return self._of_model(session, self.model)
        if self.problem is not None:
            return [Asked.of(checked_problem(session.registry, self.problem))]
        assert self.op is not None
        op = find_op(session.registry, self.op)
        m, n, k = self.sizes
        if self.shape is not None:
            if self.sizes != (None, None, None):
                raise UsageError("--shape and --m, --n, --k exclude each other", hint="give one of them")
            return [Asked.of(shaped_problem(op, self.shape, self.dtype, self.attrs, constant=self.constant))]
        if op.full_name != MATMUL:
            raise UsageError(f"{op.name} needs the shapes of its operands", hint=shape_example(op))
        if m is None or n is None or k is None:
            raise UsageError(
                "matmul needs its sizes", hint="for example --shape 64x128,128x64 or --m 64 --n 64 --k 128"
            )
        device = session.device.info
        return [Asked.of(matmul_problem(session.registry, m, n, k, self.dtype, constant=self.constant, device=device))]

    def _of_model(self, session: Session, source: str) -> list[Asked]:
        """All problems of the model, or those of one op."""
        if self.shape is not None or self.sizes != (None, None, None):
            raise UsageError("--model excludes --shape and --m, --n, --k", hint="a model has its own sizes")
        op = None if self.op is None else find_op(session.registry, self.op).full_name
        found = model_problems(session, load_model(session, source, self.formats))
        if not found:
            raise UsageError(f"no step of the model '{source}' needs a kernel on target '{session.target}'")
        kept = [asked for asked in found if op in (None, asked.problem.op)]
        if not kept:
            there = ", ".join(sorted({asked.problem.op for asked in found}))
            hint = _in_fusions(str(op), session) or f"it has: {there}"
            raise UsageError(f"no step of the model '{source}' is a {op} on target '{session.target}'", hint=hint)
        return kept


def _in_fusions(op: str, session: Session) -> str:
    """Where an op that no step runs went: into parts, or into a whole; empty when the passes met none."""
    for fusion in session.fusions.values():
        if fusion.problem.op == op:
            parts = ", ".join(dict.fromkeys(part.op for part in fusion.parts))
            return f"the passes make it, but it runs there in parts ({fusion.reason}): {parts}"
    whole = sorted({f.problem.op for f in session.fusions.values() if op in [part.op for part in f.parts]})
    return f"it is a part of {', '.join(whole)}" if whole else ""


def find_op(registry: Registry, name: str) -> OpDef:
    """An op by its full name, or by its short one when only one dialect has it. Raises UsageError."""
    if name in registry.ops:
        return registry.ops[name]
    short: dict[str, list[OpDef]] = {}
    for op in registry.ops.values():
        short.setdefault(op.name, []).append(op)
    found = lookup("op", short, name)
    if len(found) > 1:
        raise UsageError(f"several dialects have '{name}'", hint=f"one of: {', '.join(op.full_name for op in found)}")
    return found[0]


def checked_problem(registry: Registry, key: str) -> Problem:
    """The problem that `key` writes, with default attributes filled in. Raises UsageError when its op refuses it."""
    given = parse_problem(key)
    op = find_op(registry, given.op)
    try:
        checked = op.problem(given.operands, dict(given.attrs))
    except OpError as error:
        raise UsageError(
            f"{given.op} does not take this problem: {error}", hint=f"one it takes: {key_example(op)}"
        ) from None
    have, want = ([(t.shape, t.dtype) for t in p.results] for p in (given, checked))
    if have != want:
        results = ", ".join(map(str, checked.results))
        raise UsageError(f"{given.op} gives ({results}) for these operands, not what the problem says")
    return Problem(checked.op, checked.operands, given.results, checked.attrs).canonical()


def load_model(session: Session, source: str, formats: Formats) -> ImportedModel:
    """Read a model, as it would run on the session's device, with the importer that claims it. Raises AssetError when none
    does, UsageError for an empty name."""
    from kernelforge.lazy import resolve

    if not source:  # as a path it would be the current folder
        raise UsageError("the model's name is empty", hint="--model takes a path, or what else an importer reads")
    registry = session.registry
    for spec in registry.importers.values():
        try:
            importer = resolve(spec.load)()
            claimed = importer.claims(source)
        except Exception as error:
            leave_out(f"importer '{spec.name}'", spec.provenance, error)
            continue
        if claimed:
            model: ImportedModel = importer.load(source, **formats.given(), device=session.device.info)
            return model
    names = ", ".join(registry.importers)
    reason = f"none of the importers ({names}) reads it" if names else "no importer is installed"
    hint = None if names else "pip install kernelforge-llm brings one for checkpoints"
    raise AssetError(f"cannot read the model '{source}': {reason}", hint=hint)


def model_problems(session: Session, model: ImportedModel) -> list[Asked]:
    """Every distinct problem of the model's programs on the session's target, measured at the programs' sizes and,
    where a dimension is dynamic, at its upper bound. Those of no step are there to be compared (`kernelforge.fusion`)."""
    found: dict[tuple[Problem, Problem], Asked] = {}
    for program in model.programs:
        plan = session.plan(program.module, dims=program.dims, max_dims=program.max_dims)
        for step in plan.steps:
            static = step.problem.with_dims(_sizes(step.dims, {**program.max_dims, **program.dims}, program.name))
            before = found.get((step.problem, static), Asked(step.problem, static, steps=0))
            programs = tuple(dict.fromkeys((*before.programs, program.name)))
            shared = step.config if step.config_source == "shared-layout" else before.shared
            found[step.problem, static] = Asked(step.problem, static, programs, before.steps + 1, shared)
        for fusion in plan.fusions:
            if fusion.dims:
                continue  # times at one size decide nothing for a step of every size
            for problem in _rivals(session, fusion.problem):
                found.setdefault((problem, problem), Asked(problem, problem, (program.name,), steps=0))
    return list(found.values())


def _rivals(session: Session, problem: Problem) -> list[Problem]:
    """A fused problem and its parts, those that have kernels, where a plugin brings one for a part: only times of all tell
    which way is quicker."""
    home = session.registry.backend_spec(session.target).provenance.distribution
    rivals, brought = [], False
    for each in (problem, *part_problems(problem, session.registry.ops)):
        try:
            selection = session.select(each)
        except UsageError:
            continue
        if not session.registry.is_fallback(selection.variant):
            rivals.append(selection.problem)
        accepted = [d.variant for d in selection.decisions if isinstance(d.verdict, Accept)]
        brought |= each is not problem and any(v.provenance.distribution != home for v in accepted)
    return rivals if brought else []


def _sizes(names: tuple[str, ...], sizes: Mapping[str, int], program: str) -> dict[str, int]:
    for name in names:
        if name not in sizes:
            raise UsageError(f"program '{program}' gives its dimension '{name}' no size and no upper bound")
    return {f"?{i}": sizes[name] for i, name in enumerate(names)}
