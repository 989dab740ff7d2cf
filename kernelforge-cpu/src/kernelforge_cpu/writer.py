"""The lines of one function's text: ops, constants and what turns Python numbers into values."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from kernelforge_cpu.ssa import I64, Number, Type, Value, vec

if TYPE_CHECKING:
    from kernelforge_cpu.builder import Builder
    from kernelforge_cpu.isa import CpuTarget


class Writer:
    """The part of `Builder` that has its lines: every writer is one."""

    def __init__(self, target: CpuTarget, params: Sequence[Type]) -> None:
        self.target = target
        self.lanes = target.lanes
        """f32 lanes of the target's widest vector."""
        self.entry: list[str] = []  # constants and base pointers, at the top of the function: they dominate all uses
        self.lines: list[str] = []
        self.cache: dict[str, Value] = {}
        self.count = 0
        self.params = [self._value(f"%arg{i}", t) for i, t in enumerate(params)]

    def _value(self, name: str, t: Type) -> Value:
        return Value(cast("Builder", self), name, t)

    # --- writing ---
    def fresh(self) -> str:
        """A name that no value has yet."""
        self.count += 1
        return f"%{self.count}"

    def op(self, text: str, t: Type) -> Value:
        """Writes `%n = text`, an op with one result of type `t`. The way to any op this builder has no method for."""
        name = self.fresh()
        self.lines.append(f"{name} = {text}")
        return self._value(name, t)

    def at_entry(self, text: str, t: Type) -> Value:
        """As `op`, at the top of the function and once for each text: for what every use may share."""
        value = self.cache.get(text)
        if value is None:
            value = self.cache[text] = self._value(self.fresh(), t)
            self.entry.append(f"{value.name} = {text}")
        return value

    def intrinsic(self, name: str, result: Type, *args: Value) -> Value:
        """A call of an LLVM intrinsic by its full name, such as `llvm.x86.avx2.pmadd.wd`."""
        types = ", ".join(str(a.type) for a in args)
        return self.op(
            f'llvm.call_intrinsic "{name}"({", ".join(a.name for a in args)}) : ({types}) -> {result}', result
        )

    def assembly(self, text: str, constraints: str, *args: Value) -> None:
        """Instructions of the target, in LLVM's spelling of inline assembly (AT&T's on x86), that write memory only.

        Such a module compiles on machines of the target's architecture alone.
        """
        quoted = text.replace("$", "$$").replace("\n", "\\0A")  # `$` begins an operand
        names, types = ", ".join(a.name for a in args), ", ".join(str(a.type) for a in args)
        self.lines.append(
            f'llvm.inline_asm has_side_effects asm_dialect = att "{quoted}", "{constraints}" {names} : ({types}) -> ()'
        )

    def many(self, text: str, types: Sequence[Type]) -> list[Value]:
        """Writes an op with any number of results."""
        if not types:
            self.lines.append(text)
            return []
        name = self.fresh()
        self.lines.append(f"{name}:{len(types)} = {text}")
        return [self._value(f"{name}#{i}", t) for i, t in enumerate(types)]

    def body(self, results: Sequence[Value] = ()) -> str:
        """The function's body as text, with its return."""
        names, types = ", ".join(v.name for v in results), ", ".join(str(v.type) for v in results)
        return "\n".join([*self.entry, *self.lines, f"return {names} : {types}" if results else "return"])

    # --- constants ---
    def const(self, value: Number, t: Type) -> Value:
        """A constant; of a vector type, in every lane."""
        text = _literal(value, t.element)
        made = self.at_entry(f"arith.constant {f'dense<{text}>' if t.lanes else text} : {t}", t)
        if not t.lanes:
            made.const = value
        return made

    def i64(self, value: int) -> Value:
        """An i64 constant: what indices and sizes are."""
        return self.const(value, I64)

    def f32(self, value: float, lanes: int = 0) -> Value:
        """An f32 constant; a vector of it where there are lanes."""
        return self.const(value, vec(lanes))

    def consts(self, values: Sequence[Number], element: str) -> Value:
        """A vector constant, lane by lane."""
        text = ", ".join(_literal(v, element) for v in values)
        t = vec(len(values), element)
        return self.at_entry(f"arith.constant dense<[{text}]> : {t}", t)

    def value(self, value: Value | Number, t: Type) -> Value:
        """`value` as a value of type `t`: numbers become constants, scalars of the same element type are broadcast."""
        if not isinstance(value, Value):
            return self.const(value, t)
        if value.type == t:
            return value
        if value.type == Type(t.element):
            return self.broadcast(value, t.lanes)
        raise TypeError(f"a value of type {value.type} cannot be used as {t}: convert it first")

    def pair(self, a: Value | Number, b: Value | Number) -> tuple[Value, Value]:
        """Both operands in the type of the vector among them, else of the value among them."""
        if isinstance(a, Value) and isinstance(b, Value):
            t = b.type if b.type.lanes and not a.type.lanes else a.type
        elif isinstance(a, Value):
            t = a.type
        elif isinstance(b, Value):
            t = b.type
        else:
            raise TypeError("at least one operand must be a kernel value")
        return self.value(a, t), self.value(b, t)

    def broadcast(self, a: Value, lanes: int) -> Value:
        """A scalar in every lane of a vector. Raises TypeError for a vector."""
        if a.type.lanes:
            raise TypeError(f"only a scalar can be broadcast, not {a.type}")
        t = vec(lanes, a.type.element)
        if a.const is not None:
            return self.const(a.const, t)
        return self.op(f"vector.broadcast {a.name} : {a.type} to {t}", t)


def _literal(value: Number, element: str) -> str:
    """A number as MLIR writes it, exact for the element type."""
    if "f" not in element:
        return ("true" if value else "false") if element == "i1" else str(int(value))
    value = float(value)
    if value - value == 0:  # finite
        return f"{value:.17e}"
    bits, code = {"f64": (64, "<d"), "f32": (32, "<f"), "f16": (16, "<e"), "bf16": (16, "")}[element]
    packed = struct.pack("<f", value)[2:] if element == "bf16" else struct.pack(code, value)
    return f"0x{int.from_bytes(packed, 'little'):0{bits // 4}X}"
