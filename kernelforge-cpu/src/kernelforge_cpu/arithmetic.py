"""Arithmetic, comparisons and conversions of kernel text."""

from __future__ import annotations

from collections.abc import Callable

from kernelforge_cpu.ssa import Number, Type, Value
from kernelforge_cpu.writer import Writer

_INT_OPS = {
    "add": "addi",
    "sub": "subi",
    "mul": "muli",
    "and": "andi",
    "or": "ori",
    "xor": "xori",
    "shl": "shli",
    "shrs": "shrsi",
}
_INT_OPS |= {"shru": "shrui", "divu": "divui", "remu": "remui", "min": "minsi", "max": "maxsi"}
_FLOAT_OPS = {"add": "addf", "sub": "subf", "mul": "mulf", "div": "divf"}
_FOLDS: dict[str, Callable[[int, int], int]] = {
    "add": int.__add__,
    "sub": int.__sub__,
    "mul": int.__mul__,
    "shl": int.__lshift__,
    "shrs": int.__rshift__,
    "and": int.__and__,
    "min": min,
    "max": max,
}


class Arithmetic(Writer):
    """The part of `Builder` that computes, lane by lane."""

    # --- arithmetic ---
    def binary(self, kind: str, a: Value | Number, b: Value | Number) -> Value:
        """What the operators write: `kind` is add, sub, mul, div, and, or, xor, shl, shrs, shru, min, max, divu or remu."""
        a, b = self.pair(a, b)
        if not a.type.is_float:
            if isinstance(a.const, int) and isinstance(b.const, int) and kind in _FOLDS:
                return self.const(_FOLDS[kind](a.const, b.const), a.type)
            if b.const == 0 and kind in ("add", "sub", "shl", "shrs", "shru", "or"):
                return a
            if b.const == 1 and kind in ("mul", "divu"):
                return a
            if (a.const == 0 and kind == "add") or (a.const == 1 and kind == "mul"):
                return b
        name = (_FLOAT_OPS if a.type.is_float else _INT_OPS).get(kind)
        if name is None:
            raise TypeError(f"no '{kind}' for {a.type}" + ("; use // for integers" if kind == "div" else ""))
        return self.op(f"arith.{name} {a.name}, {b.name} : {a.type}", a.type)

    def floordiv(self, a: Value, b: Value | int) -> Value:
        """a // b of integers: rounds down."""
        a, b = self.pair(a, b)
        if isinstance(b.const, int) and b.const > 0 and b.const & (b.const - 1) == 0:
            return self.binary("shrs", a, b.const.bit_length() - 1)
        return self.op(f"arith.floordivsi {a.name}, {b.name} : {a.type}", a.type)

    def modulo(self, a: Value, b: Value | int) -> Value:
        """a % b of integers: has the divisor's sign."""
        a, b = self.pair(a, b)
        if isinstance(b.const, int) and b.const > 0 and b.const & (b.const - 1) == 0:
            return self.binary("and", a, b.const - 1)
        return a - self.floordiv(a, b) * b

    def shift_right_logical(self, a: Value, b: Value | int) -> Value:
        """a >> b of integers, with zeros coming in."""
        return self.binary("shru", a, b)

    def negate(self, a: Value) -> Value:
        """-a."""
        return self.op(f"arith.negf {a.name} : {a.type}", a.type) if a.type.is_float else self.binary("sub", 0, a)

    def fma(self, a: Value, b: Value | Number, c: Value | Number) -> Value:
        """a * b + c, rounded once where the target has FMA."""
        t = next((v.type for v in (a, b, c) if isinstance(v, Value) and v.type.lanes), a.type)
        a, b, c = (self.value(v, t) for v in (a, b, c))
        return self.op(f"llvm.intr.fmuladd({a.name}, {b.name}, {c.name}) : ({t}, {t}, {t}) -> {t}", t)

    def max(self, a: Value | Number, b: Value | Number) -> Value:
        """The larger; for floats `a > b ? a : b`, one instruction, which is `b` when either is NaN."""
        return self.extreme("max", "gt", a, b)

    def min(self, a: Value | Number, b: Value | Number) -> Value:
        """The smaller; for floats `a < b ? a : b`, one instruction, which is `b` when either is NaN."""
        return self.extreme("min", "lt", a, b)

    def extreme(self, kind: str, keep: str, a: Value | Number, b: Value | Number) -> Value:
        """`max` and `min`: `keep` is the comparison by which `a` is taken."""
        a, b = self.pair(a, b)
        return self.select(self.compare(keep, a, b), a, b) if a.type.is_float else self.binary(kind, a, b)

    def compare(self, kind: str, a: Value | Number, b: Value | Number) -> Value:
        """i1 lanes: `kind` is eq, ne, lt, le, gt or ge, signed for integers; for floats all but ne are false beside a NaN."""
        a, b = self.pair(a, b)
        if a.type.is_float:
            text = f"arith.cmpf {'une' if kind == 'ne' else 'o' + kind}"
        else:
            text = f"arith.cmpi {kind if kind in ('eq', 'ne') else 's' + kind}"
        return self.op(f"{text}, {a.name}, {b.name} : {a.type}", a.type.of("i1"))

    def select(self, condition: Value, a: Value | Number, b: Value | Number) -> Value:
        """Lane by lane `condition ? a : b`; a scalar condition picks a whole vector."""
        a, b = self.pair(a, b)
        if condition.type.lanes and not a.type.lanes:
            a, b = self.broadcast(a, condition.type.lanes), self.broadcast(b, condition.type.lanes)
        types = f"{condition.type}, {a.type}" if condition.type.lanes else str(a.type)
        return self.op(f"arith.select {condition.name}, {a.name}, {b.name} : {types}", a.type)

    def unary(self, op: str, a: Value) -> Value:
        """A `math` dialect op that every target has as an instruction: absf, sqrt, floor, ceil, roundeven, trunc."""
        return self.op(f"math.{op} {a.name} : {a.type}", a.type)

    def sqrt(self, a: Value) -> Value:
        """The square root, rounded to nearest."""
        return self.unary("sqrt", a)

    def abs(self, a: Value) -> Value:
        """The magnitude of floats or integers."""
        return self.unary("absf" if a.type.is_float else "absi", a)

    # --- conversions ---
    def bitcast(self, a: Value, t: Type) -> Value:
        """The same bits as another type of the same total size."""
        if a.type == t:
            return a
        op = "vector.bitcast" if t.lanes and a.type.lanes else "llvm.bitcast"
        return self.op(f"{op} {a.name} : {a.type} to {t}", t)

    def convert(self, a: Value, element: str, *, unsigned: bool = False) -> Value:
        """By value: between integer widths, integers and floats, float widths (to nearest even).
        `unsigned` is about the integer side.
        """
        src, dst = a.type, a.type.of(element)
        if src == dst:
            return a
        if src.is_float and dst.is_float:
            return self.convert_float(a, element)
        if not src.is_float and not dst.is_float:
            if a.const is not None:
                return self.const(a.const, dst)
            op = "trunci" if dst.bits < src.bits else "extui" if unsigned or src.element == "i1" else "extsi"
        elif dst.is_float:
            if dst.bits == 16:
                return self.convert(self.convert(a, "f32", unsigned=unsigned), element)
            op = "uitofp" if unsigned or src.element == "i1" else "sitofp"
        else:
            if src.bits == 16:
                return self.convert(self.convert(a, "f32"), element, unsigned=unsigned)
            op = "fptoui" if unsigned else "fptosi"
        return self.op(f"arith.{op} {a.name} : {src} to {dst}", dst)

    def convert_float(self, a: Value, element: str) -> Value:
        """`convert` between float widths."""
        from kernelforge_cpu import halves

        src, dst = a.type, a.type.of(element)
        if src.bits == 16 and element != "f32":
            return self.convert(self.convert(a, "f32"), element)
        if src.element == "bf16":
            return halves.from_bf16(self, a)
        if src.element == "f16" and not self.target.has_f16:
            return halves.from_f16(self, a)
        if dst.bits == 16 and src.element != "f32":
            return self.convert(self.convert(a, "f32"), element)
        if element == "bf16":
            return halves.to_bf16(self, a)
        if element == "f16" and not self.target.has_f16:
            return halves.to_f16(self, a)
        return self.op(f"arith.{'extf' if dst.bits > src.bits else 'truncf'} {a.name} : {src} to {dst}", dst)
