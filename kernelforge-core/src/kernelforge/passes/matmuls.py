"""What the fusions know of matmuls and activations."""

from __future__ import annotations

from kernelforge.passes.rewriting import Op

GELU = "transformer.gelu"
GLU_MATMUL = "transformer.glu_matmul"
MATMUL = "transformer.matmul"
QUANTIZE = "transformer.quantize"
RMS_NORM = "transformer.rms_norm"
RMS_NORM_GLU_MATMUL = "transformer.rms_norm_glu_matmul"
RMS_NORM_MATMUL = "transformer.rms_norm_matmul"
RMS_NORM_QUANTIZE = "transformer.rms_norm_quantize"
SILU = "transformer.silu"


def activation_of(op: Op) -> str:
    """The matmul epilogue that computes the same as a silu or gelu op."""
    if op.name == SILU:
        return "silu"
    return "gelu_tanh" if op.attrs["approximate"] == "tanh" else "gelu"
