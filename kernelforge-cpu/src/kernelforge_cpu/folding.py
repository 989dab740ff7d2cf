"""Floats to groups of 8 or 4 bits by compiled code: what `kernelforge.quant.quantize` makes, bit by bit, far faster."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import GROUP, QUANTISED, WEIGHT_FORMATS, from_numpy, to_numpy
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import CpuTarget, host_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from kernelforge_cpu.emit import Value

    Array = np.ndarray[Any, np.dtype[Any]]

SOURCES = ("f32", "bf16", "f16")
MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000


def quantize(array: Array, dtype: str) -> Array:
    """As `kernelforge.quant.quantize`, with its errors."""
    import numpy as np

    from kernelforge import quant

    fits = dtype in WEIGHT_FORMATS and from_numpy(array.dtype) in SOURCES
    if not fits or not array.size or not array.ndim or array.shape[-1] % GROUP:
        return quant.quantize(array, dtype)
    x = np.ascontiguousarray(array)
    made = np.empty((*x.shape[:-1], x.shape[-1] // GROUP), to_numpy(dtype))
    buffers = (ctypes.c_void_p * 2)(x.ctypes.data, made.ctypes.data)
    _kernel(from_numpy(x.dtype), dtype)(ctypes.addressof(buffers), ctypes.addressof(ctypes.c_int64(made.size)), 0, 1)
    if not np.isfinite(made["scale"]).all():
        return quant.quantize(array, dtype)  # which says what is wrong
    return made


@cache
def _kernel(source: str, dtype: str) -> Any:
    from kernelforge_cpu.jit import KERNEL
    from kernelforge_cpu.objects import load_objects

    k = emit(source, dtype, host_target())
    library = load_objects([k.text()])
    call = KERNEL(library.address(k.name))
    call.library = library  # type: ignore[attr-defined]  # lives as long
    return call


def emit(source: str, dtype: str, target: CpuTarget) -> KernelBuilder:
    """A kernel of buffers x, groups and one dimension, the number of groups. A group that has a number that is not finite
    gets a scale that is not, either."""
    k = KernelBuilder(f"quantise_{source}_{dtype}", target)
    x, out = k.buffer(0, source), k.buffer(1, "i8")
    lanes, parts = k.lanes, range(GROUP // k.lanes)
    with k.for_(*k.share(k.dim(0), 64)) as group:
        at, to = x.at(group.i * GROUP), out.at(group.i * QUANTISED[dtype])
        values = [at.load_f32(i * lanes, lanes) for i in parts]
        sizes = [k.bitcast(v, v.type.of("i32")) & MAGNITUDE for v in values]  # compare as the numbers do, NaN on top
        largest = k.reduce_max(_tree(k, sizes))
        if dtype == "q8":
            scale = k.bitcast(largest, largest.type.of("f32")) / 127.0
        else:
            places = [k.consts(range(i * lanes, (i + 1) * lanes), "i32") for i in parts]
            found = [k.select(s.eq(largest), p, GROUP - 1) for s, p in zip(sizes, places, strict=True)]
            first = k.reduce_min(_tree(k, found, least=True))
            scale = (at.load_f32(k.convert(first, "i64")) + 0.0) / -8.0
        one = k.f32(1.0) / scale
        finite = (k.bitcast(one, one.type.of("i32")) & MAGNITUDE).lt(INFINITY)
        inverse = k.broadcast(k.select(finite, one, 0.0), lanes)
        scaled = [v * inverse for v in values]
        to.of("f16").store(scale, align=2)
        numbers = to.at(2)
        if dtype == "q8":
            for i in parts:
                whole = k.convert(scaled[i], "i32")
                rest = scaled[i] - k.convert(whole, "f32")
                numbers.store(whole + k.convert(rest + rest, "i32"), i * lanes)
        else:
            nibbles = [k.convert(k.min(s + 8.5, 15.0), "i32") for s in scaled]
            half = len(nibbles) // 2
            for i in range(half):
                numbers.store(nibbles[i] | nibbles[i + half] << 4, i * lanes)
    return k


def _tree(k: KernelBuilder, parts: Sequence[Value], *, least: bool = False) -> Value:
    """The largest or the least of some vectors, lane by lane."""
    found = list(parts)
    while len(found) > 1:
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [k.min(a, b) if least else k.max(a, b) for a, b in pairs]
    return found[0]
