"""The ops of kernel text: lanes, scratch memory and control flow of one function. `writer` has its lines and constants,
`arithmetic` what is computed lane by lane, `pointer` loads and stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError
from kernelforge_cpu.arithmetic import Arithmetic
from kernelforge_cpu.control import Branch, Loop
from kernelforge_cpu.pointer import Pointer
from kernelforge_cpu.ssa import I64, Function, Type, Value, vec
from kernelforge_cpu.stack import KERNEL_BYTES

if TYPE_CHECKING:
    from kernelforge_cpu.isa import CpuTarget


class Builder(Arithmetic):
    """Writes the body of one function. Values of one function must not be used in another."""

    def __init__(self, target: CpuTarget, params: Sequence[Type]) -> None:
        super().__init__(target, params)
        self.stack_bytes = 0

    # --- lanes ---
    def extract(self, a: Value, lane: int | Value) -> Value:
        """One lane as a scalar."""
        lanes = self.movable(a)
        one = Type(lanes.type.element)
        text = f"vector.extract {lanes.name}[{self.position(lane)}] : {one} from {lanes.type}"
        return self.bitcast(self.op(text, one), Type(a.type.element))

    def insert(self, a: Value, scalar: Value, lane: int | Value) -> Value:
        """The vector with a scalar in one lane."""
        lanes, one = self.movable(a), self.movable(scalar)
        text = f"vector.insert {one.name}, {lanes.name}[{self.position(lane)}] : {one.type} into {lanes.type}"
        return self.bitcast(self.op(text, lanes.type), a.type)

    def movable(self, a: Value) -> Value:
        """The lanes in a type that moves as they are: see `Type.movable`."""
        return self.bitcast(a, a.type.movable)

    def position(self, lane: int | Value) -> str:
        """A lane's number as MLIR text."""
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
        """`lanes` lanes from lane `start` on."""
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
        """The smallest lane, by `min`: with a NaN lane either NaN or the smallest of the others."""
        return self.halve(self.min, a)

    def halve(self, combine: Callable[[Value, Value], Value], a: Value) -> Value:
        """A reduction of all lanes by halves: log2 n times `combine`."""
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
        """Calls a function of `KernelBuilder.function`; its results."""
        types = ", ".join(map(str, function.params))
        results = ", ".join(map(str, function.results))
        text = f"func.call @{function.name}({', '.join(a.name for a in args)}) : ({types}) -> ({results})"
        return self.many(text, function.results)
