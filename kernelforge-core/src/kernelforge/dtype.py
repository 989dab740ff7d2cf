"""Element types: their MLIR names, sizes and numpy equivalents."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kernelforge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

ITEMSIZE = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "i8": 1}
"""Bytes of one element, by the name used everywhere: in MLIR, in problems, in records and on the command line."""

QUANTISED = {"q8": 34, "q4": 18, "q8a": 40}
"""Bytes of a group of `GROUP` elements in a row, by format: see `kernelforge.quant`."""
GROUP = 32
WEIGHT_FORMATS = ("q8", "q4")
"""Quantised formats of constants."""
ACTIVATION_FORMAT = "q8a"
"""The quantised format that is computed while a model runs."""

DTYPES = (*ITEMSIZE, *QUANTISED)

FLOATS = ("f64", "f32", "bf16", "f16")
INTEGERS = ("i64", "i32", "i8")

_NUMPY = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
}


@cache
def to_numpy(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype of `dtype`; bf16 comes from ml_dtypes, and that of a quantised format is of a whole group.

    Raises UsageError for an unknown name.
    """
    import numpy as np

    if dtype in QUANTISED:
        if dtype == ACTIVATION_FORMAT:
            return np.dtype([("scale", "<f4"), ("zeros", "<i2", (2,)), ("values", "i1", (GROUP,))])
        values = ("i1", (GROUP,)) if dtype == "q8" else ("u1", (GROUP // 2,))
        return np.dtype([("scale", "<f2"), ("values", *values)])

    if dtype == "bf16":
        import ml_dtypes

        bf16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bf16
    if dtype not in _NUMPY:
        raise UsageError(f"unknown dtype '{dtype}'", hint=f"one of {', '.join(DTYPES)}")
    return np.dtype(_NUMPY[dtype])


@cache
def from_numpy(dtype: np.dtype[np.generic]) -> str:
    """The name of a numpy dtype. Raises UsageError when it has no equivalent here."""
    for quantised in QUANTISED:
        if dtype == to_numpy(quantised):
            return quantised
    name = dtype.name
    if name == "bfloat16":
        return "bf16"
    for ours, numpy_name in _NUMPY.items():
        if name == numpy_name:
            return ours
    raise UsageError(f"numpy dtype '{name}' is not supported", hint=f"cast it to one of {', '.join(ITEMSIZE)}")


@cache
def epsilon(dtype: str) -> float:
    """Unit roundoff (half the distance from 1 to the next number) of a float type; 0 for integers."""
    return {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}.get(dtype, 0.0)
