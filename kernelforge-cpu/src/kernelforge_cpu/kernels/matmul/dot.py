"""Products of four int8 pairs in every 32-bit lane, by the instructions of each instruction set.

`Dot` sums them over a group of 32: `start` with the group's zeros, a `step` for each word, `finish` with int32 lanes. The
sums are exact. `zeros` is what `kernelforge.quant` keeps beside a group of activations: 8 times the sums of the elements of
the lower and of the upper half of every word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_cpu.kernels.matmul.words import WORD
from kernelforge_cpu.ssa import Type, vec

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Builder, Value

NIBBLE = 4


@dataclass(frozen=True)
class Dot(ABC):
    """Of weights in format `dtype`, `lanes` columns at a time."""

    dtype: str
    lanes: int

    @property
    def bytes(self) -> Type:
        return vec(WORD * self.lanes, "i8")

    @property
    def sums(self) -> Type:
        return vec(self.lanes, "i32")

    def weights(self, k: Builder, words: Value) -> list[Value]:
        """The operands of `step` in a vector of words (as bytes): one, or for nibbles two, the second of elements that come
        half a group later."""
        if self.dtype == "q8":
            return [words]
        high = k.shift_right_logical(k.bitcast(words, vec(2 * self.lanes, "i16")), NIBBLE)
        return [k.binary("and", w, 15) for w in (words, k.bitcast(high, self.bytes))]

    @abstractmethod
    def start(self, k: Builder, zeros: Value) -> Value | None:
        """The sums before the first step; `zeros` is a pair of int16 in every lane."""

    @abstractmethod
    def step(self, k: Builder, sums: Value | None, weights: Value, x: Value) -> Value:
        """The sums and the products of two vectors of bytes."""

    @abstractmethod
    def finish(self, k: Builder, sums: Value, zeros: Value) -> Value:
        """int32 lanes."""


@dataclass(frozen=True)
class PairDot(Dot):
    """SSSE3, AVX2 and AVX-512BW: `pmaddubsw` multiplies unsigned by signed bytes and adds pairs in int16.

    Eight products of nibbles stay below 8 * 2 * 15 * 127 = 30480, so that a group of `q4` is summed in int16, and again
    after its zeros were taken off: no more than 16 * 8 * 127 = 16256 is left. For `q8` the sign of the weight is moved to
    the activation, and each pair (up to 2 * 127 * 127 = 32258) goes on to int32. -128 must not occur in weights that have
    signs; GGUF's quantiser makes none.
    """

    def pairs(self, k: Builder, a: Value, b: Value) -> Value:
        """Unsigned times signed bytes, int16 lanes."""
        name = {4: "ssse3.pmadd.ub.sw.128", 8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}[self.lanes]
        return k.intrinsic(f"llvm.x86.{name}", vec(2 * self.lanes, "i16"), a, b)

    def wide(self, k: Builder, a: Value) -> Value:
        """Pairs of int16 added, int32 lanes."""
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
        return k.intrinsic(f"llvm.x86.{name}", self.sums, a, k.const(1, a.type))

    def signed(self, k: Builder, x: Value, w: Value) -> Value:
        """x with the sign of w turned in; anything where w is 0."""
        if self.lanes == 16:
            return k.select(w.lt(0), k.negate(x), x)
        name = {4: "ssse3.psign.b.128", 8: "avx2.psign.b"}[self.lanes]
        return k.intrinsic(f"llvm.x86.{name}", x.type, x, w)

    def start(self, k: Builder, zeros: Value) -> Value | None:
        return None

    def step(self, k: Builder, sums: Value | None, weights: Value, x: Value) -> Value:
        if self.dtype == "q4":
            found = self.pairs(k, weights, x)
        else:
            found = self.wide(k, self.pairs(k, k.abs(weights), self.signed(k, x, weights)))
        return found if sums is None else sums + found

    def finish(self, k: Builder, sums: Value, zeros: Value) -> Value:
        return sums if self.dtype == "q8" else self.wide(k, sums - zeros)


@dataclass(frozen=True)
class VnniDot(Dot):
    """AVX-512 VNNI and AVX-VNNI: `vpdpbusd` multiplies unsigned by signed bytes and adds four to an int32. The weights of
    `q8` become unsigned by adding 128."""

    def weights(self, k: Builder, words: Value) -> list[Value]:
        return [words ^ -128] if self.dtype == "q8" else super().weights(k, words)

    def start(self, k: Builder, zeros: Value) -> Value | None:
        name = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[self.lanes]
        factor = -1 if self.dtype == "q4" else -16
        return k.intrinsic(f"llvm.x86.{name}", self.sums, zeros, k.const(factor, zeros.type))

    def step(self, k: Builder, sums: Value | None, weights: Value, x: Value) -> Value:
        assert sums is not None
        return k.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.sums, sums, weights, x)

    def finish(self, k: Builder, sums: Value, zeros: Value) -> Value:
        return sums


@dataclass(frozen=True)
class NeonDot(Dot):
    """Armv8.2 dot product: `sdot` multiplies signed bytes and adds four to an int32."""

    def start(self, k: Builder, zeros: Value) -> Value | None:
        if self.dtype == "q8":
            return k.const(0, self.sums)
        pairs = k.bitcast(zeros, self.sums)
        return 0 - ((pairs >> 16) + ((pairs << 16) >> 16))

    def step(self, k: Builder, sums: Value | None, weights: Value, x: Value) -> Value:
        assert sums is not None
        return k.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", self.sums, sums, weights, x)

    def finish(self, k: Builder, sums: Value, zeros: Value) -> Value:
        return sums
