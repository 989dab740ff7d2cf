"""From `OpDef`s to a real MLIR dialect: op classes, their verifier, and the way between MLIR's values and ours."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

from kernelforge.dtype import QUANTISED
from kernelforge.errors import KernelForgeWarning, PluginError
from kernelforge.faults import explain
from kernelforge.locks import ForkLock
from kernelforge.mlir import Dialect, Operand, Pure, Result, ir, new_context
from kernelforge.op import Attrs, OpDef, OpError, same_shape
from kernelforge.problem import Attr, TensorType
from kernelforge.syntax import (
    QUANTISED_PREFIX,
    RESULT_SEGMENTS,
    RUNS,
    SEGMENTS,
    attribute_texts,
    read_tensor,
    tensor_text,
)

_classes: dict[tuple[str, tuple[OpDef, ...]], type[Dialect]] = {}
_creating = ForkLock()


def dialect_class(name: str, ops: Sequence[OpDef]) -> type[Dialect]:
    """The MLIR dialect `name` with these ops, made once; it can be loaded into any number of contexts.

    Raises PluginError when an op cannot be an MLIR op: a name that clashes with another or with MLIR's own.
    """
    key = (name, tuple(ops))
    with _creating:
        if key not in _classes:
            dialect: type[Dialect] = types.new_class(name.capitalize(), (Dialect,), {"name": name})
            if f"!{name}." == QUANTISED_PREFIX:
                for dtype in QUANTISED:
                    types.new_class(dtype.capitalize(), (dialect.Type,), {"name": dtype})
            for op in ops:
                _make_op_class(dialect, op)
            _classes[key] = dialect
        return _classes[key]


def dialect_classes(ops: Mapping[str, OpDef]) -> list[type[Dialect]]:
    """The dialects that these ops, keyed by full name, belong to."""
    grouped: dict[str, list[OpDef]] = {}
    for op in ops.values():
        grouped.setdefault(op.dialect, []).append(op)
    made: list[type[Dialect]] = []
    for name, members in grouped.items():
        try:
            made.append(dialect_class(name, members))
        except Exception as error:  # a plugin's: modules without its ops must still be read
            message = f"dialect '{name}' is left out of MLIR: {explain(error)}"
            warnings.warn(KernelForgeWarning(message), stacklevel=2)
    return made


def context_for(ops: Mapping[str, OpDef]) -> ir.Context:
    """A new context that knows these ops."""
    return new_context(*dialect_classes(ops))


def _make_op_class(dialect: type[Dialect], op: OpDef) -> None:
    annotations: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    results = [name.removeprefix("*") for name in op.results]
    names = [*results, *(o.name for o in op.operands)]
    for name in names:
        if not name.isidentifier() or iskeyword(name) or hasattr(dialect.Operation, name) or names.count(name) > 1:
            raise PluginError(f"op '{op.full_name}': '{name}' cannot name an operand or result of it")
    for name in results:
        if op.variadic_results:
            annotations.update({f"{name}_{i}": Sequence[Result[Any]] for i in range(RUNS)})
        else:
            annotations[name] = Result[Any]
    for operand in op.operands:
        if operand.variadic:
            annotations.update({f"{operand.name}_{i}": Sequence[Operand[Any]] for i in range(RUNS)})
        elif operand.optional:
            annotations[operand.name], defaults[operand.name] = Operand[Any] | None, None
        else:
            annotations[operand.name] = Operand[Any]

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(defaults)
        namespace["__annotations__"] = annotations
        namespace["__doc__"] = op.summary
        namespace["verify_invariants"] = staticmethod(_verifier(op))

    made = types.new_class(op.name, (dialect.Operation,), {"name": op.name, "traits": [Pure]}, fill)
    # The bindings' own accessors know nothing of the groups, and need segment sizes where MLIR does not ask for them.
    for i, operand in enumerate(op.operands):
        setattr(made, operand.name, property(_operand_getter(op, i)))
    if op.variadic_results:
        setattr(made, results[0], property(lambda self: list(self.operation.results)))


def _operand_getter(op: OpDef, index: int) -> Callable[[Any], Any]:
    if op.operands[index].variadic:
        return lambda self: operand_values(op, self.operation)[index:]
    return lambda self: operand_values(op, self.operation)[index]


def _verifier(op: OpDef) -> Callable[[Any], bool]:
    accepted: set[tuple[object, ...]] = set()  # types and attributes, as text, that were found to be right

    def verify_invariants(view: Any) -> bool:
        operation = view.operation
        try:
            operands = operand_values(op, operation)
            key = (
                tuple([None if v is None else str(v.type) for v in operands]),
                tuple([str(v.type) for v in operation.results]),
                tuple([(name, str(value)) for name, value in operation.attributes.items()]),
            )
            if key in accepted:
                return True
            _verify(op, operation, operands)
        except Exception as error:
            # Left alone, an exception would leave the parser as itself and without a location.
            operation.location.emit_error(f"'{operation.name}' op {error}")
            return False
        if len(accepted) >= 4096:
            accepted.clear()
        accepted.add(key)
        return True

    return verify_invariants


def _verify(op: OpDef, operation: ir.Operation, operands: Sequence[ir.Value | None]) -> None:
    """Raises OpError unless the operation's types and attributes are what the op infers."""
    inferred = op.problem(operand_types(op, operands), read_attrs(op, operation)).results
    declared = list(operation.results)
    if op.variadic_results:
        sizes = _segment_sizes(operation, RESULT_SEGMENTS)
        if len(sizes) != RUNS or min(sizes) < 0 or sum(sizes) != len(declared):
            raise OpError(f"attribute '{RESULT_SEGMENTS}' is {sizes}, which does not fit {len(declared)} results")
    if len(declared) != len(inferred):
        raise OpError(f"has {len(declared)} results, must have {len(inferred)}")
    for i, (value, want) in enumerate(zip(declared, inferred, strict=True)):
        name = f"{op.results[0][1:]} number {i}" if op.variadic_results else op.results[i]
        have = _read_type(f"result '{name}'", value.type)
        if have.dtype != want.dtype or not same_shape(have.shape, want.shape):
            raise OpError(f"result '{name}' has type {value.type}, must be {tensor_text(want.shape, want.dtype)}")


def operand_values(op: OpDef, operation: ir.Operation) -> list[ir.Value | None]:
    """The operation's operands in the op's order, None where an optional one is absent.

    Raises OpError when the segment sizes do not fit the op.
    """
    values = list(operation.operands)
    optional = sum(o.optional for o in op.operands)
    if SEGMENTS not in operation.attributes and not op.variadic and optional < 2:
        return values + [None] * (len(op.operands) - len(values) if optional else 0)
    if len(values) < len(op.operands) - optional:
        op.check_count(operand_types(op, values))
    sizes = _segment_sizes(operation, SEGMENTS)
    least = [0 if o.optional else 1 for o in op.operands if not o.variadic] + [0] * RUNS * op.variadic
    most = [len(values) if i >= len(op.operands) - 1 and op.variadic else 1 for i in range(len(least))]
    fits = len(sizes) == len(least) and all(a <= size <= b for a, size, b in zip(least, sizes, most, strict=True))
    if not fits or sum(sizes) != len(values):
        raise OpError(f"attribute '{SEGMENTS}' is {sizes}, which does not fit {len(values)} operands of {op.name}")
    if op.variadic:
        return values
    rest = iter(values)
    return [next(rest) if size else None for size in sizes]


def _segment_sizes(operation: ir.Operation, name: str) -> list[int]:
    if name not in operation.attributes:
        raise OpError(f"attribute '{name}' is required")
    found = operation.attributes[name]
    if not isinstance(found, ir.DenseI32ArrayAttr):
        raise OpError(f"attribute '{name}' is {found}, must be an array<i32>")
    return list(found)


def operand_types(op: OpDef, operands: Sequence[ir.Value | None]) -> list[TensorType | None]:
    """Their types, dynamic dimensions UNKNOWN. Raises OpError naming the operand whose type is no tensor's."""
    found: list[TensorType | None] = []
    for i, value in enumerate(operands):
        name = op.operands[min(i, len(op.operands) - 1)].name
        found.append(None if value is None else _read_type(f"operand '{name}'", value.type))
    return found


def _read_type(what: str, given: ir.Type) -> TensorType:
    try:
        return read_tensor(str(given))
    except OpError as error:
        raise OpError(f"{what} {error}") from None


def read_attrs(op: OpDef, operation: ir.Operation) -> dict[str, Attr]:
    """The op's attributes as Python values, as far as they are given; segment sizes and attributes of other dialects
    (their names have a dot) are left out. Raises OpError for one that is of no known kind."""
    return {
        name: _read_attr(name, value)
        for name, value in operation.attributes.items()
        if "." not in name and name not in (SEGMENTS, RESULT_SEGMENTS)
    }


def _read_attr(name: str, value: ir.Attribute) -> Attr:
    if isinstance(value, ir.BoolAttr):
        return bool(value.value)
    if isinstance(value, (ir.IntegerAttr, ir.FloatAttr, ir.StringAttr)):
        found: Attr = value.value
        return found
    if isinstance(value, ir.DenseI64ArrayAttr):
        return tuple(value)
    raise OpError(f"attribute '{name}' is {value}, must be a bool, an integer, a float, a string or an array<i64>")


def create(
    op: OpDef,
    operands: Sequence[ir.Value | None],
    attrs: Attrs,
    *,
    location: ir.Location | None = None,
    before: ir.Operation | None = None,
) -> list[ir.Value]:
    """Make an operation and return its results; their types are inferred.

    It is put before the operation `before`, else at the current insertion point, with the given location or that
    of `before`. Raises OpError when the op refuses operands or attributes.
    """
    context = next(v for v in operands if v is not None).context if operands else ir.Context.current
    problem = op.problem(operand_types(op, operands), attrs)
    with context:
        attributes = {name: ir.Attribute.parse(text) for name, text in attribute_texts(op, problem).items()}
        made = ir.Operation.create(
            op.full_name,
            results=[ir.Type.parse(tensor_text(t.shape, t.dtype)) for t in problem.results],
            operands=[v for v in operands if v is not None],
            attributes=attributes,
            loc=location or (before.location if before is not None else ir.Location.unknown()),
            ip=ir.InsertionPoint(before) if before is not None else None,
        )
    return list(made.results)
