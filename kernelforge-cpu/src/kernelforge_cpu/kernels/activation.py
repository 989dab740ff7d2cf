"""Activation functions inside kernels, in f32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelforge_cpu.emit import Builder, Value


def activate(k: Builder, name: str, x: Value) -> Value:
    """`x` through "none", "silu", "gelu" (exact) or "gelu_tanh" (Hendrycks and Gimpel 2016)."""
    from kernelforge_cpu.vmath import erf, silu, tanh

    if name == "none":
        return x
    if name == "silu":
        return silu(k, x)
    if name == "gelu":
        return 0.5 * x * (erf(k, x * math.sqrt(0.5)) + 1.0)
    inner = k.fma(x * x * x, 0.044715, x) * math.sqrt(2.0 / math.pi)
    return 0.5 * x * (tanh(k, inner) + 1.0)
