"""Addresses in kernel text: loads, stores and prefetches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge_cpu.ssa import BITS, I64, PTR, Number, Type, Value

if TYPE_CHECKING:
    from kernelforge_cpu.builder import Builder


class Pointer(Value):
    """An address and the element type it counts in. Offsets are elements, never bytes."""

    __slots__ = ("element",)

    def __init__(self, k: Builder, name: str, element: str) -> None:
        super().__init__(k, name, PTR)
        self.element = element

    def at(self, offset: Value | int) -> Pointer:
        """The address of element `offset`."""
        const = offset.const if isinstance(offset, Value) else offset
        if const == 0:
            return self
        k, element = self.k, Type(self.element)
        if const is not None:
            made = k.op(f"llvm.getelementptr {self.name}[{const}] : (!llvm.ptr) -> !llvm.ptr, {element}", PTR)
        else:
            at = k.value(offset, I64)
            made = k.op(f"llvm.getelementptr {self.name}[{at.name}] : (!llvm.ptr, i64) -> !llvm.ptr, {element}", PTR)
        return Pointer(k, made.name, self.element)

    def of(self, element: str) -> Pointer:
        """The same address, counted in another element type."""
        return Pointer(self.k, self.name, element)

    @property
    def alignment(self) -> int:
        """Bytes of one element."""
        return max(1, BITS[self.element] // 8)

    def load(
        self,
        offset: Value | int = 0,
        lanes: int = 0,
        *,
        valid: Value | None = None,
        fill: Number = 0,
        align: int | None = None,
    ) -> Value:
        """`lanes` elements from `offset` (0: one scalar), as they are in memory.
        With `valid` (i64) only that many are read, the other lanes are `fill`. `align` in bytes; default: one element.
        """
        k, at, t = self.k, self.at(offset), Type(self.element, lanes)
        align = align or self.alignment
        if valid is None:
            moved = t.movable
            text = f"llvm.load {at.name} {{alignment = {align} : i64}} : !llvm.ptr -> {moved}"
        else:
            mask, other = k.mask(valid, lanes), k.movable(k.const(fill, t))
            moved = other.type
            types = f"(!llvm.ptr, {mask.type}, {moved}) -> {moved}"
            text = f"llvm.intr.masked.load {at.name}, {mask.name}, {other.name} {{alignment = {align} : i32}} : {types}"
        return k.bitcast(k.op(text, moved), t)

    def load_f32(
        self, offset: Value | int = 0, lanes: int = 0, *, valid: Value | None = None, align: int | None = None
    ) -> Value:
        """As `load`, widened to f32 (f32, f16, bf16 and integer elements). Lanes that are not valid are 0."""
        return self.k.convert(self.load(offset, lanes, valid=valid, align=align), "f32")

    def store(
        self, value: Value | Number, offset: Value | int = 0, *, valid: Value | None = None, align: int | None = None
    ) -> None:
        """Writes a scalar or vector, converted to this pointer's element type (f32 rounds to nearest even)."""
        k = self.k
        stored = k.convert(value, self.element) if isinstance(value, Value) else k.const(value, Type(self.element))
        stored = k.movable(stored)
        at, t = self.at(offset), stored.type
        align = align or self.alignment
        if valid is None:
            k.lines.append(f"llvm.store {stored.name}, {at.name} {{alignment = {align} : i64}} : {t}, !llvm.ptr")
            return
        if isinstance(valid.const, int):
            at.of(t.element).store_lanes(stored, valid.const, align)
            return
        if t.bits == 16:
            # Not masked: see `store_lanes`. LLVM finds out that a mask is constant after us.
            with k.for_(0, k.min(valid, t.lanes)) as lane:
                at.of(t.element).store(k.extract(stored, lane.i), lane.i, align=align)
            return
        mask = k.mask(valid, t.lanes)
        types = f"{stored.type}, {mask.type} into !llvm.ptr"
        k.lines.append(
            f"llvm.intr.masked.store {stored.name}, {at.name}, {mask.name} {{alignment = {align} : i32}} : {types}"
        )

    def store_lanes(self, value: Value, count: int, align: int) -> None:
        """The first `count` lanes, in pieces of powers of two.

        Not masked: LLVM stores too many bytes for a constant mask of one lane of a 16-bit vector that was truncated.
        """
        start = 0
        while start < count:
            n = min(value.type.lanes, 1 << ((count - start).bit_length() - 1))
            piece = self.k.slice(value, start, n) if n > 1 else self.k.extract(value, start)
            self.store(piece, start, align=align)
            start += n

    def prefetch(self, offset: Value | int = 0, *, locality: int = 3, write: bool = False) -> None:
        """Hints that the line of element `offset` is needed soon; locality 3 keeps it in all levels, 0 in none."""
        attributes = f"cache = 1 : i32, hint = {locality} : i32, rw = {int(write)} : i32"
        self.k.lines.append(f'"llvm.intr.prefetch"({self.at(offset).name}) <{{{attributes}}}> : (!llvm.ptr) -> ()')
