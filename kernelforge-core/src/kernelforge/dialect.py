"""From `OpDef`s to a real MLIR dialect: op classes, their verifier, and the way between MLIR's values and ours."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

from kernelforge.errors import PluginError
from kernelforge.mlir import Dialect, Operand, Pure, Result, ir, new_context
from kernelforge.op import Attrs, OpDef, OpError, same_shape
from kernelforge.problem import Attr, TensorType
from kernelforge.syntax import SEGMENTS, attribute_texts, read_tensor, tensor_text

RESULT_SEGMENTS = "resultSegmentSizes"

_classes: dict[tuple[str, tuple[OpDef, ...]], type[Dialect]] = {}
_creating = threading.Lock()


def dialect_class(name: str, ops: Sequence[OpDef]) -> type[Dialect]:
    """The MLIR dialect `name` with these ops, made once; it can be loaded into any number of contexts.

    Raises PluginError when an op cannot be an MLIR op: a name that clashes with another or with MLIR's own.
    """
    key = (name, tuple(ops))
    with _creating:
        if key not in _classes:
            dialect = types.new_class(name.capitalize(), (Dialect,), {"name": name})
            for op in ops:
                _make_op_class(dialect, op)
            _classes[key] = dialect
        return _classes[key]


def dialect_classes(ops: Mapping[str, OpDef]) -> list[type[Dialect]]:
    """The dialects that these ops, keyed by full name, belong to."""
    grouped: dict[str, list[OpDef]] = {}
    for op in ops.values():
        grouped.setdefault(op.dialect, []).append(op)
    return [dialect_class(name, members) for name, members in grouped.items()]


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
        annotations[name] = Sequence[Result[Any]] if op.variadic_results else Result[Any]
    for operand in op.operands:
        annotations[operand.name] = Sequence[Operand[Any]] if operand.variadic else Operand[Any]
        if operand.optional:
            annotations[operand.name] |= None
            defaults[operand.name] = None

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(defaults)
        namespace["__annotations__"] = annotations
        namespace["__doc__"] = op.summary
        namespace["verify_invariants"] = staticmethod(_verifier(op))

    made = types.new_class(op.name, (dialect.Operation,), {"name": op.name, "traits": [Pure]}, fill)
    # The bindings' own accessors need the segment attributes, which MLIR itself does not always ask for.
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
    if RESULT_SEGMENTS in operation.attributes and not op.variadic_results:
        raise OpError(f"attribute '{RESULT_SEGMENTS}' is unknown to {op.name}")
    declared = list(operation.results)
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
    if SEGMENTS not in operation.attributes:
        if optional > 1 and len(op.operands) - optional <= len(values):
            raise OpError(f"attribute '{SEGMENTS}' is required: it says which optional operands are there")
        return values + [None] * (len(op.operands) - len(values) if optional else 0)
    sizes = list(ir.DenseI32ArrayAttr(operation.attributes[SEGMENTS]))
    fits = len(sizes) == len(op.operands) and sum(sizes) == len(values)
    pairs = zip(op.operands, sizes, strict=False)
    if not fits or not all(size == 1 or o.variadic or (o.optional and size == 0) for o, size in pairs):
        raise OpError(f"attribute '{SEGMENTS}' is {sizes}, which {len(values)} operands do not fit")
    if op.variadic:
        return values
    rest = iter(values)
    return [next(rest) if size else None for size in sizes]


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
    given = [*operands, *([None] * (len(problem.operands) - len(operands)))]
    with context:
        attributes = {name: ir.Attribute.parse(text) for name, text in attribute_texts(op, dict(problem.attrs)).items()}
        if sum(o.optional for o in op.operands) > 1:
            attributes[SEGMENTS] = ir.DenseI32ArrayAttr.get([int(v is not None) for v in given])
        made = ir.Operation.create(
            op.full_name,
            results=[ir.Type.parse(tensor_text(t.shape, t.dtype)) for t in problem.results],
            operands=[v for v in given if v is not None],
            attributes=attributes,
            loc=location or (before.location if before is not None else ir.Location.unknown()),
            ip=ir.InsertionPoint(before) if before is not None else None,
        )
    return list(made.results)
