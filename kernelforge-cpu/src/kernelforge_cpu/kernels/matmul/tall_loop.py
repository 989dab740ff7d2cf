"""The inner loop of a tall tile of integer products (AVX2), as assembly: the rows' sums and what two words need fill all 16
registers, and LLVM spills from four rows on.

A group of 32 of one row takes at q8 a broadcast for every two words, and for each word `vpshufb`, `vpmaddubsw`, `vpmaddwd` and
`vpaddd`. The shuffle picks x or -x by the sign of the weight. `vpsignb` does that without a table of both, but on Zen 3 in a
unit that has products to do as well, which takes half as long again.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernelforge.dtype import GROUP
from kernelforge_cpu.kernels.matmul.words import WORD

VECTOR = 32
WORDS = GROUP // WORD
TURNS = (0, 2, 1, 3)
"""Quarters of a group of `q8` in the order in which they are multiplied: that of x in memory."""
NEAR = 128
"""Displacements from -128 to 127 take a byte; longer ones slow down the delivery of instructions."""


@dataclass(frozen=True)
class TallLoop:
    """Adds to f32 sums [rows][8], `step` bytes from row to row, the products of `rows` rows and 8 columns.

    The arguments of `text`: x in r8, weights in r9, their f16 scales in r10, sums in r11 (plus `NEAR`), the number of
    groups, at least 1, in rax, and in rbx the number of the first: at 0 the sums begin.

    x of a group at q8: [2][rows][2][16 bytes], of quarters 0 and 2, then 1 and 3, a quarter as v0, -v0, v1, -v1 ..., then
    f32 scales [rows]; weights [words in turn][2][8 columns][4]: magnitudes, then where in a quarter's 16 bytes the element
    with the weight's sign is.
    At q4: [words][rows][4], the group's zeros [rows][2] i16, f32 scales [rows]; weights [words][8 columns][4], unsigned.
    """

    dtype: str
    rows: int
    step: int

    @property
    def group_bytes(self) -> int:
        """Of a group of x."""
        return self.rows * (2 * GROUP + 4 if self.dtype == "q8" else GROUP + 8)

    @property
    def weight_bytes(self) -> int:
        """Of a group of 8 columns."""
        return WORDS * VECTOR * (2 if self.dtype == "q8" else 1)

    @property
    def constraints(self) -> str:
        clobbered = ("rcx", "rdx", "rsi", "rdi", *(f"ymm{i}" for i in range(16)), "memory", "flags")
        return ",".join(("{r8}", "{r9}", "{r10}", "{r11}", "{rax}", "{rbx}", *(f"~{{{name}}}" for name in clobbered)))

    def sum(self, row: int) -> str:
        """Where a row's is."""
        return f"{self.step * row - NEAR}(%r11)"

    def text(self) -> str:
        body = _Body(self.rows)
        self.products_q8(body) if self.dtype == "q8" else self.products_q4(body)
        self.scale(body)
        body.x.skip_to(self.group_bytes)
        body.weights.skip_to(self.weight_bytes)
        ones = body.ones
        start = [
            *(f"lea {NEAR}(%r8), %rdi", f"lea {NEAR}(%r9), %rdx", "mov %r10, %rsi", "mov %rax, %rcx"),
            *("test %rbx, %rbx", "jnz 2f", "vpxor %ymm0, %ymm0, %ymm0"),
            *(f"vmovups %ymm0, {self.sum(row)}" for row in range(self.rows)),
            *("2:", f"vpcmpeqw {ones}, {ones}, {ones}", f"vpsrlw $15, {ones}, {ones}", ".p2align 5", "1:"),
        ]
        end = ["add $16, %rsi", "dec %rcx", "jnz 1b"]
        return "\n".join((*start, *body.lines, *end))

    def products_q8(self, body: _Body) -> None:
        magnitudes, places = [body.take(), body.take()], [body.take(), body.take()]
        for turn, quarter in enumerate(TURNS):
            for i in range(2):
                at = (2 * turn + i) * 2 * VECTOR
                body.emit("vmovdqa", body.weights.at(at), magnitudes[i])
                body.emit("vmovdqa", body.weights.at(at + VECTOR), places[i])
            for row, total in enumerate(body.sums):
                second, first = body.temporary(), body.temporary()
                at = (quarter % 2 * self.rows + row) * VECTOR + quarter // 2 * VECTOR // 2
                body.emit("vbroadcasti128", body.x.at(at), second)
                body.emit("vpshufb", places[0], second, first)
                body.emit("vpmaddubsw", first, magnitudes[0], first)
                body.emit("vpshufb", places[1], second, second)
                body.emit("vpmaddubsw", second, magnitudes[1], second)
                body.emit("vpmaddwd", body.ones, first, total if turn == 0 else first)
                if turn:
                    body.emit("vpaddd", first, total, total)
                body.emit("vpmaddwd", body.ones, second, second)
                body.emit("vpaddd", second, total, total)

    def products_q4(self, body: _Body) -> None:
        weights = body.take()
        for word in range(WORDS):
            body.emit("vmovdqa", body.weights.at(word * VECTOR), weights)
            for row, total in enumerate(body.sums):
                x = body.temporary()
                body.emit("vpbroadcastd", body.x.at((word * self.rows + row) * WORD), x)
                body.emit("vpmaddubsw", x, weights, x if word else total)
                if word:
                    body.emit("vpaddw", x, total, total)
        for row, total in enumerate(body.sums):
            zeros = body.temporary()
            body.emit("vpbroadcastd", body.x.at((WORDS * self.rows + row) * WORD), zeros)
            body.emit("vpsubw", zeros, total, total)
            body.emit("vpmaddwd", body.ones, total, total)

    def scale(self, body: _Body) -> None:
        scales = body.temporary()
        body.emit("vcvtph2ps", "(%rsi)", scales)
        first = self.group_bytes - self.rows * 4
        for row, total in enumerate(body.sums):
            factor = body.temporary()
            if factor == scales:
                factor = body.temporary()
            at = self.sum(row)
            body.emit("vbroadcastss", body.x.at(first + row * 4), factor)
            body.emit("vcvtdq2ps", total, total)
            body.emit("vmulps", scales, factor, factor)
            body.emit("vfmadd213ps", at, factor, total)
            body.emit("vmovups", total, at)


class _Stream:
    """What is read in order through a pointer that moves on before a displacement gets too long."""

    def __init__(self, lines: list[str], register: str) -> None:
        self.lines, self.register, self.base = lines, register, 0

    def at(self, offset: int) -> str:
        if not 0 <= offset - self.base < 2 * NEAR:
            self.skip_to(offset // NEAR * NEAR)
        return f"{offset - self.base - NEAR}({self.register})"

    def skip_to(self, offset: int) -> None:
        if offset != self.base:
            self.lines.append(f"add ${offset - self.base}, {self.register}")
        self.base = offset


class _Body:
    """Instructions of one group. Registers: the rows' sums, those that are taken, then temporaries, last ones (i16)."""

    def __init__(self, rows: int) -> None:
        self.lines: list[str] = []
        self.x, self.weights = _Stream(self.lines, "%rdi"), _Stream(self.lines, "%rdx")
        self.sums = [f"%ymm{i}" for i in range(rows)]
        self.ones = "%ymm15"
        self.taken, self.turn = rows, 0

    def take(self) -> str:
        self.taken += 1
        return f"%ymm{self.taken - 1}"

    def temporary(self) -> str:
        """The next of those that are free, in turn."""
        self.turn += 1
        return f"%ymm{self.taken + self.turn % (15 - self.taken)}"

    def emit(self, op: str, *operands: str) -> None:
        self.lines.append(f"{op} {', '.join(operands)}")
