"""Descriptors of the variants of all ops. Cheap to import: builders are named, not loaded."""

from __future__ import annotations

from kernelforge.lazy import Ref
from kernelforge.variant import KernelVariant, accept_all, no_choices
from kernelforge_cpu.kernels import matmul

HERE = "kernelforge_cpu.kernels"
ROWS = f"{HERE}.strided:takes_rows"
FLOATS = f"{HERE}.strided:takes_floats"


def _vectorized(op: str, build: str, supports: Ref = ROWS, *, summary: str, space: Ref = no_choices) -> KernelVariant:
    name = f"{HERE}.{build}"
    return KernelVariant("vectorized", f"transformer.{op}", "cpu", name, summary, supports, space, priority=10)


VARIANTS = (
    *matmul.VARIANTS,
    _vectorized(
        "attention",
        "attention:build_attention",
        f"{HERE}.attention:takes_attention",
        summary="online softmax over blocks of keys, kv heads and blocks of tokens in parallel",
        space=f"{HERE}.attention:attention_space",
    ),
    _vectorized("softmax", "norms:build_softmax", f"{HERE}.norms:takes_softmax", summary="rows in parallel"),
    _vectorized("rms_norm", "norms:build_rms_norm", summary="rows in parallel"),
    _vectorized(
        "rms_norm_quantize",
        "norms:build_rms_norm_quantize",
        f"{HERE}.norms:takes_rms_norm_quantize",
        summary="rows in parallel",
    ),
    _vectorized("layer_norm", "norms:build_layer_norm", summary="rows in parallel"),
    _vectorized("add_rms_norm", "norms:build_add_rms_norm", summary="rows in parallel"),
    _vectorized("rope", "rope:build_rope", f"{HERE}.rope:takes_rope", summary="rotations from a table"),
    _vectorized("silu", "elementwise:build_silu", FLOATS, summary="any layout"),
    _vectorized("gelu", "elementwise:build_gelu", FLOATS, summary="any layout"),
    _vectorized("add", "elementwise:build_add", FLOATS, summary="any layout and broadcasting"),
    _vectorized("mul", "elementwise:build_mul", FLOATS, summary="any layout and broadcasting"),
    _vectorized("cast", "elementwise:build_cast", f"{HERE}.elementwise:takes_cast", summary="any layout"),
    KernelVariant(
        "vectorized",
        "transformer.embedding",
        "cpu",
        f"{HERE}.embedding:build_embedding",
        "tokens in parallel",
        ROWS,
        f"{HERE}.embedding:embedding_space",
        layouts=f"{HERE}.embedding:table_layout",
        priority=10,
    ),
    KernelVariant(
        "quantised",
        "transformer.embedding",
        "cpu",
        f"{HERE}.embedding:build_quantised",
        "tokens in parallel, from a table of 8 or 4 bits",
        f"{HERE}.embedding:takes_quantised",
        f"{HERE}.embedding:embedding_space",
        layouts=f"{HERE}.embedding:table_layout",
        priority=10,
    ),
    _vectorized(
        "quantize", "quantize:build_quantize", f"{HERE}.quantize:takes_quantize", summary="activations in 8 bits"
    ),
    _vectorized(
        "kv_cache_update",
        "cache:build_kv_cache_update",
        f"{HERE}.cache:takes_kv_cache_update",
        summary="writes the new rows only",
    ),
    _vectorized(
        "rope_cache_update",
        "rope_cache:build_rope_cache_update",
        f"{HERE}.rope_cache:takes_rope_cache_update",
        summary="keys and values go straight into the caches",
    ),
    _vectorized("argmax", "argmax:build_argmax", summary="one pass over each row"),
    _vectorized("reshape", "layout:build_reshape", f"{HERE}.layout:takes_reshape", summary="a copy of any layout"),
    _vectorized("transpose", "layout:build_transpose", accept_all, summary="a copy of any layout"),
    _vectorized("slice", "layout:build_slice", accept_all, summary="a copy of any layout"),
    _vectorized("split", "layout:build_split", accept_all, summary="copies of any layout"),
    _vectorized("concat", "layout:build_concat", accept_all, summary="copies of any layout"),
)
