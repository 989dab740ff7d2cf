"""Runs kernels alone: many problems compiled as one object, poisoned results, guard bands, unaligned and strided memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import FLOATS, epsilon, from_numpy, to_numpy
from kernelforge.lazy import resolve
from kernelforge.op import OpDef
from kernelforge.problem import Attr, Problem, TensorType, parse_tensor_type
from kernelforge.quant import widened
from kernelforge.variant import Accept, Config, DeviceInfo, KernelVariant, Verdict
from kernelforge_cpu import isa
from kernelforge_cpu.isa import CpuTarget, host_target
from kernelforge_cpu.jit import KERNEL, compile_object, load
from kernelforge_cpu.kernel import NativeKernel
from kernelforge_cpu.kernels.catalog import VARIANTS

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Sequence[Array | None]
Bound = Callable[[Arrays, list[Array]], list[Array]]
"""`(operands, exact results)` -> the absolute error that f32 arithmetic may cause in each result, before its last rounding."""

DEFS: dict[str, OpDef] = {op.name: op for op in OPS}
NATIVE: dict[str, KernelVariant] = {v.op.partition(".")[2]: v for v in VARIANTS if v.name == "vectorized"}
QUANTISED: dict[str, KernelVariant] = {v.op.partition(".")[2]: v for v in VARIANTS if v.name == "quantised"}
PARTS = (1, 2, 3, 7)
F32 = epsilon("f32")
GUARD = 67
"""Elements of poison before and after a tensor; odd, so that nothing is aligned to more than an element."""


def device(target: CpuTarget | None = None, threads: int = 2) -> DeviceInfo:
    limits = (("vector_bytes", 4 * (target or host_target()).lanes),)
    return DeviceInfo("cpu", "test", "test", limits=limits, threads=threads)


def native(problems: Sequence[Problem], target: CpuTarget, config: Config | None = None) -> dict[Problem, NativeKernel]:
    """The `vectorized` kernels of some problems, `quantised` for such operands, built as on a machine that is `target`."""
    info, built = device(target), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isa, "host_target", lambda: target)
        for p in problems:
            op, quantised = p.op.partition(".")[2], any(t is not None and t.quantised for t in p.operands)
            variant = (QUANTISED if quantised and op in QUANTISED else NATIVE)[op]
            assert variant.judge(p, info) == Accept(), p
            canonical = p.canonical()
            built[p] = variant.build_kernel(canonical, config or variant.default_config(canonical, info), info)
            _ = built[p].text  # written for `target`
    return built


def module(kernels: Mapping[Problem, NativeKernel]) -> str:
    """The text of all kernels together."""
    return "\n".join(dict.fromkeys(k.text for k in kernels.values()))


def problem(op: str, *operands: str, **attrs: Attr) -> Problem:
    """A problem from tensor types as text; "" is an absent operand."""
    return DEFS[op].problem([parse_tensor_type(t) if t else None for t in operands], attrs)


def verdict(p: Problem) -> Verdict:
    return NATIVE[p.op.partition(".")[2]].judge(p, device())


class Memory:
    """A tensor between guard bands, all poison (NaN) before it is filled."""

    def __init__(self, t: TensorType) -> None:
        """`t` is static."""
        dtype, shape = to_numpy(t.dtype), t.array_shape()
        steps = t.strides if t.strides is not None else TensorType(shape, "f32").element_strides()
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if all(shape) else 0
        self.raw = np.full((extent + 2 * GUARD) * dtype.itemsize, 0xFF, np.uint8)
        self.array: Array = as_strided(self.raw.view(dtype)[GUARD:], shape, tuple(s * dtype.itemsize for s in steps))
        self.address = self.raw.ctypes.data + GUARD * dtype.itemsize

    def fill(self, array: Array) -> None:
        self.array[...] = array
        self.before = self.raw.copy()

    def untouched(self) -> bool:
        return bool((self.raw == self.before).all())

    def only_written_inside(self) -> bool:
        """Whether the bytes that are not elements of the tensor are still poison."""
        outside, itemsize = self.raw.copy(), self.array.itemsize
        inside = as_strided(outside[GUARD * itemsize :], (*self.array.shape, itemsize), (*self.array.strides, 1))
        inside[...] = 0xFF
        return bool((outside == 0xFF).all())


class Kernels:
    """The `vectorized` kernels of some problems, compiled together."""

    def __init__(
        self, problems: Sequence[Problem], target: CpuTarget | None = None, config: Config | None = None
    ) -> None:
        self.target = target = target or host_target()
        self.kernels = native(problems, target, config)
        self.library = load([compile_object(module(self.kernels), cpu=target)])

    def run(self, p: Problem, arrays: Arrays, sizes: Mapping[str, int] | None = None, parts: int = 1) -> list[Array]:
        """The results; asserts that operands are unchanged and that nothing is written outside the results."""
        kernel, static = self.kernels[p], p.with_dims(sizes or {})
        in_place = dict(DEFS[p.op.partition(".")[2]].in_place)
        operands: list[Memory | None] = []
        for i, (t, array) in enumerate(zip(static.operands, arrays, strict=True)):
            if t is not None and array is not None and i in kernel.packs:
                array = np.ascontiguousarray(kernel.packs[i].pack(array)).reshape(-1)
                t = TensorType(array.shape, "i8" if array.dtype == np.uint8 else from_numpy(array.dtype))
            operands.append(None if t is None else Memory(t))
            if operands[-1] is not None and array is not None:
                operands[-1].fill(array)
        results: list[Memory] = []
        for i, t in enumerate(static.results):
            shared = operands[in_place[i]] if i in in_place else None
            results.append(shared or Memory(t))
        addresses = [0 if m is None else m.address for m in (*operands, *results)]
        values = [(sizes or {})[d] for d in p.dims]
        scratch = np.full(kernel.scratch(values, parts) + 64, 0xFF, np.uint8)
        start = scratch.ctypes.data + -scratch.ctypes.data % 64
        pointers = (ctypes.c_void_p * (len(addresses) + len(kernel.tables) + 1))(
            *addresses, *(table.ctypes.data for table in kernel.tables), start
        )
        dims = (ctypes.c_int64 * (len(p.dims) + 1))(*values, 0)
        for phase in kernel.phases:
            assert isinstance(phase.function, str)
            function = KERNEL(self.library.address(phase.function))
            for part in reversed(range(parts)):  # any order must do
                function(ctypes.addressof(pointers), ctypes.addressof(dims), part, parts)
        for m in operands:
            assert m is None or m in results or m.untouched(), "an operand was written"
        assert all(m.only_written_inside() for m in results), "written outside a result"
        return [m.array.copy() for m in results]

    def check(
        self,
        p: Problem,
        bound: Bound | None = None,
        sizes: Mapping[str, int] | None = None,
        arrays: Arrays | None = None,
        parts: Sequence[int] = PARTS,
    ) -> None:
        """Compare with the op's reference: within `bound` and one rounding of the result, or exactly without a bound."""
        op, static = DEFS[p.op.partition(".")[2]], p.with_dims(sizes or {})
        if arrays is None:
            arrays = op.make_inputs(static, np.random.default_rng(7))
        exact = reference(op, static, arrays)
        with np.errstate(all="ignore"):
            allowed = [np.zeros(())] * len(exact) if bound is None else bound(arrays, exact)
        for n in parts:
            for got, want, error, t in zip(self.run(p, arrays, sizes, n), exact, allowed, p.results, strict=True):
                assert_close(got, want, error, t.dtype, f"{p} {dict(sizes or {})} in {n} parts")


def reference(op: OpDef, p: Problem, arrays: Arrays) -> list[Array]:
    """The op's reference in float64, not rounded (in the operands' own types where the op is exact)."""
    wide = [a if a is None or t is None or op.exact else widened(a) for a, t in zip(arrays, p.operands, strict=True)]
    with np.errstate(all="ignore"):
        return list(resolve(op.reference)(wide, dict(p.attrs)))


def assert_close(got: Array, exact: Array, error: Array, dtype: str, what: str) -> None:
    with np.errstate(all="ignore"):
        want = exact.astype(got.dtype)
    assert got.shape == want.shape, what
    if dtype not in FLOATS:
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    narrow, wide = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(wide) & np.isfinite(exact.astype(np.float64))
    np.testing.assert_array_equal(narrow[~finite], wide[~finite], err_msg=what)
    if not error.any():
        np.testing.assert_array_equal(narrow, wide, err_msg=what)
        return
    # One rounding to nearest: half a step of the type, whose smallest step is that of its subnormal numbers.
    step = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}[dtype]
    size = np.abs(exact.astype(np.float64))
    allowed = error + epsilon(dtype) * (size + error) + step
    with np.errstate(all="ignore"):
        excess = np.where(finite, np.abs(narrow - exact) / allowed, 0.0)
    assert np.all(excess <= 1.0), f"{what}: {excess.max()} times the allowed error"


def relative(factor: float) -> Bound:
    """`factor` roundings of f32."""
    return lambda arrays, exact: [factor * F32 * np.abs(e) + 2.0**-126 for e in exact]
