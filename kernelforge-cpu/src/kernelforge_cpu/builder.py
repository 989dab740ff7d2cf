"""The ops of kernel text: arithmetic, conversions, lanes and control flow of one function; `pointer` has those of memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError
from kernelforge_cpu.control import Branch, Loop
from kernelforge_cpu.pointer import Pointer
from kernelforge_cpu.ssa import I64, Function, Number, Type, Value, movable, vec
from kernelforge_cpu.stack import KERNEL_BYTES

if TYPE_CHECKING:
    from kernelforge_cpu.isa import CpuTarget

INT_OPS = {
    "add": "addi",
    "sub": "subi",
    "mul": "muli",
    "and": "andi",
    "or": "ori",
    "xor": "xori",
    "shl": "shli",
    "shrs": "shrsi",
}
INT_OPS |= {"shru": "shrui", "divu": "divui", "remu": "remui", "min": "minsi", "max": "maxsi"}
FLOAT_OPS = {"add": "addf", "sub": "subf", "mul": "mulf", "div": "divf"}
FOLDS: dict[str, Callable[[int, int], int]] = {
    "add": int.__add__,
    "sub": int.__sub__,
    "mul": int.__mul__,
    "shl": int.__lshift__,
    "shrs": int.__rshift__,
    "and": int.__and__,
    "min": min,
    "max": max,
}


class Builder:
    """Writes the body of one function. Values of one function must not be used in another."""

    def __init__(self, target: CpuTarget, params: Sequence[Type]) -> None:
        self.target = target
        self.lanes = target.lanes
        """f32 lanes of the target's widest vector."""
        self.entry: list[str] = []  # constants and base pointers, at the top of the function: they dominate all uses
        self.lines: list[str] = []
        self.cache: dict[str, Value] = {}
        self.count = self.stack_bytes = 0
        self.params = [Value(self, f"%arg{i}", t) for i, t in enumerate(params)]

    # --- writing ---
    def fresh(self) -> str:
        self.count += 1
        return f"%{self.count}"

    def op(self, text: str, t: Type) -> Value:
        """Writes `%n = text`, an op with one result of `type`. The way to any op this builder has no method for."""
        name = self.fresh()
        self.lines.append(f"{name} = {text}")
        return Value(self, name, t)

    def at_entry(self, text: str, t: Type) -> Value:
        value = self.cache.get(text)
        if value is None:
            value = self.cache[text] = Value(self, self.fresh(), t)
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

    # --- constants ---
    def const(self, value: Number, t: Type) -> Value:
        """A constant; of a vector type, in every lane."""
        text = literal(value, t.element)
        made = self.at_entry(f"arith.constant {f'dense<{text}>' if t.lanes else text} : {t}", t)
        if not t.lanes:
            made.const = value
        return made

    def i64(self, value: int) -> Value:
        return self.const(value, I64)

    def f32(self, value: float, lanes: int = 0) -> Value:
        return self.const(value, vec(lanes))

    def consts(self, values: Sequence[Number], element: str) -> Value:
        """A vector constant, lane by lane."""
        text = ", ".join(literal(v, element) for v in values)
        t = vec(len(values), element)
        return self.at_entry(f"arith.constant dense<[{text}]> : {t}", t)

    def value(self, value: Value | Number, t: Type) -> Value:
        """`value` as a value of `type`: numbers become constants, scalars of the same element type are broadcast."""
        if not isinstance(value, Value):
            return self.const(value, t)
        if value.type == t:
            return value
        if value.type == Type(t.element):
            return self.broadcast(value, t.lanes)
        raise TypeError(f"a value of type {value.type} cannot be used as {t}: convert it first")

    def pair(self, a: Value | Number, b: Value | Number) -> tuple[Value, Value]:
        if isinstance(a, Value) and isinstance(b, Value):
            t = b.type if b.type.lanes and not a.type.lanes else a.type
        elif isinstance(a, Value):
            t = a.type
        elif isinstance(b, Value):
            t = b.type
        else:
            raise TypeError("at least one operand must be a kernel value")
        return self.value(a, t), self.value(b, t)

    # --- arithmetic ---
    def binary(self, kind: str, a: Value | Number, b: Value | Number) -> Value:
        a, b = self.pair(a, b)
        if not a.type.is_float:
            if isinstance(a.const, int) and isinstance(b.const, int) and kind in FOLDS:
                return self.const(FOLDS[kind](a.const, b.const), a.type)
            if b.const == 0 and kind in ("add", "sub", "shl", "shrs", "shru", "or"):
                return a
            if b.const == 1 and kind in ("mul", "divu"):
                return a
            if (a.const == 0 and kind == "add") or (a.const == 1 and kind == "mul"):
                return b
        name = (FLOAT_OPS if a.type.is_float else INT_OPS).get(kind)
        if name is None:
            raise TypeError(f"no '{kind}' for {a.type}" + ("; use // for integers" if kind == "div" else ""))
        return self.op(f"arith.{name} {a.name}, {b.name} : {a.type}", a.type)

    def floordiv(self, a: Value, b: Value | int) -> Value:
        a, b = self.pair(a, b)
        if isinstance(b.const, int) and b.const > 0 and b.const & (b.const - 1) == 0:
            return self.binary("shrs", a, b.const.bit_length() - 1)
        return self.op(f"arith.floordivsi {a.name}, {b.name} : {a.type}", a.type)

    def modulo(self, a: Value, b: Value | int) -> Value:
        a, b = self.pair(a, b)
        if isinstance(b.const, int) and b.const > 0 and b.const & (b.const - 1) == 0:
            return self.binary("and", a, b.const - 1)
        return a - self.floordiv(a, b) * b

    def shift_right_logical(self, a: Value, b: Value | int) -> Value:
        return self.binary("shru", a, b)

    def negate(self, a: Value) -> Value:
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
        a, b = self.pair(a, b)
        return self.select(self.compare(keep, a, b), a, b) if a.type.is_float else self.binary(kind, a, b)

    def compare(self, kind: str, a: Value | Number, b: Value | Number) -> Value:
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
        return self.unary("sqrt", a)

    def abs(self, a: Value) -> Value:
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

    # --- lanes ---
    def broadcast(self, a: Value, lanes: int) -> Value:
        if a.type.lanes:
            raise TypeError(f"only a scalar can be broadcast, not {a.type}")
        t = vec(lanes, a.type.element)
        if a.const is not None:
            return self.const(a.const, t)
        return self.op(f"vector.broadcast {a.name} : {a.type} to {t}", t)

    def extract(self, a: Value, lane: int | Value) -> Value:
        lanes = self.movable(a)
        one = Type(lanes.type.element)
        text = f"vector.extract {lanes.name}[{self.position(lane)}] : {one} from {lanes.type}"
        return self.bitcast(self.op(text, one), Type(a.type.element))

    def insert(self, a: Value, scalar: Value, lane: int | Value) -> Value:
        lanes, one = self.movable(a), self.movable(scalar)
        text = f"vector.insert {one.name}, {lanes.name}[{self.position(lane)}] : {one.type} into {lanes.type}"
        return self.bitcast(self.op(text, lanes.type), a.type)

    def movable(self, a: Value) -> Value:
        return self.bitcast(a, movable(a.type))

    def position(self, lane: int | Value) -> str:
        if isinstance(lane, int):
            return str(lane)
        name = self.fresh()
        self.lines.append(f"{name} = arith.index_cast {lane.name} : {lane.type} to index")
        return name

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """A vector of the named lanes: i < n is a's lane i, n <= i < 2n is b's lane i - n."""
        x, y = self.movable(a), self.movable(b)
        text = f"vector.shuffle {x.name}, {y.name} [{', '.join(map(str, lanes))}] : {x.type}, {y.type}"
        return self.bitcast(self.op(text, vec(len(lanes), x.type.element)), vec(len(lanes), a.type.element))

    def slice(self, a: Value, start: int, lanes: int) -> Value:
        return self.shuffle(a, a, range(start, start + lanes))

    def concat(self, *parts: Value) -> Value:
        """All lanes of equally long vectors (a power of two of them), one after the other."""
        while len(parts) > 1:
            parts = tuple(
                self.shuffle(a, b, range(2 * a.type.lanes)) for a, b in zip(parts[::2], parts[1::2], strict=True)
            )
        return parts[0]

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """n vectors of n lanes (n a power of two) as a square matrix: the columns, in n log2 n two-source shuffles."""
        n, rows = len(rows), list(rows)
        step = 1
        while step < n:
            done = list(rows)
            low = [i if not i & step else i - step + n for i in range(n)]
            high = [i + step if not i & step else i + n for i in range(n)]
            for i in range(n):
                if not i & step:
                    done[i], done[i + step] = (
                        self.shuffle(rows[i], rows[i + step], low),
                        self.shuffle(rows[i], rows[i + step], high),
                    )
            rows, step = done, step * 2
        return rows

    def reduce_add(self, a: Value) -> Value:
        """The sum of all lanes, in any order."""
        flags = " fastmath<reassoc,nsz>" if a.type.is_float else ""
        return self.op(
            f"vector.reduction <add>, {a.name}{flags} : {a.type} into {a.type.element}", Type(a.type.element)
        )

    def reduce_max(self, a: Value) -> Value:
        """The largest lane, by `max`: with a NaN lane either NaN or the largest of the others."""
        return self.halve(self.max, a)

    def reduce_min(self, a: Value) -> Value:
        return self.halve(self.min, a)

    def halve(self, combine: Callable[[Value, Value], Value], a: Value) -> Value:
        while (n := a.type.lanes // 2) >= 1:
            a = combine(self.slice(a, 0, n), self.slice(a, n, n))
        return self.extract(a, 0)

    def mask(self, valid: Value, lanes: int) -> Value:
        """i1 lanes: lane i is true if i < valid (i64)."""
        return self.consts(range(lanes), "i32").lt(self.broadcast(self.convert(valid, "i32"), lanes))

    # --- memory ---
    def alloca(self, element: str, count: int, *, align: int = 64) -> Pointer:
        """Stack scratch of `count` elements, uninitialised; one per call of this method and kernel call, also inside
        loops. Raises UsageError when all of the function's take more than `stack.KERNEL_BYTES`.
        """
        self.stack_bytes += -(-Type(element).bits * count // (8 * align)) * align
        if self.stack_bytes > KERNEL_BYTES:
            raise UsageError(f"a kernel may have {KERNEL_BYTES} bytes of stack, not {self.stack_bytes}")
        size, name = self.i64(count), self.fresh()
        self.entry.append(
            f"{name} = llvm.alloca {size.name} x {Type(element)} {{alignment = {align} : i64}} : (i64) -> !llvm.ptr"
        )
        return Pointer(self, name, element)

    # --- control ---
    def for_(self, lo: Value | int, hi: Value | int, step: Value | int = 1, init: Sequence[Value] = ()) -> Loop:
        """A counted loop: `with k.for_(lo, hi, step, init=[a]) as loop:`.

        Inside: `loop.i`, `loop.values`, and at the end `loop.yield_(...)`. Afterwards: `loop.results`.
        """
        return Loop(self, self.value(lo, I64), self.value(hi, I64), self.value(step, I64), list(init))

    def if_(self, condition: Value) -> Branch:
        """`with k.if_(c) as branch: branch.yield_(a)`, then `with branch.else_(): branch.yield_(b)`.

        Afterwards: `branch.results`. A branch without results needs neither `yield_` nor `else_`.
        """
        return Branch(self, condition)

    def vectorize(
        self,
        lo: Value | int,
        hi: Value | int,
        body: Callable[..., Sequence[Value] | None],
        *,
        lanes: int = 0,
        init: Sequence[Value] = (),
    ) -> list[Value]:
        """Calls `body(i, valid, *carried)` for i from lo to hi in steps of `lanes` (default: the target's).

        `valid` is None for full vectors, and the number of lanes left (i64) for the last one, if it is not full.
        `body` returns the next carried values (None if `init` is empty); returns the last ones.
        """
        lanes = lanes or self.lanes
        lo, hi = self.value(lo, I64), self.value(hi, I64)
        end = lo + (self.max(hi - lo, 0) // lanes) * lanes
        with self.for_(lo, end, lanes, init) as loop:
            loop.yield_(*(body(loop.i, None, *loop.values) or ()))
        with self.if_(end.lt(hi)) as tail:
            tail.yield_(*(body(end, hi - end, *loop.results) or ()))
        if init:
            with tail.else_():
                tail.yield_(*loop.results)
        return tail.results

    def split(self, n: Value | int, part: Value, parts: Value, grain: int = 1) -> tuple[Value, Value]:
        """The range [lo, hi) of 0..n that part `part` of `parts` does; lo is a multiple of `grain`, shares differ by
        one grain at most.
        """
        n = self.value(n, I64)
        grains = (n + (grain - 1)) // grain
        lo, hi = (self.binary("divu", grains * p, parts) * grain for p in (part, part + 1))
        return lo, self.min(hi, n)

    def call(self, function: Function, *args: Value) -> list[Value]:
        types = ", ".join(map(str, function.params))
        results = ", ".join(map(str, function.results))
        text = f"func.call @{function.name}({', '.join(a.name for a in args)}) : ({types}) -> ({results})"
        return self.many(text, function.results)

    def many(self, text: str, types: Sequence[Type]) -> list[Value]:
        """Writes an op with any number of results."""
        if not types:
            self.lines.append(text)
            return []
        name = self.fresh()
        self.lines.append(f"{name}:{len(types)} = {text}")
        return [Value(self, f"{name}#{i}", t) for i, t in enumerate(types)]

    def body(self, results: Sequence[Value] = ()) -> str:
        names, types = ", ".join(v.name for v in results), ", ".join(str(v.type) for v in results)
        return "\n".join([*self.entry, *self.lines, f"return {names} : {types}" if results else "return"])


def literal(value: Number, element: str) -> str:
    """A number as MLIR writes it, exact for the element type."""
    if "f" not in element:
        return ("true" if value else "false") if element == "i1" else str(int(value))
    value = float(value)
    if value - value == 0:  # finite
        return f"{value:.17e}"
    bits, code = {"f64": (64, "<d"), "f32": (32, "<f"), "f16": (16, "<e"), "bf16": (16, "")}[element]
    packed = struct.pack("<f", value)[2:] if element == "bf16" else struct.pack(code, value)
    return f"0x{int.from_bytes(packed, 'little'):0{bits // 4}X}"
