"""What a GEMV kernel multiplies by its weights, read four numbers at a time whatever its type and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP
from kernelforge_metal.kernel import Binding
from kernelforge_metal.kernels.matmul.common import start_of
from kernelforge_metal.kernels.matmul.numbers import floats, vector_element
from kernelforge_metal.kernels.quantised_activations import GROUP_WORDS
from kernelforge_metal.wgsl import element, load

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_metal.kernels.matmul.geometry import Product


@dataclass(frozen=True)
class Vectors:
    """Rows of lhs, or the gain of their norm, which is one row for all."""

    product: Product
    device: DeviceInfo
    name: str
    """Of the array; the function is `<name>_four`."""
    index: int
    """Of the operand."""
    step: int
    """From one number of a row to the next."""
    row: int
    """From one row to the next."""
    covered: int
    """Steps that may be asked for, of which those past the end of a row are zeros."""

    @property
    def dtype(self) -> str:
        return self.product.problem.operand(self.index).dtype

    @property
    def wide(self) -> bool:
        """Whether four numbers are one load."""
        return self.step == 1 and self.product.inner % 4 == 0 and self.row % 4 == 0

    @property
    def binding(self) -> Binding:
        return Binding(
            self.name, self.index, vector_element(self.dtype) if self.wide else element(self.dtype, self.device)
        )

    @property
    def function(self) -> str:
        """`<name>_four(row, i)`: the numbers 4 i to 4 i + 3 of a row."""
        g, head = self.product, f"fn {self.name}_four(row: u32, i: u32) -> vec4<f32> {{"
        start = f"{start_of(g.problem, self.index, self.name)} + row * {self.row}u"
        if self.wide:
            guard = f"if (i >= {g.inner // 4}u) {{ return vec4<f32>(); }} " if self.covered > g.inner else ""
            return f"{head} {guard}return {floats(f'{self.name}[(({start}) >> 2u) + i]', self.dtype)}; }}\n"
        lines = [head, "  var v = vec4<f32>();"]
        for j, lane in enumerate("xyzw"):
            read = load(self.name, self.dtype, self.device, f"{start} + (4u * i + {j}u) * {self.step}u")
            lines.append(f"  if (4u * i + {j}u < {g.inner}u) {{ v.{lane} = {read}; }}")
        return "\n".join([*lines, "  return v;", "}\n"])


GROUP_PAIRS = GROUP_WORDS // 2
"""The scale and two sums, then the int8."""


@dataclass(frozen=True)
class Groups:
    """Rows of lhs in q8a, as `kernelforge.quant` lays them out."""

    product: Product

    @property
    def binding(self) -> Binding:
        return Binding("x", 0, "vec2<u32>")

    @property
    def function(self) -> str:
        """`x_scale(row, g)`: the scale of group `g` of a row; `x_eight(row, i)`: the int8 of elements 8 i to 8 i + 7."""
        start = f"(row * {self.product.rows.lhs // GROUP}u + {{}}) * {GROUP_PAIRS}u"
        return (
            f"fn x_scale(row: u32, g: u32) -> f32 {{ return bitcast<f32>(x[{start.format('g')}].x); }}\n"
            f"fn x_eight(row: u32, i: u32) -> vec2<u32> {{ return x[{start.format('(i >> 2u)')} + 1u + (i & 3u)]; }}\n"
        )
