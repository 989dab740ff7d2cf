"""What a GEMV kernel multiplies by its weights, read four numbers at a time whatever its type and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_metal.kernel import Binding
from kernelforge_metal.kernels.matmul.common import start_of
from kernelforge_metal.kernels.matmul.numbers import floats, vector_element
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
