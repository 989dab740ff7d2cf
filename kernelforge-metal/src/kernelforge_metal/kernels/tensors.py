"""Tensors in a shader: how an element of any layout is found, loaded and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.problem import Dim, Problem, TensorType
from kernelforge.variant import Accept, Reject
from kernelforge_metal import wgsl
from kernelforge_metal.dtypes import DTYPES
from kernelforge_metal.kernel import Binding, Size, is_value

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo, Verdict


@dataclass(frozen=True)
class Tensor:
    """An operand or result in a shader, read and written element by element."""

    name: str
    type: TensorType
    index: int
    at: str
    """Where it starts, as an expression."""
    device: DeviceInfo
    writes: bool

    @property
    def packed(self) -> bool:
        """Whether elements share a word."""
        dtype = self.type.dtype
        return dtype in ("bf16", "q8") or (dtype == "f16" and wgsl.F16 not in self.device.features)

    @property
    def binding(self) -> Binding:
        """Halves of a word are written by different threads: atomically."""
        element = "atomic<u32>" if self.packed and self.writes else wgsl.element(self.type.dtype, self.device)
        return Binding(self.name, self.index, element)

    def load(self, offset: str) -> str:
        """An f32 (of i32: i32) expression: the element `offset` elements from the tensor's start."""
        where = f"({self.at} + {offset})"
        return wgsl.load(self.name, self.type.dtype, self.device, where)

    def store(self, offset: str, value: str) -> str:
        """A statement that stores an f32 (of i32: i32) expression."""
        where = f"{self.at} + {offset}"
        if not self.packed:
            value = f"f16({value})" if self.type.dtype == "f16" else value
            return f"{self.name}[{where}] = {value};"
        bits = f"bf16_bits({value})" if self.type.dtype == "bf16" else f"f16_bits(vec2<f32>({value}, 0.0))"
        word, shift = f"{self.name}[(({where}) >> 1u)]", f"((({where}) & 1u) << 4u)"
        return (
            f"{{ let bits = {bits}; atomicAnd(&{word}, 0xffff0000u >> {shift}); atomicOr(&{word}, bits << {shift}); }}"
        )


def tensor(problem: Problem, index: int, name: str, device: DeviceInfo) -> Tensor:
    """Operand or result `index` (operands first) of the problem."""
    operands = len(problem.operands)
    found = problem.operand(index) if index < operands else problem.results[index - operands]
    at = f"p.{name}_at" if is_value(problem, index) and not found.quantised else "0u"  # quantised values have no views
    return Tensor(name, found, index, at, device, index >= operands)


def takes(problem: Problem, device: DeviceInfo, dtypes: Sequence[str] = DTYPES) -> Verdict:
    """Of kernels that take any layout of `dtypes`."""
    for t in (*problem.operands, *problem.results):
        if t is not None and t.dtype not in dtypes:
            return Reject(f"takes {', '.join(dtypes)}, not {t.dtype}")
        if t is not None and t.strides is None and t.row_major_strides() is None:
            return Reject(f"takes strides that are known when it is built, not those of {t}")
        if (
            t is not None
            and t.constant
            and t.static
            and t.nbytes() > device.limit("max-storage-buffer-binding-size", 1 << 27)
        ):
            return Reject(f"a constant of {t.nbytes() >> 20} MiB is more than one binding of the device may hold")
    return Accept()


def dim_text(problem: Problem, dim: Dim) -> str:
    """A size as a u32 expression."""
    return f"{dim}u" if isinstance(dim, int) else f"p.d{problem.dims.index(dim)}"


def product_text(problem: Problem, dims: Sequence[Dim]) -> str:
    """The product of sizes as a u32 expression."""
    static = 1
    for d in dims:
        static *= d if isinstance(d, int) else 1
    names = [dim_text(problem, d) for d in dims if isinstance(d, str)]
    return " * ".join([f"{static}u", *names]) if static != 1 or not names else " * ".join(names)


def count(problem: Problem, dims: Sequence[Dim]) -> Size:
    """The product of sizes, for the host."""
    order = problem.dims

    def counted(sizes: Sequence[int]) -> int:
        total = 1
        for d in dims:
            total *= d if isinstance(d, int) else sizes[order.index(d)]
        return total

    return counted(()) if all(isinstance(d, int) for d in dims) else counted


def offsets(problem: Problem, shape: Sequence[Dim], tensors: Sequence[TensorType], index: str) -> tuple[str, list[str]]:
    """Statements that take the row-major `index` over `shape` apart, and the offset of that element in each tensor.

    A tensor of lower rank, or with a size of 1 where `shape` has another, is broadcast.
    """
    if all(t.shape == tuple(shape) and t.contiguous for t in tensors):
        return "", [index] * len(tensors)
    lines = [f"var rest = {index};"]
    for axis in range(len(shape) - 1, -1, -1):
        if axis == 0:
            lines.append("let c0 = rest;")
        else:
            size = dim_text(problem, shape[axis])
            lines += [f"let c{axis} = rest % {size};", f"rest = rest / {size};"]
    found = []
    for t in tensors:
        first = len(shape) - t.rank
        terms = [
            f"c{first + axis} * {stride}u"
            for axis, (size, stride) in enumerate(zip(t.shape, t.element_strides(), strict=True))
            if size == shape[first + axis] and stride != 0 and size != 1
        ]
        found.append(f"({' + '.join(terms)})" if terms else "0u")
    return "\n  ".join(lines), found
