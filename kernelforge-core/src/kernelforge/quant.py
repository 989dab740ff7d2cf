"""Quantised tensors: rows in groups of 32 elements, each with a scale d of its own.

`q8`: d * v with v an int8 (the numbers of GGUF's Q8_0). `q4`: d * (v - 8) with v of 4 bits (the numbers of Q4_0, as its own
quantiser makes them). An array of them has a group for an element (`kernelforge.dtype.to_numpy`), laid out as GGUF lays it
out: the scale, then 32 int8, or 16 bytes of which number i holds v[i] in its lower and v[i + 16] in its upper half.

`q8a` is the format of activations, computed while a model runs: d * v with v an int8 and d a float32. Beside them it keeps
eight times the sums of v over the elements whose index modulo 4 is below 2, and over the others: what an integer product
with weights v - 8 has to take off. A number is rounded to the nearest v, halves to even; a group whose d is subnormal is 0,
and one with NaN or infinity is NaN throughout.

Formats and quantisers of weights: ggml, `ggml-quants.c`, quantize_row_q8_0_ref and quantize_row_q4_0_ref.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, QUANTISED, from_numpy, to_numpy
from kernelforge.errors import KernelForgeWarning, UsageError

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 2048
"""Groups at a time, so that what is computed on the way stays in the cache."""


def quantize(array: Array, dtype: str) -> Array:
    """Floats [..., K] as groups [..., K / 32] of format `dtype`.

    Raises UsageError for another format, a K that is no multiple of 32 and, in the formats of weights, a number that is
    not finite, or numbers so large that their scale is not.
    """
    _check_format(dtype)
    if not array.ndim or array.shape[-1] % GROUP:
        raise UsageError(f"cannot quantise shape {list(array.shape)}: rows must be a multiple of {GROUP} elements")
    shape = (*array.shape[:-1], array.shape[-1] // GROUP)
    groups = array.reshape(-1, GROUP)
    made = np.empty(len(groups), to_numpy(dtype))
    for start in range(0, len(groups), _CHUNK):
        with np.errstate(over="ignore"):
            part = groups[start : start + _CHUNK].astype(np.float32)
        if dtype == ACTIVATION_FORMAT:
            _to_q8a(part, made[start : start + _CHUNK])
            continue
        if not np.isfinite(part).all():
            bad = int(np.argmin(np.isfinite(part).all(axis=1))) + start
            raise UsageError(f"cannot quantise NaN or infinity (group {bad} of the tensor)", hint="is the file intact?")
        out = made[start : start + _CHUNK]
        (_to_q8 if dtype == "q8" else _to_q4)(part, out)
        if not np.isfinite(out["scale"]).all():
            raise UsageError(f"cannot quantise numbers up to {np.abs(part).max():g}: the scale does not fit float16")
    return made.reshape(shape)


def dequantize(groups: Array) -> Array:
    """Groups [..., K / 32] as float32 [..., K]; exact. Raises UsageError for an array that is not of groups."""
    dtype = from_numpy(groups.dtype)
    _check_format(dtype)
    out = np.empty((groups.size, GROUP), np.float32)
    flat = groups.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        part, floats = flat[start : start + _CHUNK], out[start : start + _CHUNK]
        if dtype != "q4":
            floats[...] = part["values"]
        else:
            floats[:, : GROUP // 2] = part["values"] & 15
            floats[:, GROUP // 2 :] = part["values"] >> 4
            floats -= 8
        with np.errstate(invalid="ignore"):
            floats *= part["scale"].astype(np.float32)[:, None]
    return out.reshape(*groups.shape[:-1], groups.shape[-1] * GROUP)


def requantize(array: Array, dtype: str, groups: Array | None) -> Array:
    """As `quantize`; the groups of `groups`, if it is given, stay where `array` has their numbers."""
    if groups is None:
        return quantize(array, dtype)
    made, wanted, have = groups.copy(), array.reshape(-1, GROUP), dequantize(groups).reshape(-1, GROUP)
    changed = ~((wanted == have) | (np.isnan(wanted) & np.isnan(have))).all(axis=1)
    made.reshape(-1)[changed] = quantize(wanted[changed], dtype)[:, 0]
    return made


def widened(array: Array) -> Array:
    """Floats and quantised numbers as float64, others as they are."""
    dtype = from_numpy(array.dtype)
    if dtype in QUANTISED:
        array = dequantize(array)
    return array.astype(np.float64) if dtype in (*FLOATS, *QUANTISED) else array


def warn_not_quantised(names: Sequence[str]) -> None:
    """Warn that the weights of these names stay as they are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(
        f"not quantised, as their rows are no multiple of {GROUP} elements: {', '.join(names[:3])}{more}",
        KernelForgeWarning,
        stacklevel=2,
    )


def _check_format(dtype: str) -> None:
    if dtype not in QUANTISED:
        raise UsageError(f"'{dtype}' is not a quantised format", hint=f"one of {', '.join(QUANTISED)}")


def _to_q8(x: Array, out: Array) -> None:
    """The largest magnitude becomes 127; halves are rounded away from zero."""
    scale = np.abs(x).max(axis=1) / np.float32(127)
    scaled = x * _inverse(scale)[:, None]
    whole = np.trunc(scaled)
    whole += np.copysign(np.abs(scaled - whole) >= 0.5, scaled)
    out["values"] = whole
    _set_scale(out, scale)


def _to_q4(x: Array, out: Array) -> None:
    """The number of largest magnitude, the first of several, becomes -8: v = 0. Halves are rounded up."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0] + np.float32(0)
    scale = largest / np.float32(-8)
    values = np.minimum(x * _inverse(scale)[:, None] + np.float32(8.5), 15).astype(np.uint8)
    out["values"] = values[:, : GROUP // 2] | values[:, GROUP // 2 :] << 4
    _set_scale(out, scale)


def _to_q8a(x: Array, out: Array) -> None:
    """As kernels compute it, bit by bit."""
    largest = np.abs(x).max(axis=1)  # NaN where there is one
    scale = largest / np.float32(127)
    scale[scale < np.finfo(np.float32).tiny] = 0
    usable = np.isfinite(largest) & (scale > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.rint(x * (np.float32(1) / scale)[:, None])
    values[~usable] = 0
    out["scale"] = np.where(np.isfinite(largest), scale, np.float32(np.nan))
    out["values"] = values
    out["zeros"] = offsets(values)


def offsets(values: Array) -> Array:
    """Eight times the sums that a group of `q8a` keeps beside its values: [..., 32] gives [..., 2]."""
    return np.asarray(8 * values.reshape(*values.shape[:-1], GROUP // 4, 2, 2).sum(axis=(-3, -1), dtype=np.int32))


def _inverse(scale: Array) -> Array:
    """1 / scale; 0 where that is infinite, as such scales are 0 in float16."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _set_scale(out: Array, scale: Array) -> None:
    with np.errstate(over="ignore"):
        out["scale"] = scale
