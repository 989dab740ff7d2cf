"""Descriptors of the variants of all ops. Cheap to import: builders are named, not loaded."""

from __future__ import annotations

from kernelforge.lazy import Ref
from kernelforge.variant import KernelVariant, no_choices
from kernelforge_metal.kernels import matmul

HERE = "kernelforge_metal.kernels"
TAKES = f"{HERE}.tensors:takes"
Q8A = f"{HERE}.quantised_activations:takes_floats"


def _wgsl(op: str, build: str, supports: Ref = TAKES, *, summary: str, space: Ref = no_choices) -> KernelVariant:
    name = f"{HERE}.{build}"
    return KernelVariant("wgsl", f"transformer.{op}", "gpu", name, summary, supports, space, priority=10)


VARIANTS = (
    *matmul.VARIANTS,
    _wgsl("silu", "elementwise:build_unary", summary="any layout"),
    _wgsl("gelu", "elementwise:build_unary", summary="any layout"),
    _wgsl("add", "elementwise:build_add", summary="any layout and broadcasting"),
    _wgsl("mul", "elementwise:build_mul", summary="any layout and broadcasting"),
    _wgsl("cast", "elementwise:build_cast", summary="any layout"),
    _wgsl("rms_norm", "norms:build_rms_norm", summary="a workgroup a row"),
    _wgsl("rms_norm_quantize", "quantised_activations:build_rms_norm_quantize", Q8A, summary="a workgroup a row"),
    _wgsl("quantize", "quantised_activations:build_quantize", Q8A, summary="activations (q8a), in any layout"),
    _wgsl("add_rms_norm", "norms:build_add_rms_norm", summary="a workgroup a row"),
    _wgsl("layer_norm", "norms:build_layer_norm", summary="a workgroup a row"),
    _wgsl("softmax", "norms:build_softmax", summary="a workgroup a row, along any axis"),
    _wgsl("rope", "rope:build_rope", f"{HERE}.rope:takes_rope", summary="angles in fixed point"),
    _wgsl("embedding", "lookup:build_embedding", f"{HERE}.lookup:takes_embedding", summary="large tables in pieces"),
    KernelVariant(
        "quantised",
        "transformer.embedding",
        "gpu",
        f"{HERE}.quantised_rows:build_quantised",
        "from a table of 8 or 4 bits, packed as for matrix products",
        f"{HERE}.quantised_rows:takes_quantised",
        priority=10,
    ),
    _wgsl(
        "kv_cache_update",
        "lookup:build_kv_cache_update",
        f"{HERE}.lookup:takes_kv_cache_update",
        summary="writes the new rows only",
    ),
    _wgsl(
        "rope_cache_update",
        "rope_cache:build_rope_cache_update",
        f"{HERE}.rope_cache:takes_rope_cache",
        summary="queries, keys and values in one dispatch",
    ),
    _wgsl("argmax", "lookup:build_argmax", summary="several workgroups on long rows"),
    _wgsl(
        "sample", "sampling:build_sample", f"{HERE}.sampling:takes_sample", summary="radix selection, nothing sorted"
    ),
    _wgsl(
        "attention",
        "attention:build_attention",
        f"{HERE}.attention:takes_attention",
        summary="a workgroup a query and head, any layout",
    ),
    KernelVariant(
        "tile",
        "transformer.attention",
        "gpu",
        f"{HERE}.attention_tile:build_tile",
        "tiles of queries and keys, online softmax",
        f"{HERE}.attention_tile:takes_quads",
        f"{HERE}.attention_tile:tile_space",
        f"{HERE}.attention_tile:tile_default",
        priority=20,
    ),
    KernelVariant(
        "split",
        "transformer.attention",
        "gpu",
        f"{HERE}.attention_split:build_split",
        "few queries: keys shared out to workgroups, then merged",
        f"{HERE}.attention_split:takes_split",
        f"{HERE}.attention_split:split_space",
        f"{HERE}.attention_split:split_default",
        priority=30,
    ),
    KernelVariant(
        "split",
        "transformer.rope_attention",
        "gpu",
        f"{HERE}.rope_attention:build_rope_split",
        "one token: as `split` of attention, which rotates and writes to the caches",
        f"{HERE}.rope_attention:takes_rope_split",
        f"{HERE}.rope_attention:rope_split_space",
        f"{HERE}.rope_attention:rope_split_default",
        priority=30,
    ),
    _wgsl("reshape", "layout:build_reshape", summary="a copy of any layout"),
    _wgsl("transpose", "layout:build_transpose", summary="a copy of any layout"),
    _wgsl("slice", "layout:build_slice", summary="a copy of any layout"),
    _wgsl("split", "layout:build_split", summary="copies of any layout"),
    _wgsl("concat", "layout:build_concat", summary="copies of any layout"),
)
