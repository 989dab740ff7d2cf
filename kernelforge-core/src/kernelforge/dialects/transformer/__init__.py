"""The `transformer` dialect: the ops of decoder-only transformers, on tensors whose token dimension may be dynamic.

Batches are ragged: the tokens of all sequences of a step lie one after the other in one dimension, and every token
brings its position and the cache slot of its sequence. A negative position marks padding.
"""

from __future__ import annotations

from kernelforge.dialects.transformer.attention import ATTENTION
from kernelforge.dialects.transformer.elementwise import ADD, CAST, GELU, MUL, SILU
from kernelforge.dialects.transformer.layout import CONCAT, RESHAPE, SLICE, SPLIT, TRANSPOSE
from kernelforge.dialects.transformer.lookup import ARGMAX, EMBEDDING, KV_CACHE_UPDATE
from kernelforge.dialects.transformer.matmul import GLU_MATMUL, MATMUL
from kernelforge.dialects.transformer.norm_matmul import QUANTISING, RMS_NORM_GLU_MATMUL, RMS_NORM_MATMUL
from kernelforge.dialects.transformer.norms import ADD_RMS_NORM, LAYER_NORM, RMS_NORM, RMS_NORM_QUANTIZE, SOFTMAX
from kernelforge.dialects.transformer.quantisation import DEQUANTIZE, QUANTIZE
from kernelforge.dialects.transformer.rope import ROPE
from kernelforge.dialects.transformer.rope_attention import ROPE_ATTENTION
from kernelforge.dialects.transformer.rope_cache import ROPE_CACHE_UPDATE
from kernelforge.dialects.transformer.sampling import SAMPLE

OPS = (
    MATMUL,
    GLU_MATMUL,
    ATTENTION,
    SOFTMAX,
    RMS_NORM,
    RMS_NORM_QUANTIZE,
    RMS_NORM_MATMUL,
    RMS_NORM_GLU_MATMUL,
    *QUANTISING.values(),
    LAYER_NORM,
    ADD_RMS_NORM,
    ROPE,
    SILU,
    GELU,
    ADD,
    MUL,
    CAST,
    EMBEDDING,
    KV_CACHE_UPDATE,
    ROPE_CACHE_UPDATE,
    ROPE_ATTENTION,
    ARGMAX,
    SAMPLE,
    RESHAPE,
    TRANSPOSE,
    SLICE,
    SPLIT,
    CONCAT,
    QUANTIZE,
    DEQUANTIZE,
)
