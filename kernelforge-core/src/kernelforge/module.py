"""A module: one function over the ops of the registered dialects, as MLIR and as plain Python.

Arguments of the function carry what the compiler must know besides their type, as MLIR argument attributes:

- `kernelforge.name = "x"`: the input's or constant's name; without it the n-th argument is `argN`.
- `kernelforge.constant`: a weight, known when compiling; its name is looked up among the constants given to compile.
- `kernelforge.donated`: the function may overwrite it.
- `kernelforge.dims = ["tokens"]`: names of its dynamic dimensions, in order. An unnamed one is `tokens`; equal names
  mean equal sizes.

Results carry `kernelforge.name`; without it the n-th result is `outN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from kernelforge.dtype import WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Problem, TensorType
from kernelforge.syntax import read_tensor

if TYPE_CHECKING:
    from kernelforge.mlir import ir

NAME = "kernelforge.name"
"""Attribute of arguments and results; see above."""
CONSTANT = "kernelforge.constant"
"""Attribute of arguments; see above."""
DONATED = "kernelforge.donated"
"""Attribute of arguments; see above."""
DIMS = "kernelforge.dims"
"""Attribute of arguments; see above."""

TOKENS = "tokens"
"""The dynamic dimension that needs no name."""


class OpCatalog(Protocol):
    """Ops by full name; the plugin registry is one."""

    @property
    def ops(self) -> Mapping[str, OpDef]: ...


@dataclass(frozen=True)
class Argument:
    """An argument of the function."""

    name: str
    type: TensorType
    """Dynamic dimensions by name."""
    constant: bool = False
    donated: bool = False


@dataclass(frozen=True)
class Node:
    """One op of the function. Values are numbered: the arguments from 0, then all results in order."""

    op: str
    """Full name, `dialect.op`."""
    operands: tuple[int | None, ...]
    """In the op's order, None where an optional operand is absent."""
    results: tuple[int, ...]
    problem: Problem
    """Dynamic dimensions by name, attributes complete; operands that are known when compiling are marked constant."""
    location: str = ""
    """Where it comes from: a scope of the graph builder, else a place in the module's text."""


@dataclass(frozen=True)
class Function:
    """The module's function as data: what planning works on."""

    name: str
    args: tuple[Argument, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    output_names: tuple[str, ...]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions in order of first appearance among the arguments."""
        return tuple(dict.fromkeys(d for arg in self.args for d in arg.type.shape if isinstance(d, str)))


class Module:
    """An MLIR module, to be used by one thread at a time with all others of its context."""

    def __init__(self, mlir: ir.Module, ops: Mapping[str, OpDef]) -> None:
        self.mlir = mlir
        self.ops = ops

    @classmethod
    def parse(cls, text: str, catalog: OpCatalog, context: ir.Context | None = None) -> Module:
        """Read and verify MLIR text, in a context of its own unless one that knows the catalog's ops is given.

        Raises UsageError with MLIR's diagnostics: place, op, operand and reason.
        """
        from kernelforge.dialect import context_for
        from kernelforge.mlir import parse_module

        try:
            return cls(parse_module(text, context or context_for(catalog.ops)), catalog.ops)
        except UsageError as error:
            if "unregistered dialect" not in str(error):
                raise
            known = sorted({op.dialect for op in catalog.ops.values()})
            raise UsageError(str(error), hint=f"the registered dialects are: {', '.join(known)}") from None

    @property
    def context(self) -> ir.Context:
        """MLIR's context, to be entered by what makes types or attributes."""
        return self.mlir.context

    @property
    def operation(self) -> ir.Operation:
        """The `builtin.module` operation."""
        return self.mlir.operation

    @property
    def main(self) -> ir.Operation:
        """The one public function, `func.func`. Raises UsageError when there is none, or several, or it has no body."""
        public = [
            op.operation
            for op in self.mlir.body.operations
            if op.operation.name == "func.func" and "sym_visibility" not in op.operation.attributes
        ]
        if len(public) != 1:
            raise UsageError(f"the module has {len(public)} public functions, must have one")
        if len(public[0].regions[0].blocks) != 1:
            raise UsageError("the module's function must have a body of one block")
        return public[0]

    def clone(self) -> Module:
        """A copy in the same context."""
        from kernelforge.mlir import ir

        with self.context:
            copy = ir.Module.create(loc=self.operation.location)
            for name, value in self.operation.attributes.items():
                copy.operation.attributes[name] = value
            for op in self.mlir.body.operations:
                op.operation.clone(ip=ir.InsertionPoint(copy.body))
        return Module(copy, self.ops)

    def verify(self) -> None:
        """Raises UsageError with MLIR's diagnostics."""
        from kernelforge.mlir import ir

        try:
            self.operation.verify()
        except ir.MLIRError as error:
            raise UsageError(f"the module does not verify:\n{str(error).strip()}") from None

    def text(self, *, locations: bool = False) -> str:
        """MLIR text, which parses back; with locations on request."""
        return str(self.operation.get_asm(enable_debug_info=locations)).strip() + "\n"

    def __str__(self) -> str:
        return self.text()

    def function(self) -> Function:
        """The function as data.

        Names of dynamic dimensions are propagated from the arguments through the ops' type inference. Raises
        UsageError, naming op and place, when an op refuses them (two names where one is needed) or has no dialect.
        """
        return _Reader(self).read()


class _Reader:
    def __init__(self, module: Module) -> None:
        self.main, self.ops = module.main, module.ops
        self.ids: dict[ir.Value, int] = {}
        self.types: list[TensorType] = []
        """Of every value; those known when compiling are marked constant."""

    def read(self) -> Function:
        block = self.main.regions[0].blocks[0]
        args = self._arguments(block)
        *body, end = block.operations
        nodes = tuple([self._node(op.operation) for op in body])
        outputs = tuple(self.ids[v] for v in end.operation.operands)
        name = self.main.attributes["sym_name"].value
        return Function(name, args, nodes, outputs, self._output_names(len(outputs)))

    def _add(self, value: ir.Value, t: TensorType) -> int:
        self.ids[value] = len(self.types)
        self.types.append(t)
        return self.ids[value]

    def _arguments(self, block: ir.Block) -> tuple[Argument, ...]:
        args: list[Argument] = []
        for i, value in enumerate(block.arguments):
            attributes = self._dictionary("arg_attrs", i)
            name = attributes[NAME].value if NAME in attributes else f"arg{i}"
            constant, donated = (_flag(attributes, key) for key in (CONSTANT, DONATED))
            args.append(Argument(name, self._argument_type(name, value, attributes, constant), constant, donated))
            self._add(value, replace(args[-1].type, constant=constant))
            if constant and donated:
                raise UsageError(f"argument '{name}' is constant and cannot be donated")
        _check_distinct("arguments", [arg.name for arg in args])
        return tuple(args)

    def _argument_type(
        self, name: str, value: ir.Value, attributes: Mapping[str, ir.Attribute], constant: bool
    ) -> TensorType:
        try:
            t = read_tensor(str(value.type))
        except OpError as error:
            raise UsageError(f"argument '{name}' {error}") from None
        dynamic = [i for i, d in enumerate(t.shape) if isinstance(d, str)]
        if constant and dynamic:
            raise UsageError(f"argument '{name}' is constant and cannot have dynamic dimensions: {value.type}")
        names = [item.value for item in attributes[DIMS]] if DIMS in attributes else [TOKENS] * len(dynamic)
        if len(names) != len(dynamic):
            raise UsageError(
                f"argument '{name}' names {len(names)} dynamic dimensions, its type {value.type} has {len(dynamic)}"
            )
        if bad := [n for n in names if n and not n.isidentifier()]:
            raise UsageError(f"argument '{name}': '{bad[0]}' cannot name a dimension")
        if t.dtype in WEIGHT_FORMATS and not constant and DONATED not in attributes:
            raise UsageError(
                f"argument '{name}' is {t.dtype} and must be constant or donated",
                hint="it is a format of weights and caches",
            )
        shape = list(t.shape)
        for i, dim in zip(dynamic, names, strict=True):
            shape[i] = dim or TOKENS
        return TensorType(tuple(shape), t.dtype)

    def _dictionary(self, key: str, index: int) -> Mapping[str, ir.Attribute]:
        """The attributes of one argument or result."""
        if key not in self.main.attributes:
            return {}
        found = self.main.attributes[key][index]
        return {named.name: named.attr for named in found}

    def _output_names(self, count: int) -> tuple[str, ...]:
        found = (self._dictionary("res_attrs", i) for i in range(count))
        names = [a[NAME].value if NAME in a else f"out{i}" for i, a in enumerate(found)]
        _check_distinct("results", names)
        return tuple(names)

    def _node(self, operation: ir.Operation) -> Node:
        from kernelforge.dialect import operand_values, read_attrs

        location = location_text(operation.location)
        op = self.ops.get(operation.name)
        if op is None:
            raise UsageError(f"'{operation.name}' at {location or 'unknown place'} is no op of a registered dialect")
        try:
            operands = tuple(None if v is None else self.ids[v] for v in operand_values(op, operation))
            types = [None if v is None else self.types[v] for v in operands]
            problem = op.problem(types, read_attrs(op, operation))
        except OpError as error:
            raise UsageError(f"'{operation.name}' at {location or 'unknown place'}: {error}") from None
        constant = all(t is None or t.constant for t in types)
        written = dict(op.in_place)  # a cache stays one
        weights = [t.dtype for i, t in enumerate(problem.results) if t.dtype in WEIGHT_FORMATS and i not in written]
        if not constant and weights:
            where = location or "unknown place"
            raise UsageError(f"'{operation.name}' at {where}: a {weights[0]} result must be computed from constants")
        pairs = zip(operation.results, problem.results, strict=True)
        results = tuple(self._add(value, replace(t, constant=constant)) for value, t in pairs)
        return Node(operation.name, operands, results, problem, location)


def _flag(attributes: Mapping[str, ir.Attribute], key: str) -> bool:
    """A unit attribute, or a bool."""
    return key in attributes and str(attributes[key]) != "false"


def _check_distinct(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"two {what} of the function are named '{twice}'")


def location_text(location: ir.Location) -> str:
    """A location in words: its name, or `file:line:column`; of a fused one the first that says anything."""
    from kernelforge.mlir import ir

    if isinstance(location, ir.NameLoc):
        return str(location.name_str)
    if isinstance(location, ir.FileLineColLoc):
        return f"{location.filename}:{location.start_line}:{location.start_col}"
    if isinstance(location, ir.FusedLoc):
        return next(filter(None, map(location_text, location.locations)), "")
    if isinstance(location, ir.CallSiteLoc):
        return location_text(location.callee)
    return ""
