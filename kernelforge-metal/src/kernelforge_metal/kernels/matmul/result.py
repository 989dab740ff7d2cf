"""From a sum to an element of the result: bias, activation, residual or gated product, and the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_metal.kernel import Binding, is_value
from kernelforge_metal.wgsl import activation, element, load

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_metal.kernels.matmul.geometry import Product


@dataclass(frozen=True)
class Result:
    """act(sum + bias) + residual, or act(gate) * up, stored `vector` columns at a time."""

    product: Product
    device: DeviceInfo
    vector: int
    """1 or 4; f32 alone is stored one by one, as two numbers of 16 bits share a word."""

    @property
    def dtype(self) -> str:
        return self.product.problem.results[0].dtype

    @property
    def bindings(self) -> list[Binding]:
        g = self.product
        found = []
        for name, index in (("bias", g.bias), ("residual", g.residual)):
            if index is not None:
                found.append(Binding(name, index, element(g.problem.operand(index).dtype, self.device)))
        kind = "f32" if self.vector == 1 else "vec4<f32>" if self.dtype == "f32" else "vec2<u32>"
        return [*found, Binding("y", g.out, kind)]

    @property
    def functions(self) -> str:
        """`finish(v, batch, row, column)`, which applies all but the gate's product, and `store(batch, row, column, v)`."""
        g = self.product
        value = "v"
        if g.bias is not None:
            value += f" + {self._load('bias', g.bias, f'column * {g.problem.operand(g.bias).element_strides()[0]}u')}"
        if g.activation != "none":
            value = f"activate({value})"
        if g.residual is not None:
            step, line = g.problem.operand(g.residual).element_strides()[-1], self._line("residual")
            value += f" + {self._load('residual', g.residual, f'{line} + column * {step}u')}"
        at = f"p.y_at + {self._line('out')} + column"
        if self.vector == 1:
            kind, store = "f32", f"y[{at}] = v;"
        else:
            words = {
                "f32": "v",
                "f16": "vec2<u32>(f16_bits(v.xy), f16_bits(v.zw))",
                "bf16": "vec2<u32>(bf16_bits(v.x) | bf16_bits(v.y) << 16u, bf16_bits(v.z) | bf16_bits(v.w) << 16u)",
            }
            kind, store = "vec4<f32>", f"y[({at}) >> 2u] = {words[self.dtype]};"
        return (
            f"{activation(g.activation)}"
            f"fn finish(v: f32, batch: u32, row: u32, column: u32) -> f32 {{ return {value}; }}\n"
            f"fn store(batch: u32, row: u32, column: u32, v: {kind}) {{ {store} }}\n"
        )

    def finished(self, sums: list[str], row: str, column: str) -> str:
        """The value from the sum, or from those of gate and up."""
        value = f"finish({sums[0]}, batch, {row}, {column})"
        return value if len(sums) == 1 else f"{value} * {sums[1]}"

    def _load(self, name: str, index: int, offset: str) -> str:
        start = f"p.{name}_at + " if is_value(self.product.problem, index) else ""
        return load(name, self.product.problem.operand(index).dtype, self.device, start + offset)

    def _line(self, name: str) -> str:
        """Where a row starts."""
        axes = [("batch", b) for b in self.product.batches] + [("row", self.product.rows)]
        return " + ".join(f"{variable} * {getattr(axis, name)}u" for variable, axis in axes)


def stored_columns(product: Product) -> int | None:
    """How many columns of the result are stored together: four where every row starts at a multiple of four; None where
    two rows would share a word."""
    strides = [product.rows.out, *(b.out for b in product.batches)]
    if product.columns % 4 == 0 and all(s % 4 == 0 for s in strides):
        return 4
    return 1 if product.problem.results[0].dtype == "f32" else None
