"""What the rewriting passes share: a module's ops as Python data, and the replacing of ops by others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from kernelforge.dialect import create, operand_values, read_attrs
from kernelforge.errors import UsageError
from kernelforge.mlir import PassManager, ir
from kernelforge.module import CONSTANT, Module
from kernelforge.op import Attrs, OpDef
from kernelforge.problem import Attr, TensorType
from kernelforge.syntax import read_tensor


@dataclass(frozen=True)
class Op:
    """An operation, read."""

    operation: ir.Operation
    definition: OpDef

    @property
    def name(self) -> str:
        """Full name, `dialect.op`."""
        return self.definition.full_name

    @cached_property
    def operands(self) -> list[ir.Value | None]:
        """In the op's order, None where an optional one is absent."""
        return operand_values(self.definition, self.operation)

    @cached_property
    def attrs(self) -> Mapping[str, Attr]:
        """Complete: with defaults."""
        return self.definition.complete_attrs(read_attrs(self.definition, self.operation))

    @property
    def result(self) -> ir.Value:
        """The first result."""
        return self.operation.results[0]


class Body:
    """The ops of a module's function, to be rewritten.

    Ops are made before others that exist and take their place. Whoever walks the ops may erase the one it is at and
    those before it, not those that come after.
    """

    def __init__(self, module: Module) -> None:
        self._definitions = module.ops
        main = module.main
        block = main.regions[0].blocks[0]
        self._operations = [view.operation for view in block.operations]
        self._constants = set(_constant_arguments(main, block))
        for operation in self._operations:
            self._classify(operation)

    def _classify(self, operation: ir.Operation) -> None:
        if all(v in self._constants for v in operation.operands):
            self._constants.update(operation.results)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether it is known when compiling: a weight, or computed from weights alone."""
        return value in self._constants

    def walk(self, *names: str) -> Iterator[Op]:
        """The ops of these full names in order, as they were when this body was made."""
        for operation in self._operations:
            if operation.name in names:
                yield Op(operation, self._definitions[operation.name])

    def producer(self, value: ir.Value | None, *names: str) -> Op | None:
        """The op that makes `value`, if it is of one of these full names."""
        if value is None or isinstance(value, ir.BlockArgument):
            return None
        operation = value.owner.operation
        return Op(operation, self._definitions[operation.name]) if operation.name in names else None

    def feeder(self, value: ir.Value | None, *names: str) -> Op | None:
        """As `producer`, if `value` is used once only, so that its producer can move into the user."""
        return self.producer(value, *names) if value is not None and uses(value) == 1 else None

    def create(
        self, name: str, operands: Sequence[ir.Value | None], attrs: Attrs, *, before: Op, of: Sequence[Op]
    ) -> list[ir.Value]:
        """Make an op before another; its location tells those that it is made of. Returns its results."""
        with before.operation.context:
            location = ir.Location.fused([op.operation.location for op in of])
        results = create(self._definitions[name], operands, attrs, location=location, before=before.operation)
        self._classify(results[0].owner.operation)
        return results

    def replace(self, op: Op, values: Sequence[ir.Value]) -> None:
        """Let the users of `op` use these values of new ops instead, and erase it."""
        for old, new in zip(op.operation.results, values, strict=True):
            # A module may state a size that inference does not know; the new op's verifier accepts it as well.
            if new.type != old.type:
                new.set_type(old.type)
            old.replace_all_uses_with(new)
        self.erase(op)

    def hoist(self, value: ir.Value, before: Op) -> None:
        """Let an op that is put before another use this constant: move what computes it there, unless it is there."""
        if not available(value, at=before):
            operation = value.owner.operation
            for operand in operation.operands:
                self.hoist(operand, before)
            operation.move_before(before.operation)

    def erase(self, op: Op) -> None:
        """Erase an op that nothing uses. Raises UsageError where something does: MLIR would end the process."""
        if any(uses(value) for value in op.operation.results):
            raise UsageError(
                f"'{op.operation.name}' is still used, so it cannot be erased",
                hint="replace() gives its users other values",
            )
        # Its memory may become another op's: no trace of it may stay.
        self._constants.difference_update(op.operation.results)
        op.operation.erase()


def _constant_arguments(main: ir.Operation, block: ir.Block) -> Iterator[ir.Value]:
    if "arg_attrs" in main.attributes:
        for value, attributes in zip(block.arguments, main.attributes["arg_attrs"], strict=True):
            if CONSTANT in attributes and str(attributes[CONSTANT]) != "false":
                yield value


def available(value: ir.Value, at: Op) -> bool:
    """Whether an op that is put before `at` may use `value`."""
    return isinstance(value, ir.BlockArgument) or value.owner.operation.is_before_in_block(at.operation)


def uses(value: ir.Value) -> int:
    """How often `value` is used."""
    return sum(1 for _ in value.uses)


def tensor_type(value: ir.Value) -> TensorType:
    """Its type; dynamic dimensions are UNKNOWN."""
    return read_tensor(str(value.type))


def run_upstream(module: Module, name: str) -> None:
    """Run one of MLIR's own passes. It does not verify the module: the pipeline does, after every pass."""
    with module.context:
        manager = PassManager.parse(f"builtin.module({name})")
        manager.enable_verifier(False)
        manager.run(module.operation)
