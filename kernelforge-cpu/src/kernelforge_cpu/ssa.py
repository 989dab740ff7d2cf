"""Types and values of kernel text: what the operators of `kernelforge_cpu.emit` work on.

A `Value` is an SSA name with its type and the builder that made it, so `a * b + 1` writes MLIR into that builder.
Python numbers become constants of the other operand's type, scalars are broadcast to the other operand's lanes;
nothing else is converted silently.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kernelforge_cpu.builder import Builder

Number = int | float
"""What stands for a constant."""
BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "ptr": 64}
"""Of one element, by its type."""


class Type(NamedTuple):
    """An element type (`i1 i8 i16 i32 i64 f16 bf16 f32 f64 ptr`) and a number of lanes, 0 for a scalar."""

    element: str
    lanes: int = 0

    def __str__(self) -> str:
        return _spelled(self.element, self.lanes)

    @property
    def is_float(self) -> bool:
        return "f" in self.element

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return BITS[self.element]

    def of(self, element: str) -> Type:
        """The same lanes with another element type."""
        return Type(element, self.lanes)

    @property
    def movable(self) -> Type:
        """16-bit floats as integers: where a target has no such type, LLVM moves their lanes through conversion calls."""
        return self.of("i16") if self.is_float and self.bits == 16 else self


@cache
def _spelled(element: str, lanes: int) -> str:
    if element not in BITS:
        raise ValueError(f"unknown element type {element!r}; known: {', '.join(BITS)}")
    name = "!llvm.ptr" if element == "ptr" else element
    return f"vector<{lanes}x{name}>" if lanes else name


def vec(lanes: int, element: str = "f32") -> Type:
    """The type of a vector; of a scalar for no lanes."""
    return Type(element, lanes)


I1, I32, I64, F32, PTR = Type("i1"), Type("i32"), Type("i64"), Type("f32"), Type("ptr")


class Value:
    """One SSA value, with the operators `+ - * /`, for integers also `// % & | ^ << >>`, and comparisons by name. `const` holds
    the Python number when the value is a scalar constant, so that index arithmetic folds.
    """

    __slots__ = ("const", "k", "name", "type")

    def __init__(self, k: Builder, name: str, t: Type, const: Number | None = None) -> None:
        self.k, self.name, self.type, self.const = k, name, t, const

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"

    def __bool__(self) -> bool:
        raise TypeError("a kernel value has no truth at emission time: use k.if_ or k.select")

    def __add__(self, other: Value | Number) -> Value:
        return self.k.binary("add", self, other)

    def __radd__(self, other: Number) -> Value:
        return self.k.binary("add", other, self)

    def __sub__(self, other: Value | Number) -> Value:
        return self.k.binary("sub", self, other)

    def __rsub__(self, other: Number) -> Value:
        return self.k.binary("sub", other, self)

    def __mul__(self, other: Value | Number) -> Value:
        return self.k.binary("mul", self, other)

    def __rmul__(self, other: Number) -> Value:
        return self.k.binary("mul", other, self)

    def __truediv__(self, other: Value | Number) -> Value:
        return self.k.binary("div", self, other)

    def __rtruediv__(self, other: Number) -> Value:
        return self.k.binary("div", other, self)

    def __floordiv__(self, other: Value | int) -> Value:
        """Integers only; rounds down, as in Python."""
        return self.k.floordiv(self, other)

    def __mod__(self, other: Value | int) -> Value:
        """Integers only; has the divisor's sign, as in Python."""
        return self.k.modulo(self, other)

    def __neg__(self) -> Value:
        return self.k.negate(self)

    def __and__(self, other: Value | int) -> Value:
        return self.k.binary("and", self, other)

    def __or__(self, other: Value | int) -> Value:
        return self.k.binary("or", self, other)

    def __xor__(self, other: Value | int) -> Value:
        return self.k.binary("xor", self, other)

    def __lshift__(self, other: Value | int) -> Value:
        return self.k.binary("shl", self, other)

    def __rshift__(self, other: Value | int) -> Value:
        """Arithmetic: copies of the sign bit come in, as in Python. `k.shift_right_logical` brings in zeros."""
        return self.k.binary("shrs", self, other)

    # Comparisons: signed for integers; for floats all but `ne` are false when an operand is NaN.
    def eq(self, other: Value | Number) -> Value:
        return self.k.compare("eq", self, other)

    def ne(self, other: Value | Number) -> Value:
        return self.k.compare("ne", self, other)

    def lt(self, other: Value | Number) -> Value:
        return self.k.compare("lt", self, other)

    def le(self, other: Value | Number) -> Value:
        return self.k.compare("le", self, other)

    def gt(self, other: Value | Number) -> Value:
        return self.k.compare("gt", self, other)

    def ge(self, other: Value | Number) -> Value:
        return self.k.compare("ge", self, other)


class Function(NamedTuple):
    """A private function that other functions of the same kernel call."""

    name: str
    params: tuple[Type, ...]
    results: tuple[Type, ...]
