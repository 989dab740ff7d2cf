"""What a thread of a GEMV does with a unit of weights: multiply it as floats, or in integers.

Bytes take a fraction of the instructions of floats, so that four bits are read as fast as memory delivers them. A thread makes
integers of its part of lhs in registers, which pays when it has many columns to multiply it by.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelforge_metal.kernels.matmul.gemv_kernel import Gemv
from kernelforge_metal.kernels.matmul.integers import INTEGERS, UNIT
from kernelforge_metal.kernels.matmul.numbers import Q4, Q8, floats
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads


class FloatGemv(Gemv):
    """The text of a GEMV kernel that multiplies floats."""

    @property
    def functions(self) -> str:
        return {"q8": Q8, "q4": Q4}.get(self.weights.dtype, "")

    def lhs(self, i: int) -> Iterator[tuple[str, str]]:
        yield from ((f"x{i}_{m}_{j}", "vec4<f32>") for m in range(self.rows) for j in range(self.vectors))

    def numbers(self, i: int) -> Iterator[str]:
        yield from self.loaded(i)

    def multiplied(self, i: int) -> Iterator[str]:
        yield from self._quads(i) if isinstance(self.weights, Quads) else self._floats(i)

    def _floats(self, i: int) -> Iterator[str]:
        dtype = self.weights.dtype
        for n in range(len(self.names)):
            for c in range(self.columns):
                word = f"w{i}_{n}_{c}"
                parts = [word] if dtype == "f32" else [floats(f"{word}.xy", dtype), floats(f"{word}.zw", dtype)]
                for m in range(self.rows):
                    for j, part in enumerate(parts):
                        yield f"{self.sum(n, m, c)} += dot(x{i}_{m}_{j}, {part});"

    def _quads(self, i: int) -> Iterator[str]:
        for n in range(len(self.names)):
            for c in range(self.columns):
                word, scale = self.word(i, n, c)
                yield "{"
                if self.vectors == 1:
                    yield f"let a = q8_numbers({word});"
                else:
                    for j in range(4):
                        yield f"let h{j} = q4_numbers({word} >> {4 * j}u);"
                    yield "let a = vec4<f32>(h0.x, h2.x, h0.y, h2.y); let b = vec4<f32>(h1.x, h3.x, h1.y, h3.y);"
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    product = f"dot(x{i}_{m}_0, a)" + (f" + dot(x{i}_{m}_1, b)" if self.vectors == 2 else "")
                    yield f"{z} = fma({scale}, {product}, {z});"
                yield "}"


class IntegerGemv(Gemv):
    """The text of a GEMV kernel that multiplies in integers."""

    @property
    def functions(self) -> str:
        assert isinstance(self.weights, Quads)
        whole = "".join(self.weights.functions(name) for name in self.names)
        return INTEGERS + UNIT[self.weights.dtype] + whole

    def start(self) -> Iterator[str]:
        yield from super().start()
        yield from (f"var odd{m} = false;" for m in range(self.rows))

    def lhs(self, i: int) -> Iterator[tuple[str, str]]:
        yield from ((f"d{i}_{m}", "Digits") for m in range(self.rows))

    def numbers(self, i: int) -> Iterator[str]:
        for m in range(self.rows):
            yield from (f"var x{i}_{m}_{j}: vec4<f32>;" for j in range(self.vectors))
        yield from self.loaded(i)
        for m in range(self.rows):
            numbers = ", ".join(f"x{i}_{m}_{j}" for j in range(self.vectors))
            yield f"d{i}_{m} = integers({numbers}); odd{m} = odd{m} || d{i}_{m}.odd;"

    def multiplied(self, i: int) -> Iterator[str]:
        for n in range(len(self.names)):
            for c in range(self.columns):
                word, scale = self.word(i, n, c)
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    yield f"{z} = fma(product(d{i}_{m}, {word}), {scale}, {z});"

    def tile_end(self) -> Iterator[str]:
        for m in range(self.rows):
            yield f"if (odd{m}) {{"
            yield from self._odd_numbers(m)
            yield "}"

    def _odd_numbers(self, row: int) -> Iterator[str]:
        """Add the products of what has no digits."""
        gain = "" if self.product.gain is None else " * gain_four(0u, {place})"
        yield f"for (var unit = t; unit < {self.weights.units}u; unit += {self.threads}u) {{"
        for j in range(self.vectors):
            place = f"{self.vectors}u * unit + {j}u"
            yield f"let x{j} = x_four({row}u, {place}){gain.format(place=place)};"
        most = "max(magnitude(x0), magnitude(x1))" if self.vectors == 2 else "magnitude(x0)"
        yield f"if (!odd_unit({most})) {{ continue; }}"
        yield f"for (var j = 0u; j < {self.weights.steps}u; j++) {{"
        yield "var four = x0;" + (" if (j >= 4u) { four = x1; }" if self.vectors == 2 else "")
        yield "let x = four[j & 3u];"
        yield "if (odd_number(x)) {"
        for n, name in enumerate(self.names):
            for c in range(self.columns):
                column = f"{QUAD}u * quad{c // QUAD} + {c % QUAD}u"
                yield f"{self.sum(n, row, c)} += x * {name}_at({column}, {self.weights.steps}u * unit + j);"
        yield "} } }"
