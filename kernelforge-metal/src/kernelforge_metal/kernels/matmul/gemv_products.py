"""What a thread of a GEMV does with a unit of weights: multiply it as floats, or in integers.

Bytes take a fraction of the instructions of floats, so that four bits are read as fast as memory delivers them. A thread makes
integers of its part of a lhs of floats in registers, which pays when it has many columns to multiply it by; one of q8a has them.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelforge.dtype import GROUP
from kernelforge_metal.kernels.matmul.gemv_kernel import MAX_KEPT, Gemv
from kernelforge_metal.kernels.matmul.integers import INTEGERS, UNIT
from kernelforge_metal.kernels.matmul.numbers import Q4, Q8, floats
from kernelforge_metal.kernels.matmul.vectors import Groups
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads
from kernelforge_metal.kernels.quantiser import LARGEST


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
                word, scale = self.word(i, n, c), self.scale(i, n, c)
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
        return LARGEST + INTEGERS + UNIT[self.weights.dtype] + whole

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
                word, scale = self.word(i, n, c), self.scale(i, n, c)
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
        most = "max(largest_bits(x0), largest_bits(x1))" if self.vectors == 2 else "largest_bits(x0)"
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


class Bytes(Gemv):
    """The text of a GEMV kernel that multiplies int8 of groups: the sum of a unit's products is an integer, which both scales
    multiply."""

    lhs_first = True

    def lhs(self, i: int) -> Iterator[tuple[str, str]]:
        for m in range(self.rows):
            yield f"d{i}_{m}", "f32"
            yield from ((f"x{i}_{m}_{j}", "u32") for j in range(self.vectors))
            if self._offset:
                yield f"eights{i}_{m}", "i32"

    @property
    def _offset(self) -> bool:
        """Whether weights are stored plus 8."""
        return self.weights.dtype == "q4"

    def eights(self, i: int) -> Iterator[str]:
        """What that adds to the sums of unit `i`."""
        for m in range(self.rows if self._offset else 0):
            sums = " + ".join(f"dot4I8Packed(x{i}_{m}_{j}, 0x08080808u)" for j in range(self.vectors))
            yield f"eights{i}_{m} = {sums};"

    def multiplied(self, i: int) -> Iterator[str]:
        for n in range(len(self.names)):
            for c in range(self.columns):
                scale = self.scale(i, n, c)
                yield "{"
                parts = []
                for s in range(self.span):
                    word = self.word(i, n, c, s)
                    if self._offset:
                        yield f"let low{s} = {word} & 0x0f0f0f0fu; let high{s} = ({word} >> 4u) & 0x0f0f0f0fu;"
                        parts += [f"low{s}", f"high{s}"]
                    else:
                        parts.append(word)
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    dots = [f"dot4I8Packed({part}, x{i}_{m}_{j})" for j, part in enumerate(parts)]
                    product = " + ".join(dots) + (f" - eights{i}_{m}" if self._offset else "")
                    yield f"{z} = fma(f32({product}) * {scale}, d{i}_{m}, {z});"  # scale * d may be subnormal
                yield "}"


class ByteGemv(Bytes):
    """The same for a lhs in q8a."""

    @property
    def functions(self) -> str:
        return ""

    @property
    def max_kept(self) -> int:
        return 4 * MAX_KEPT

    @property
    def x(self) -> Groups:
        return Groups(self.product)

    def numbers(self, i: int) -> Iterator[str]:
        for m in range(self.rows):
            yield f"d{i}_{m} = x_scale({m}u, u{i} / {GROUP // self.steps}u);"
            if self.vectors == 1:
                yield f"x{i}_{m}_0 = x_eight({m}u, u{i} >> 1u)[u{i} & 1u];"
            for j in range(self.vectors // 2):
                yield f"let p{i}_{m}_{j} = x_eight({m}u, {self.vectors // 2}u * u{i} + {j}u);"
                yield f"x{i}_{m}_{2 * j} = p{i}_{m}_{j}.x; x{i}_{m}_{2 * j + 1} = p{i}_{m}_{j}.y;"
        yield from self.eights(i)


QUANTISED = """
fn step_of(largest: u32) -> f32 {
  let step = select(bitcast<u32>(bitcast<f32>(largest) / 127.0), 0u, largest < 0x03fe0000u);
  return bitcast<f32>(select(step, 0x7fc00000u, largest >= 0x7f800000u));
}
fn inverse_of(step: f32, largest: u32) -> f32 {
  return select(0.0, 1.0 / step, largest >= 0x03fe0000u && largest < 0x7f800000u);
}
fn bytes(x: vec4<f32>, inverse: f32) -> u32 {
  let n = bitcast<vec4<u32>>(fma(x, vec4<f32>(inverse), vec4<f32>(12582912.0))) & vec4<u32>(0xffu);
  return n.x | (n.y << 8u) | (n.z << 16u) | (n.w << 24u);
}
"""
"""`step_of`: the scale d of a group whose largest magnitude has these bits: 0 where it would be subnormal, NaN beside NaN or
infinity. `bytes`: four numbers over d; adding 1.5 * 2^23 rounds them and leaves them in the last bits."""


class QuantisingGemv(Bytes):
    """The same for a lhs of floats, which its threads quantise: neighbours share a group, and what is largest in it. Threads of a
    workgroup of one dimension are taken to be lanes of its subgroups in their order, as on all GPUs known.

    A norm's scale is the same for numbers and steps: sums are multiplied by it at the end.
    """

    @property
    def functions(self) -> str:
        return LARGEST + QUANTISED

    def lhs(self, i: int) -> Iterator[tuple[str, str]]:
        yield from ((f"f{i}_{m}_{j}", "vec4<f32>") for m in range(self.rows) for j in range(self.vectors))
        yield from super().lhs(i)

    def numbers(self, i: int) -> Iterator[str]:
        yield from self.loaded(i, "f")

    def prepared(self, i: int) -> Iterator[str]:
        for m in range(self.rows):
            most = f"most{i}_{m}"
            yield f"var {most} = largest_bits(f{i}_{m}_0);"
            yield from (f"{most} = max({most}, largest_bits(f{i}_{m}_{j}));" for j in range(1, self.vectors))
            for apart in (2**n for n in range((GROUP // self.steps).bit_length() - 1)):
                yield f"{most} = max({most}, subgroupShuffleXor({most}, {apart}u));"
            yield f"d{i}_{m} = step_of({most}); let inverse{i}_{m} = inverse_of(d{i}_{m}, {most});"
            yield from (f"x{i}_{m}_{j} = bytes(f{i}_{m}_{j}, inverse{i}_{m});" for j in range(self.vectors))
        yield from self.eights(i)
