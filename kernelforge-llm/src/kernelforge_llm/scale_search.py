"""Scales of 4-bit groups by least squares: the format of Q4_0, numbers that are nearer to the original.

ggml's quantiser gives the number of largest magnitude the outermost code. Here several scales around that one, of either sign,
are tried; for the codes that each gives, the best scale is known, sum(x q) / sum(q q), and so is what it leaves of the error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernelforge.dtype import GROUP, to_numpy
from kernelforge.quant import quantize

FACTORS = (*np.linspace(0.75, 1.15, 9), *np.linspace(-0.9, -1.3, 9))
"""Of ggml's scale, that are tried."""
CHUNK = 1 << 13
"""Groups at a time."""


def search_q4(array: NDArray[np.generic]) -> NDArray[np.void]:
    """Floats [..., K] as groups [..., K / 32]. Raises UsageError as `kernelforge.quant.quantize` does."""
    made = quantize(array, "q4")
    groups, flat = array.reshape(-1, GROUP), made.reshape(-1)
    for start in range(0, len(groups), CHUNK):
        x = groups[start : start + CHUNK].astype(np.float32)
        _improve(x, flat[start : start + CHUNK])
    return flat.reshape(made.shape)


def _improve(x: NDArray[np.float32], made: NDArray[np.void]) -> None:
    given = made["scale"].astype(np.float32)
    best, scale = np.full(len(x), -1.0, np.float32), given.copy()
    for factor in FACTORS:
        q = _codes(x, given * np.float32(factor))
        products, squares = (x * q).sum(axis=1), (q * q).sum(axis=1)
        fitted = products / np.maximum(squares, np.float32(1))
        gain = products * fitted  # what the codes explain of the sum of x squared
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, fitted, scale)
    scale = scale.astype(to_numpy("f16"))
    codes = (_codes(x, scale.astype(np.float32)) + 8).astype(np.uint8)
    made["scale"], made["values"] = scale, codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4


def _codes(x: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest of -8 to 7, in units of each group's scale."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return np.clip(np.rint(x * inverse[:, None]), -8, 7)
