"""The problems of the transformer dialect's ops, with the sizes that occur and those that kernels get wrong."""

from __future__ import annotations

from kernelforge.dialects.transformer import matmul
from kernelforge.testing.transformer.attention import ATTENTION, ROPE, ROPE_ATTENTION, ROPE_CACHE_UPDATE
from kernelforge.testing.transformer.elementwise import BINARY, CAST, UNARY
from kernelforge.testing.transformer.layout import moving
from kernelforge.testing.transformer.lookup import ARGMAX, EMBEDDING, KV_CACHE_UPDATE, SAMPLE
from kernelforge.testing.transformer.norms import NORM, NORM_QUANTIZE, SOFTMAX
from kernelforge.testing.transformer.products import GLU_MATMUL, MATMUL, fed

FAMILIES = {
    f"transformer.{name}": family
    for name, family in {
        "matmul": MATMUL,
        "glu_matmul": GLU_MATMUL,
        "rms_norm_matmul": fed(MATMUL, matmul.MATMUL, norm=True, quantise=False),
        "rms_norm_glu_matmul": fed(GLU_MATMUL, matmul.GLU_MATMUL, norm=True, quantise=False),
        "quantize_matmul": fed(MATMUL, matmul.MATMUL, norm=False, quantise=True),
        "quantize_glu_matmul": fed(GLU_MATMUL, matmul.GLU_MATMUL, norm=False, quantise=True),
        "rms_norm_quantize_matmul": fed(MATMUL, matmul.MATMUL, norm=True, quantise=True),
        "rms_norm_quantize_glu_matmul": fed(GLU_MATMUL, matmul.GLU_MATMUL, norm=True, quantise=True),
        "attention": ATTENTION,
        "softmax": SOFTMAX,
        "rms_norm": NORM,
        "rms_norm_quantize": NORM_QUANTIZE,
        "layer_norm": NORM,
        "add_rms_norm": NORM,
        "rope": ROPE,
        "silu": UNARY,
        "gelu": UNARY,
        "add": BINARY,
        "mul": BINARY,
        "cast": CAST,
        "embedding": EMBEDDING,
        "kv_cache_update": KV_CACHE_UPDATE,
        "rope_cache_update": ROPE_CACHE_UPDATE,
        "rope_attention": ROPE_ATTENTION,
        "argmax": ARGMAX,
        "sample": SAMPLE,
        "reshape": moving("reshape", shape=("rows", "flat", "split")),
        "transpose": moving("transpose", perm=("reversed", "swapped", "last")),
        "slice": moving("slice", size=("rest", "one")),
        "split": moving("split", axis=("last", "second"), pieces=(3, 1)),
        "concat": moving("concat", axis=("last", "second"), pieces=(3, 1, 2)),
    }.items()
}
"""By full name."""
