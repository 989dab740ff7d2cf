"""What an op is: operands, attributes, type inference, a numpy reference, a workload sampler, a cost model.

One `OpDef` is the single source of truth for an op. Its MLIR class and verifier, the graph builder's checks, the
reference backend, the tests and the tuner's inputs all come from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kernelforge.errors import PluginError
from kernelforge.lazy import Ref, resolve
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    import random

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

UNKNOWN = "?"
"""A dynamic dimension whose name is not known (types read from MLIR): it agrees with every other dimension."""

Attrs = Mapping[str, Attr]
"""Attributes by name."""

OperandTypes = Sequence["TensorType | None"]
"""In the op's order, None where an optional one is absent; those of a variadic operand one by one."""


class OpError(ValueError):
    """Operands or attributes that an op refuses; the message starts with what is wrong: "operand 'rhs' ..."."""


@dataclass(frozen=True)
class Operand:
    """An operand of an op."""

    name: str
    optional: bool = False
    """Optional operands come last."""
    variadic: bool = False
    """Only the last operand, and then not optional: one or more tensors."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op."""

    name: str
    kind: Literal["bool", "int", "float", "str", "ints"]
    default: Attr | None = None
    """None: the attribute is required."""
    choices: tuple[str, ...] = ()
    """For `str`: the values allowed."""
    doc: str = ""


@dataclass(frozen=True)
class Cost:
    """Work of a static problem: floating-point operations, and bytes that must move (each operand and result once)."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class View:
    """A result that is its first operand's memory, seen otherwise: strides and offset in elements."""

    shape: tuple[int | str, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Part:
    """One of the ops that an op stands for."""

    op: str
    """Full name, `dialect.op`."""
    operands: tuple[str, ...]
    """Names of the whole's operands, or of results of parts before it."""
    results: tuple[str, ...]
    """Names of the whole's results, or names of their own."""
    attrs: Attrs = field(default_factory=dict)


@dataclass(frozen=True)
class OpDef:
    """An op of a dialect. The callables may be given as "module:attr" and are imported on first use."""

    name: str
    """Short name, without the dialect."""
    summary: str
    operands: tuple[Operand, ...]
    results: tuple[str, ...]
    """Names of the results; a single "*name" stands for one or more."""
    infer: Ref
    """`(operand_types, attrs) -> tuple[TensorType, ...]`: the result types. Raises OpError."""
    reference: Ref
    """`(arrays, attrs) -> tuple[ndarray, ...]`, float operands given and results returned as float64; pure."""
    sample: Ref
    """`(rng: random.Random) -> Iterator[Problem]`: static problems as they occur in transformers, small first."""
    cost: Ref
    """`(static problem) -> Cost`."""
    attributes: tuple[Attribute, ...] = ()
    inputs: Ref | None = None
    """`(static problem, numpy Generator) -> list[ndarray | None]`: valid operands, None for an absent one. Without it:
    normal floats, and integers from 0 to 7."""
    typical: Ref | None = None
    """Of an op whose work depends on values (attention's on positions): as `inputs`, operands that cost what `cost` counts,
    for timing. Without it any operands cost that."""
    work: Ref | None = None
    """Of such an op: `(static problem, arrays) -> Cost | None`, the cost with these operands, of which some may be unknown
    (None); None when the known ones do not say enough."""
    view: Ref | None = None
    """`(operand_types, attrs) -> tuple[View, ...] | None`: how the results view the first operand; None: a copy is
    needed."""
    exact: bool = False
    """It only moves values (layout, gathering): the reference then runs in the operands' own dtypes."""
    magnitude: Ref | None = None
    """`(arrays, attrs) -> tuple[ndarray, ...]`, as `reference`: for each result the size of the terms whose sum or difference
    a kernel may compute it as (x for `x/2 + x/2 erf`), to which rounding errors are then relative. Without it an error is
    tolerated only as far as roundings of the operands explain it."""
    undecided: Ref | None = None
    """`(arrays, attrs) -> tuple[ndarray, ...]`, as `reference`, of an op that rounds to coarse steps on its way (8 bits): how
    far each result may be off besides, since numbers between two steps become either, as roundings before decide."""
    parts: Ref | None = None
    """`(problem) -> tuple[Part, ...]`: the ops that a fused op stands for, empty where it stands for itself. They run in its
    place on a target that has no kernel for the whole (`kernelforge.fusion`)."""
    in_place: tuple[tuple[int, int], ...] = ()
    """(result, operand) pairs: the result overwrites that operand's buffer (destination passing)."""
    dialect: str = ""
    """Filled in by the dialect that owns the op."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(f"op name '{self.name}' is not an identifier")
        kinds = [(o.optional, o.variadic) for o in self.operands]
        if kinds != sorted(kinds) or (len(kinds) > 1 and any(v for _, v in kinds[:-1])):
            raise PluginError(f"op '{self.name}': optional operands come last, and only the last operand is variadic")
        if not self.results:
            raise PluginError(f"op '{self.name}' has no results")

    @property
    def full_name(self) -> str:
        return f"{self.dialect}.{self.name}"

    @property
    def variadic(self) -> bool:
        return bool(self.operands) and self.operands[-1].variadic

    @property
    def variadic_results(self) -> bool:
        return self.results[0].startswith("*")

    def complete_attrs(self, attrs: Attrs) -> dict[str, Attr]:
        """`attrs` with defaults filled in, sorted by name. Raises OpError for unknown, missing or ill-typed ones."""
        known = {a.name: a for a in self.attributes}
        for name in attrs:
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise OpError(f"attribute '{name}' is unknown to {self.name} (it has: {allowed})")
        complete: dict[str, Attr] = {}
        for name, spec in sorted(known.items()):
            value = attrs.get(name, spec.default)
            if value is None:
                raise OpError(f"attribute '{name}' is required")
            complete[name] = _checked_attr(spec, value)
        return complete

    def problem(self, operands: OperandTypes, attrs: Attrs) -> Problem:
        """The problem for these operand types: attributes completed, results inferred. Raises OpError."""
        self.check_count(operands)
        complete = self.complete_attrs(attrs)
        results = self.infer_types(operands, complete)
        padded = (*operands, *([None] * (len(self.operands) - len(operands))))
        return Problem(self.full_name, padded, results, tuple(complete.items()))

    def check_count(self, operands: OperandTypes) -> None:
        """Raises OpError unless the required operands are there and no more than the op has."""
        least = sum(not o.optional for o in self.operands)
        if len(operands) < least or (len(operands) > len(self.operands) and not self.variadic):
            names = ", ".join(f"{o.name}{'?' if o.optional else '...' if o.variadic else ''}" for o in self.operands)
            raise OpError(f"takes operands ({names}), got {len(operands)}")
        for spec, given in zip(self.operands, operands, strict=False):
            if given is None and not spec.optional:
                raise OpError(f"operand '{spec.name}' is required")

    def infer_types(self, operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
        results: tuple[TensorType, ...] = resolve(self.infer)(operands, attrs)
        return results

    def views(self, operands: OperandTypes, attrs: Attrs) -> tuple[View, ...] | None:
        """How the results view the first operand, or None when they cannot."""
        if self.view is None:
            return None
        found: tuple[View, ...] | None = resolve(self.view)(operands, attrs)
        return found

    def parts_of(self, problem: Problem) -> tuple[Part, ...]:
        """See `parts`; empty when there are none. Raises PluginError for an op that is a part of itself."""
        found: tuple[Part, ...] = () if self.parts is None else resolve(self.parts)(problem)
        if any(part.op == self.full_name for part in found):
            raise PluginError(f"op '{self.full_name}' is one of its own parts")
        return found

    def problem_cost(self, problem: Problem) -> Cost:
        found: Cost = resolve(self.cost)(problem)
        return found

    def known_cost(self, problem: Problem, arrays: Sequence[Array | None]) -> Cost | None:
        """The cost of a static problem with these operands (None for one that is unknown); None when it depends on values
        that are unknown."""
        if self.typical is None:
            return self.problem_cost(problem)
        found: Cost | None = None if self.work is None else resolve(self.work)(problem, arrays)
        return found

    def samples(self, rng: random.Random) -> Iterator[Problem]:
        yield from resolve(self.sample)(rng)

    def compute(self, problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        """Run the reference in float64, without rounding the results to their types; quantised operands are dequantised.

        `arrays` are the operands (None where absent), in any float dtype and layout; shapes of dynamic dimensions come
        from the arrays. An exact op runs in the operands' own dtypes.
        """
        return self._run(self.reference, problem, arrays)

    def magnitudes(self, problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...] | None:
        """See `magnitude`; None when the op has none."""
        return None if self.magnitude is None else self._run(self.magnitude, problem, arrays)

    def either_way(self, problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...] | None:
        """See `undecided`; None when the op has none."""
        return None if self.undecided is None else self._run(self.undecided, problem, arrays)

    def _run(self, function: Ref, problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        import numpy as np

        from kernelforge.quant import widened

        wide = list(arrays) if self.exact else [None if a is None else widened(a) for a in arrays]
        with np.errstate(all="ignore"):
            return tuple(np.asarray(o) for o in resolve(function)(wide, dict(problem.attrs)))

    def evaluate(self, problem: Problem, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        """As `compute`, with the results rounded once to their types. Groups of a quantised operand that is overwritten in
        place keep their bits where their numbers do not change."""
        import numpy as np

        from kernelforge.dtype import to_numpy
        from kernelforge.quant import requantize

        outputs, written = self.compute(problem, arrays), dict(self.in_place)
        made = []
        for i, (o, t) in enumerate(zip(outputs, problem.results, strict=True)):
            if t.quantised and o.dtype.names is None:
                made.append(requantize(o, t.dtype, arrays[written[i]] if i in written else None))
            else:
                with np.errstate(all="ignore"):
                    made.append(o.astype(to_numpy(t.dtype), order="C"))
        return tuple(made)

    def make_inputs(self, problem: Problem, rng: np.random.Generator) -> list[Array | None]:
        """Valid inputs for a static problem: the op's own, else normal floats and integers in 0..7."""
        from kernelforge.dtype import FLOATS, to_numpy
        from kernelforge.quant import quantize

        if self.inputs is not None:
            made: list[Array | None] = resolve(self.inputs)(problem, rng)
            return made
        arrays: list[Array | None] = []
        for t in problem.operands:
            if t is None:
                arrays.append(None)
            elif t.quantised:
                arrays.append(quantize(rng.standard_normal(t.static_shape()), t.dtype))
            elif t.dtype in FLOATS:
                arrays.append(rng.standard_normal(t.static_shape()).astype(to_numpy(t.dtype)))
            else:
                arrays.append(rng.integers(0, 8, t.static_shape()).astype(to_numpy(t.dtype)))
        return arrays

    def typical_inputs(self, problem: Problem, rng: np.random.Generator) -> list[Array | None]:
        """Valid inputs for a static problem, to be timed: they cost what the cost model counts."""
        if self.typical is None:
            return self.make_inputs(problem, rng)
        made: list[Array | None] = resolve(self.typical)(problem, rng)
        return made


def _checked_attr(spec: Attribute, value: Attr) -> Attr:
    ok = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "str": isinstance(value, str),
        "ints": isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value),
    }[spec.kind]
    if not ok:
        raise OpError(f"attribute '{spec.name}' must be of kind {spec.kind}, got {value!r}")
    if spec.choices and value not in spec.choices:
        raise OpError(f"attribute '{spec.name}' is '{value}', must be one of {', '.join(spec.choices)}")
    if spec.kind == "float" and not isinstance(value, (str, tuple, list)):
        return float(value)
    return tuple(value) if isinstance(value, (tuple, list)) else value


def same_dim(a: int | str, b: int | str) -> bool:
    """Whether two dimensions may be equal: an unknown one agrees with all."""
    return a == b or UNKNOWN in (a, b)


def same_shape(a: Sequence[int | str], b: Sequence[int | str]) -> bool:
    """Whether two shapes may be equal."""
    return len(a) == len(b) and all(map(same_dim, a, b))
