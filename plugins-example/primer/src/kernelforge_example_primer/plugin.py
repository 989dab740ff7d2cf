"""The dialect `primer`, and a kernel for its op on the target `cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.descriptors import DialectSpec
from kernelforge.hookspecs import hookimpl
from kernelforge.problem import Problem
from kernelforge.variant import KernelVariant
from kernelforge_cpu.authoring import extent, kernel

if TYPE_CHECKING:
    from kernelforge_cpu.emit import KernelBuilder, Value


@kernel(op="primer.squared_relu", dtypes=("f32", "bf16", "f16"), language="mlir", space={"unroll": (2, 1, 4)})
def vectorized(k: KernelBuilder, problem: Problem, *, unroll: int) -> None:
    """vectors of any of the float types, computed in f32"""
    t, lanes = problem.operand(0), unroll * k.lanes
    x, out = k.buffer(0, t.dtype), k.buffer(1, t.dtype)

    def body(i: Value, valid: Value | None) -> None:
        positive = k.max(0.0, x.load_f32(i, lanes, valid=valid))  # in this order a NaN stays one
        out.store(k.convert(positive * positive, t.dtype), i, valid=valid)

    k.vectorize(*k.share(extent(k, problem, *t.shape), grain=lanes), body, lanes=lanes)


@hookimpl
def kernelforge_dialects() -> list[DialectSpec]:
    return [DialectSpec("primer", "kernelforge_example_primer.ops:OPS", "Ops of Primer (So et al. 2021).")]


@hookimpl
def kernelforge_kernels() -> list[KernelVariant]:
    return [vectorized]
