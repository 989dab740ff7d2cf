"""The activation functions of elementwise ops and of matmul epilogues, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

GATES = ("silu", "gelu", "gelu_tanh")
EPILOGUES = ("none", *GATES)

FLOPS = {"none": 0, "silu": 4, "gelu": 8, "gelu_tanh": 10}
"""Operations per element that an activation costs; an exponential or error function counts as a few products."""


@cache
def _erfc() -> Callable[[Array], Array]:
    import numpy as np

    ufunc = np.frompyfunc(math.erfc, 1, 1)

    def erfc(x: Array) -> Array:
        return np.asarray(ufunc(x), dtype=np.float64)

    return erfc


def silu(x: Array) -> Array:
    """x * sigmoid(x) (Hendrycks and Gimpel 2016; there "SiL")."""
    import numpy as np

    return np.asarray(x / (1.0 + np.exp(-x)))


def gelu(x: Array) -> Array:
    """x * Phi(x), exact (Hendrycks and Gimpel 2016); by erfc, which keeps its precision where x is far below 0."""
    return 0.5 * x * _erfc()(-x / math.sqrt(2.0))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of gelu (same paper): 0.5 x (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3).

    Computed as x * sigmoid(2 u), the same without cancellation.
    """
    import numpy as np

    return np.asarray(x / (1.0 + np.exp(-2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))


def activate(name: object, x: Array) -> Array:
    """Apply one of `EPILOGUES`."""
    if name == "none":
        return x
    return {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}[str(name)](x)
