"""The numba function behind `blocked` and `parallel`: one kernel for all f32 matmuls, with its sizes in a table.

Blocked for the caches (Lam, Rothberg, Wolf 1991); a unit of work is a block of the result. It allocates and raises
nothing, so that it runs without the GIL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

PLAIN: Decorator = numba.njit(error_model="numpy")
REORDERED: Decorator = numba.njit(error_model="numpy", fastmath={"contract", "reassoc"})
"""Sums may be reordered, so that they vectorise; NaN and infinity are kept."""


def _pointer_to(element: Any) -> Any:
    """The function that makes a pointer to `element` of an address."""
    kind = types.CPointer(element)

    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.uintp), generate

    return intrinsic(pointer)


_floats, _integers = _pointer_to(types.float32), _pointer_to(types.int64)


_SIZES = types.int64(types.CPointer(types.int64), types.int64, types.CPointer(types.int64))
# With its types: else numba compiles it again for each number that it is called with.
_typed: Decorator = numba.njit(_SIZES, error_model="numpy")


@_typed
def _size(table: Any, entry: int, dims: Any) -> Any:
    """Entry `entry` of the table for these dynamic dimensions."""
    at = 1 + entry * (1 + table[0])
    value = table[at]
    for d in range(table[0]):
        for _ in range(table[at + 1 + d]):
            value *= dims[d]
    return value


@REORDERED
def _add_rows(lhs: Any, rhs: Any, out: Any, m: int, n: int, k: int, steps: Any) -> None:
    """out += lhs @ rhs where rows of rhs and out are contiguous: four rows of rhs at a time."""
    row, inner, down, _, out_row, _ = steps
    whole = k - k % 4
    for i in range(m):
        for kk in range(0, whole, 4):
            at = i * row + kk * inner
            a, b, c, d = lhs[at], lhs[at + inner], lhs[at + 2 * inner], lhs[at + 3 * inner]
            for j in range(n):
                r = kk * down + j
                out[i * out_row + j] += a * rhs[r] + b * rhs[r + down] + c * rhs[r + 2 * down] + d * rhs[r + 3 * down]
        for kk in range(whole, k):
            a = lhs[i * row + kk * inner]
            for j in range(n):
                out[i * out_row + j] += a * rhs[kk * down + j]


@REORDERED
def _add_dots(lhs: Any, rhs: Any, out: Any, m: int, n: int, k: int, steps: Any) -> None:
    """out += lhs @ rhs for any strides, one dot product at a time."""
    row, inner, down, right, out_row, out_step = steps
    for i in range(m):
        for j in range(n):
            total = np.float32(0)
            if inner == 1 and down == 1:
                for kk in range(k):
                    total += lhs[i * row + kk] * rhs[j * right + kk]
            else:
                for kk in range(k):
                    total += lhs[i * row + kk * inner] * rhs[j * right + kk * down]
            out[i * out_row + j * out_step] += total


@PLAIN
def _activate(x: Any, kind: int) -> Any:
    one, half = np.float32(1), np.float32(0.5)
    if kind == 1:
        return x / (one + math.exp(-x))
    if kind == 2:
        return half * x * (one + math.erf(x * np.float32(math.sqrt(0.5))))
    if kind == 3:
        return half * x * (one + math.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    return x


@PLAIN
def _run(buffers: Any, dims: Any, part: int, parts: int) -> None:
    table = _integers(buffers[5])
    mc, kc, nc = _size(table, 0, dims), _size(table, 1, dims), _size(table, 2, dims)
    k, n, inner = _size(table, 3, dims), _size(table, 4, dims), _size(table, 5, dims)
    down, right = _size(table, 6, dims), _size(table, 7, dims)
    bias_step, out_step, residual_step = _size(table, 8, dims), _size(table, 9, dims), _size(table, 10, dims)
    activation, axes = _size(table, 11, dims), _size(table, 12, dims)
    m, row, out_row, residual_row = (
        _size(table, 13, dims),
        _size(table, 14, dims),
        _size(table, 16, dims),
        _size(table, 17, dims),
    )
    batches = 1
    for axis in range(axes):
        batches *= _size(table, 18 + 5 * axis, dims)
    down_blocks, across_blocks = (m + mc - 1) // mc, (n + nc - 1) // nc
    units = batches * down_blocks * across_blocks
    for unit in range(units * part // parts, units * (part + 1) // parts):
        batch = unit // (down_blocks * across_blocks)
        i0 = unit // across_blocks % down_blocks * mc
        j0 = unit % across_blocks * nc
        rows, columns = min(mc, m - i0), min(nc, n - j0)
        a, b, c, r = i0 * row, j0 * right, i0 * out_row + j0 * out_step, i0 * residual_row + j0 * residual_step
        for axis in range(axes - 1, -1, -1):
            entry = 18 + 5 * axis
            extent = _size(table, entry, dims)
            at = batch % extent
            batch //= extent
            a += at * _size(table, entry + 1, dims)
            b += at * _size(table, entry + 2, dims)
            c += at * _size(table, entry + 3, dims)
            r += at * _size(table, entry + 4, dims)
        block = _floats(buffers[4] + 4 * c)
        for i in range(rows):
            for j in range(columns):
                block[i * out_row + j * out_step] = np.float32(0)
        for kk in range(0, k, kc):
            left, top = _floats(buffers[0] + 4 * (a + kk * inner)), _floats(buffers[1] + 4 * (b + kk * down))
            steps = (row, inner, down, right, out_row, out_step)
            if right == 1 and out_step == 1:
                _add_rows(left, top, block, rows, columns, min(kc, k - kk), steps)
            else:
                _add_dots(left, top, block, rows, columns, min(kc, k - kk), steps)
        if buffers[2] == 0 and buffers[3] == 0 and activation == 0:
            continue
        for i in range(rows):
            for j in range(columns):
                x = block[i * out_row + j * out_step]
                if buffers[2] != 0:
                    x += _floats(buffers[2])[(j0 + j) * bias_step]
                x = _activate(x, activation)
                if buffers[3] != 0:
                    x += _floats(buffers[3])[r + i * residual_row + j * residual_step]
                block[i * out_row + j * out_step] = x


@cache
def compiled_kernel() -> Any:
    """The function as a native kernel; numba compiles it once in a process."""
    signature = types.void(types.CPointer(types.uintp), types.CPointer(types.int64), types.int64, types.int64)
    return numba.cfunc(signature, error_model="numpy")(_run)
