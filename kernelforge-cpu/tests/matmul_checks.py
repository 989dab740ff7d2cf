"""Runs matrix products alone, packed and with scratch, and compares them with a float64 formula of their own."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence

import numpy as np
from kernel_checks import F32, PARTS, Array, Arrays, Memory, assert_close, problem

from kernelforge.dtype import to_numpy
from kernelforge.machine import probe
from kernelforge.problem import Problem
from kernelforge.quant import dequantize, quantize
from kernelforge.variant import Accept, Config, DeviceInfo, KernelVariant
from kernelforge_cpu.isa import host_target, host_targets
from kernelforge_cpu.jit import KERNEL, compile_object, load
from kernelforge_cpu.kernel import NativeKernel
from kernelforge_cpu.kernels.matmul import VARIANTS
from kernelforge_cpu.store import address, aligned_empty

WIDTHS = sorted({t.lanes for t in host_targets()})
"""Vector widths in f32 lanes that this machine runs."""

BY_NAME: dict[tuple[str, str], KernelVariant] = {(v.op.partition(".")[2], v.name): v for v in VARIANTS}


def device(lanes: int | None = None, threads: int = 2, l2_bytes: int = 1 << 20, core: str = "another") -> DeviceInfo:
    limits = (("l2_bytes", l2_bytes), ("vector_bytes", 4 * (lanes or host_target().lanes)))
    return DeviceInfo("cpu", "test", "test", probe().features | {core}, limits, threads)


def variant(p: Problem, name: str) -> KernelVariant:
    return BY_NAME[p.op.partition(".")[2], name]


class Products:
    """Kernels of some problems, compiled together."""

    def __init__(
        self,
        cases: Sequence[tuple[Problem, Config | None]],
        name: str = "vectorized",
        lanes: int | None = None,
        core: str = "another",
    ) -> None:
        self.kernels: list[NativeKernel] = []
        info = device(lanes, core=core)
        for p, config in cases:
            v, canonical = variant(p, name), p.canonical()
            assert v.judge(canonical, info) == Accept(), p
            chosen = v.default_config(canonical, info) if config is None else config
            self.kernels.append(v.build_kernel(canonical, chosen, info))
        self.cases = [p for p, _ in cases]
        texts = [text for text in dict.fromkeys(k.text for k in self.kernels) if text]
        self.library = load([compile_object("\n".join(texts))])

    def run(self, index: int, arrays: Arrays, sizes: Mapping[str, int] | None = None, parts: int = 1) -> Array:
        """The result, whose memory was poisoned; asserts that nothing else is written."""
        p, kernel = self.cases[index], self.kernels[index]
        static = p.with_dims(sizes or {})
        operands: list[Memory | None] = []
        addresses: list[int] = []
        packed: list[Array] = []
        for i, (t, array) in enumerate(zip(static.operands, arrays, strict=True)):
            if t is None or array is None:
                addresses.append(0)
                continue
            if i in kernel.packs:
                packed.append(np.ascontiguousarray(kernel.packs[i].pack(array)))
                addresses.append(address(packed[-1]))
                continue
            memory = Memory(t)
            memory.fill(array)
            operands.append(memory)
            addresses.append(memory.address)
        out = Memory(static.results[0])
        dims = [(sizes or {})[d] for d in p.dims]
        before = [a.tobytes() for a in packed]
        size = kernel.scratch(dims, 2)
        scratch = aligned_empty(size + 256)
        scratch[:] = 0xFF
        addresses += [out.address, *(address(t) for t in kernel.tables), address(scratch)]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        numbers = (ctypes.c_int64 * (len(dims) + 1))(*dims, 0)
        for phase in kernel.phases:
            function = phase.function
            call = KERNEL(function if isinstance(function, int) else self.library.address(function))
            for part in reversed(range(parts)):  # any order must do
                call(ctypes.addressof(pointers), ctypes.addressof(numbers), part, parts)
        assert all(m is None or m.untouched() for m in operands), "an operand was written"
        assert [a.tobytes() for a in packed] == before, "a packed constant was written"
        assert (scratch[size:] == 0xFF).all(), "written after the scratch"
        assert out.only_written_inside(), "written outside the result"
        return out.array.copy()

    def check(
        self,
        index: int,
        sizes: Mapping[str, int] | None = None,
        arrays: Arrays | None = None,
        parts: Sequence[int] = PARTS,
    ) -> None:
        p = self.cases[index].with_dims(sizes or {})
        arrays = inputs(p) if arrays is None else arrays
        exact, error = expected(p, arrays)
        first = None
        for n in parts:
            got = self.run(index, arrays, sizes, n)
            assert_close(got, exact, error, p.results[0].dtype, f"{p} in {n} parts")
            first = got if first is None else first
            np.testing.assert_array_equal(got, first, err_msg=f"{p}: {n} parts differ from {parts[0]}")


def inputs(p: Problem, seed: int = 7) -> list[Array | None]:
    rng = np.random.default_rng(seed)
    normal = [None if t is None else rng.standard_normal(t.static_shape()) for t in p.operands]
    return [
        None if a is None or t is None else quantize(a, t.dtype) if t.quantised else a.astype(to_numpy(t.dtype))
        for a, t in zip(normal, p.operands, strict=True)
    ]


def expected(p: Problem, arrays: Arrays) -> tuple[Array, Array]:
    """The result in float64, and how far a result computed in f32 may be from it before it is rounded to its type.

    A sum of n products, each rounded once (fused or not), in any order: at most (n + 1) roundings of the sum of their
    magnitudes (Higham 2002, section 3.1). The slope of an activation is at most 1.13; it is computed to a few roundings
    of its argument and value.
    """
    wide = [
        None if a is None else (dequantize(a) if t is not None and t.quantised else a).astype(np.float64)
        for a, t in zip(arrays, p.operands, strict=True)
    ]

    def product(i: int) -> tuple[Array, Array]:
        x, y = wide[0], wide[i]
        assert x is not None
        assert y is not None
        x = x.swapaxes(-1, -2) if dict(p.attrs).get("transpose_lhs") else x
        y = y.swapaxes(-1, -2) if p.attr("transpose_rhs") else y
        with np.errstate(all="ignore"):
            return np.matmul(x, y), (x.shape[-1] + 2) * F32 * np.matmul(np.abs(x), np.abs(y))

    with np.errstate(all="ignore"):
        if p.op == "transformer.glu_matmul":
            (gate, gate_error), (up, up_error) = product(1), product(2)
            value, error = activated(str(p.attr("activation")), gate, gate_error)
            return value * up, np.abs(value) * up_error + (np.abs(up) + up_error) * error + F32 * np.abs(value * up)
        total, error = product(1)
        if wide[2] is not None:
            total, error = total + wide[2], error + F32 * (np.abs(total) + np.abs(wide[2]))
        total, error = activated(str(p.attr("epilogue")), total, error)
        if wide[3] is not None:
            total, error = total + wide[3], error + F32 * (np.abs(total) + np.abs(wide[3]))
    return total, error


def activated(name: str, x: Array, error: Array) -> tuple[Array, Array]:
    if name == "none":
        return x, error
    if name == "silu":
        y = x / (1 + np.exp(-x))
    elif name == "gelu":
        y = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))), otypes=[np.float64])(x)
    else:
        y = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y, 1.13 * error + 6 * F32 * (np.abs(x) + np.abs(y))


def matmul(lhs: str, rhs: str, bias: str = "", residual: str = "", **attrs: bool | str) -> Problem:
    return problem("matmul", lhs, rhs, bias, residual, **attrs)
