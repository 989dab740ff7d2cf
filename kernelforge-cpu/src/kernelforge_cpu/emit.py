"""Kernel text: a builder that writes MLIR at the vector level (func, scf, arith, math, vector, llvm).

    k = KernelBuilder("scale_f32", target)            # target: a kernelforge_cpu.isa.CpuTarget
    x, y, n = k.buffer(0, "bf16"), k.buffer(1, "f32"), k.dim(0)
    lo, hi = k.share(n, grain=k.lanes)                # what this part of the parts does of n elements

    def body(i, valid):                               # full vectors: valid is None; the tail: its number of lanes
        y.store(x.load_f32(i, k.lanes, valid=valid) * 2.0, i, valid=valid)

    k.vectorize(lo, hi, body)
    text = k.text()                                   # module_text(k1, k2, ...) for several kernels in one object

Every kernel is `void kernel(void** buffers, int64_t* dims, int64_t part, int64_t parts)`. Text, not Python op
objects: it is several times faster to make and is itself the key of the object cache. Nothing is contracted or
reassociated but where it is asked for (`fma`, `reduce_add`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kernelforge_cpu.builder import Builder
from kernelforge_cpu.pointer import Pointer
from kernelforge_cpu.ssa import F32, I1, I32, I64, PTR, Function, Type, Value, vec

if TYPE_CHECKING:
    from kernelforge_cpu.isa import CpuTarget

__all__ = [
    "F32",
    "I1",
    "I32",
    "I64",
    "PTR",
    "Builder",
    "Function",
    "KernelBuilder",
    "Pointer",
    "Type",
    "Value",
    "module_text",
    "vec",
]


class KernelBuilder(Builder):
    """One kernel and its private functions."""

    def __init__(self, name: str, target: CpuTarget) -> None:
        super().__init__(target, (PTR, PTR, I64, I64))
        self.name = name
        self.functions: dict[str, str] = {}
        self.buffers, self.dims, self.part, self.parts = self.params

    def buffer(self, index: int, element: str) -> Pointer:
        """The address of buffer `index`, counted in elements of type `element`."""
        at = self.buffers
        if index:
            at = self.at_entry(f"llvm.getelementptr {at.name}[{index}] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr", PTR)
        loaded = self.at_entry(f"llvm.load {at.name} {{alignment = 8 : i64}} : !llvm.ptr -> !llvm.ptr", PTR)
        return Pointer(self, loaded.name, element)

    def dim(self, index: int) -> Value:
        """The value of dynamic dimension `index` (i64)."""
        at = self.dims
        if index:
            at = self.at_entry(f"llvm.getelementptr {at.name}[{index}] : (!llvm.ptr) -> !llvm.ptr, i64", PTR)
        return self.at_entry(f"llvm.load {at.name} {{alignment = 8 : i64}} : !llvm.ptr -> i64", I64)

    def function(
        self, name: str, params: Sequence[Type], write: Callable[..., Sequence[Value]], *, inline: bool = True
    ) -> Function:
        """A private function: `write(builder, *params)` writes its body into its own builder and returns its results.
        Kernels of one module share functions of the same name, which must then have the same text. One that is never
        inlined keeps the loops around its calls quick to compile.
        """
        inner = Builder(self.target, params)
        results = list(write(inner, *inner.params))
        types = tuple(v.type for v in results)
        arguments = ", ".join(f"{p.name}: {p.type}" for p in inner.params)
        header = f"func.func private @{name}({arguments}) -> ({', '.join(map(str, types))})"
        attributes = "llvm.linkage = #llvm.linkage<internal>" + ("" if inline else ", llvm.no_inline")
        self.functions[name] = f"{header} attributes {{{attributes}}} {{\n{inner.body(results)}\n}}"
        return Function(name, tuple(params), types)

    def share(self, n: Value | int, grain: int = 1) -> tuple[Value, Value]:
        """`split` of 0..n by this kernel's own part and parts."""
        return self.split(n, self.part, self.parts, grain)

    def text(self) -> str:
        """This kernel as a module."""
        return module_text(self)


def module_text(*kernels: KernelBuilder) -> str:
    """Several kernels as one module, which compiles to one object. Raises ValueError if two functions share a name
    but not a text.
    """
    functions: dict[str, str] = {}
    for k in kernels:
        header = f"func.func @{k.name}(%arg0: !llvm.ptr, %arg1: !llvm.ptr, %arg2: i64, %arg3: i64)"
        for name, text in {**k.functions, k.name: f"{header} {{\n{k.body()}\n}}"}.items():
            if functions.setdefault(name, text) != text:
                raise ValueError(f"two different functions are named {name!r}")
    return "\n".join(functions.values()) + "\n"
