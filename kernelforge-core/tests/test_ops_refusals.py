"""Every op refuses wrong shapes, types, attributes and counts, naming them: as OpDef and as an MLIR diagnostic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from kernelforge.dialect import context_for
from kernelforge.dialects.transformer import OPS
from kernelforge.errors import UsageError
from kernelforge.mlir import parse_module
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Attr, TensorType, parse_tensor_type
from kernelforge.syntax import RESULT_SEGMENTS, SEGMENTS, attr_text, run_lengths, tensor_text

BY_NAME: Mapping[str, OpDef] = MappingProxyType({op.name: op for op in OPS})

GOOD: dict[str, tuple[list[str | None], dict[str, Attr]]] = {
    "matmul": (["f32[3,4]", "f32[4,5]", "f32[5]", "f32[3,5]"], {}),
    "glu_matmul": (["f32[3,4]", "f32[4,5]", "f32[4,5]"], {}),
    "attention": (["f32[3,4,8]", "f32[2,9,2,8]", "f32[2,9,2,8]", "i32[3]", "i32[3]"], {}),
    "softmax": (["f32[3,4]"], {}),
    "rms_norm": (["f32[3,4]", "f32[4]"], {}),
    "rms_norm_quantize": (["f32[3,64]", "f32[64]"], {}),
    "rms_norm_matmul": (["f32[3,4]", "f32[4]", "f32[4,5]", "f32[5]", "f32[3,5]"], {}),
    "rms_norm_glu_matmul": (["f32[3,4]", "f32[4]", "f32[4,5]", "f32[4,5]"], {}),
    "quantize_matmul": (["f32[3,64]", "q4[5,64]", "f32[5]", "f32[3,5]"], {"transpose_rhs": True}),
    "quantize_glu_matmul": (["f32[3,64]", "q4[5,64]", "q4[5,64]"], {"transpose_rhs": True}),
    "rms_norm_quantize_matmul": (["f32[3,64]", "f32[64]", "q4[5,64]", "f32[5]", "f32[3,5]"], {"transpose_rhs": True}),
    "rms_norm_quantize_glu_matmul": (["f32[3,64]", "f32[64]", "q4[5,64]", "q4[5,64]"], {"transpose_rhs": True}),
    "layer_norm": (["f32[3,4]", "f32[4]", "f32[4]"], {}),
    "add_rms_norm": (["f32[3,4]", "f32[3,4]", "f32[4]"], {}),
    "rope": (["f32[3,2,8]", "i32[3]"], {"max_position": 9}),
    "silu": (["f32[3]"], {}),
    "gelu": (["f32[3]"], {}),
    "add": (["f32[3,4]", "f32[4]"], {}),
    "mul": (["f32[3,4]", "f32[4]"], {}),
    "cast": (["f32[3]"], {"dtype": "bf16"}),
    "embedding": (["f32[9,4]", "i32[3]"], {}),
    "kv_cache_update": (["f32[2,9,2,8]", "f32[3,2,8]", "i32[3]", "i32[3]"], {}),
    "rope_cache_update": (
        ["f32[3,4,8]", "f32[3,2,8]", "f32[3,2,8]", "f32[2,9,2,8]", "f32[2,9,2,8]", "i32[3]", "i32[3]"],
        {"max_position": 9},
    ),
    "rope_attention": (
        ["f32[3,4,8]", "f32[3,2,8]", "f32[3,2,8]", "f32[2,9,2,8]", "f32[2,9,2,8]", "i32[3]", "i32[3]"],
        {"max_position": 9},
    ),
    "argmax": (["f32[3,4]"], {}),
    "sample": (["f32[3,4]", "f32[3]", "i32[3]", "f32[3]", "f32[3]", "f32[3]"], {}),
    "reshape": (["f32[4,6]"], {"shape": (3, 8)}),
    "transpose": (["f32[4,6]"], {"perm": (1, 0)}),
    "slice": (["f32[4,6]"], {"starts": (1, 0), "sizes": (2, -1)}),
    "split": (["f32[4,6]"], {"axis": 1, "sizes": (2, 4)}),
    "concat": (["f32[4,6]", "f32[4,2]"], {"axis": 1}),
    "quantize": (["f32[4,64]"], {"format": "q4"}),
    "dequantize": (["q4[4,64]"], {}),
}

DENSE = ["f32[2,3,4,8]", "f32[2,5,2,8]", "f32[2,5,2,8]"]

# op, changed operands by index (None: absent) or all operands, changed attributes, message
BAD: list[tuple[str, dict[int, str | None] | list[str | None], dict[str, Attr], str]] = [
    ("matmul", {1: "f32[8,5]"}, {}, "operand 'rhs' has 8 rows but operand 'lhs' has 4 columns"),
    (
        "matmul",
        {1: "f32[5,8]"},
        {"transpose_rhs": True},
        "operand 'rhs' has 8 columns (transposed: rows) but operand 'lhs'",
    ),
    ("matmul", {0: "f32[3,5]"}, {"transpose_lhs": True}, "but operand 'lhs' has 3 rows (transposed: columns)"),
    ("matmul", {0: "f32[4]"}, {}, "operand 'lhs' must have rank 2 or more, got shape [4]"),
    ("matmul", {0: "i32[3,4]"}, {}, "operand 'lhs' must have a float type, got i32"),
    ("matmul", {1: "i8[4,5]"}, {}, "operand 'rhs' must have a float type, got i8"),
    ("matmul", {2: "f32[3]"}, {}, "operand 'bias' has shape [3], must be [5] (one for each column of the result)"),
    ("matmul", {2: "i32[5]"}, {}, "operand 'bias' must have a float type"),
    ("matmul", {3: "f32[5,3]"}, {}, "operand 'residual' has shape [5,3], must be [3,5] (the shape of the result)"),
    ("matmul", {3: "i32[3,5]"}, {}, "operand 'residual' must have a float type"),
    (
        "matmul",
        ["f32[2,3,4]", "f32[7,4,5]"],
        {},
        "operand 'rhs' has batch dimensions [7] but operand 'lhs' has [2]",
    ),
    ("matmul", ["f32[3,4]", "f32[1,4,5]"], {}, "operand 'rhs' has batch dimensions [1] but operand 'lhs' has []"),
    ("matmul", {}, {"epilogue": "relu"}, "attribute 'epilogue' is 'relu', must be one of none, silu, gelu, gelu_tanh"),
    ("matmul", {}, {"transpose_rhs": 1}, "attribute 'transpose_rhs' must be of kind bool, got 1"),
    ("matmul", {}, {"transpos_rhs": True}, "attribute 'transpos_rhs' is unknown to matmul"),
    (
        "matmul",
        {0: "f32[3,32]", 1: "q8[32,64]"},
        {},
        "operand 'rhs' is quantised (q8) and must be [N, K] with transpose_rhs",
    ),
    ("matmul", {0: "q8[3,32]", 1: "f32[32,5]"}, {}, "operand 'lhs' must have a float type, got q8"),
    ("glu_matmul", {1: "q4[32,64]"}, {}, "operand 'gate' is quantised (q4) and must be [N, K] with transpose_rhs"),
    (
        "matmul",
        {0: "q8a[4,32]", 1: "f32[32,16]"},
        {},
        "operand 'lhs' is q8a, so operand 'rhs' must be quantised, got f32",
    ),
    (
        "matmul",
        {0: "f32[4,32]", 1: "q8a[16,32]"},
        {"transpose_rhs": True},
        "operand 'rhs' must have a float type, got q8a",
    ),
    (
        "matmul",
        {0: "q8a[32,64]", 1: "q8[16,32]"},
        {"transpose_lhs": True, "transpose_rhs": True},
        "operand 'lhs' is quantised (q8a) and cannot be transposed",
    ),
    ("concat", {0: "q8a[4,64]", 1: "q8a[4,64]"}, {"axis": 0}, "operand 'xs' is of activations (q8a)"),
    ("embedding", {0: "q8a[4,64]"}, {}, "operand 'table' must have a float type, got q8a"),
    ("quantize", {0: "i32[4,64]"}, {}, "operand 'x' must have a float type, got i32"),
    ("quantize", {0: "q8[4,64]"}, {}, "operand 'x' must have a float type, got q8"),
    ("quantize", {0: "f32[4,33]"}, {}, "operand 'x' has shape [4,33], must have rows of a multiple of 32 elements"),
    ("quantize", {0: "f32[]"}, {}, "operand 'x' has shape [], must have rows of a multiple of 32 elements"),
    ("quantize", {0: "f32[4,tokens]"}, {}, "must have rows of a multiple of 32 elements"),
    ("quantize", {}, {"format": "q5"}, "attribute 'format' is 'q5', must be one of q8, q4"),
    ("dequantize", {0: "f32[4,64]"}, {}, "operand 'x' must have a quantised type, got f32"),
    ("cast", {0: "q4[4,64]"}, {"dtype": "f32"}, "operand 'x' is quantised (q4) and must not be"),
    ("reshape", {0: "q4[4,64]"}, {"shape": (8, 32)}, "operand 'x' is quantised (q4) and must not be"),
    ("transpose", {0: "q4[32,64]"}, {}, "operand 'x' is quantised (q4) and must not be"),
    ("slice", {0: "q4[4,64]"}, {}, "operand 'x' is quantised (q4) and must not be"),
    ("split", {0: "q4[4,64]"}, {"sizes": (32, 32)}, "operand 'x' is quantised (q4) and must not be"),
    ("concat", {0: "q4[4,64]", 1: "q4[4,64]"}, {}, "operand 'xs' is quantised (q4): its rows cannot be concatenated"),
    ("rms_norm", {1: "q8[32]"}, {}, "operand 'weight' must have a float type, got q8"),
    ("glu_matmul", {1: "f32[5,5]"}, {}, "operand 'gate' has 5 rows but operand 'x' has 4 columns"),
    ("glu_matmul", {2: "f32[4,6]"}, {}, "operand 'up' has shape [4,6], must be [4,5] (the shape of operand 'gate')"),
    ("glu_matmul", {2: "bf16[4,5]"}, {}, "operand 'up' has type bf16 but operand 'gate' has f32"),
    ("glu_matmul", {1: "f32[1,4,5]"}, {}, "operand 'gate' must have rank 2, got shape [1,4,5]"),
    ("glu_matmul", {}, {"activation": "none"}, "attribute 'activation' is 'none', must be one of silu"),
    ("attention", {0: "i32[3,4,8]"}, {}, "operand 'q' must have a float type, got i32"),
    ("attention", {0: "f32[1,3,4,8]"}, {}, "operand 'q' must have rank 3, got shape [1,3,4,8]"),
    ("attention", {0: "f32[3,5,8]"}, {}, "operand 'q' has 5 heads, which 2 heads of operand 'k' do not divide"),
    ("attention", {0: "f32[3,4,16]"}, {}, "operand 'k' has head size 8 but operand 'q' has 16"),
    ("attention", {1: "f32[9,2,8]"}, {}, "operand 'k' must have rank 4, got shape [9,2,8]"),
    (
        "attention",
        {2: "f32[2,8,2,8]"},
        {},
        "operand 'v' has shape [2,8,2,8], must be [2,9,2,8] (the shape of operand 'k')",
    ),
    ("attention", {2: "bf16[2,9,2,8]"}, {}, "operand 'v' has type bf16 but operand 'k' has f32"),
    ("attention", {3: "i32[4]"}, {}, "operand 'positions' has shape [4], must be [3]"),
    ("attention", {3: "i64[3]"}, {}, "operand 'positions' must be of type i32, got i64"),
    ("attention", {4: "i32[3,1]"}, {}, "operand 'slots' has shape [3,1], must be [3]"),
    ("attention", {4: None}, {}, "operand 'slots' is required with operand 'positions'"),
    ("attention", {3: None}, {}, "operand 'positions' is required with operand 'slots'"),
    ("attention", {}, {"causal": False}, "operand 'lengths' is required for attention over a cache that is not causal"),
    ("attention", {5: "i32[2]"}, {}, "operand 'lengths' has no meaning for causal attention over a cache"),
    ("attention", {5: "i32[3]"}, {"causal": False}, "operand 'lengths' has shape [3], must be [2] (one for each slot"),
    ("attention", {}, {"window": -1}, "attribute 'window' is -1, must not be negative"),
    ("attention", {}, {"softcap": -1.0}, "attribute 'softcap' is -1.0, must not be negative"),
    ("attention", {}, {"scale": float("nan")}, "attribute 'scale' is nan, must not be negative"),
    ("attention", {}, {"window": 2.5}, "attribute 'window' must be of kind int, got 2.5"),
    (
        "attention",
        [*DENSE[:1], "f32[3,5,2,8]", "f32[3,5,2,8]"],
        {},
        "operand 'k' has batch size 3 but operand 'q' has 2",
    ),
    ("attention", [*DENSE[:1], "f32[2,2,2,8]", "f32[2,2,2,8]"], {}, "operand 'k' has 2 keys, fewer than the 3 queries"),
    ("attention", [*DENSE[:1], "f32[5,2,8]", "f32[5,2,8]"], {}, "operand 'k' must have rank 4, got shape [5,2,8]"),
    (
        "attention",
        [*DENSE, None, None, "i32[3]"],
        {},
        "operand 'lengths' has shape [3], must be [2] (one for each sequence)",
    ),
    ("softmax", {0: "i32[3,4]"}, {}, "operand 'x' must have a float type, got i32"),
    ("softmax", {}, {"axis": 2}, "attribute 'axis' is 2, out of range for operand 'x' of rank 2"),
    ("softmax", {0: "f32[]"}, {}, "attribute 'axis' is -1, out of range for operand 'x' of rank 0"),
    ("rms_norm", {0: "f32[]"}, {}, "operand 'x' must have rank 1 or more, got a scalar"),
    ("rms_norm", {0: "i32[3,4]"}, {}, "operand 'x' must have a float type, got i32"),
    ("rms_norm", {1: "f32[3]"}, {}, "operand 'weight' has shape [3], must be [4] (the last dimension of operand 'x')"),
    ("rms_norm", {1: "i32[4]"}, {}, "operand 'weight' must have a float type, got i32"),
    ("rms_norm", {}, {"eps": -1e-5}, "attribute 'eps' is -1e-05, must not be negative"),
    ("rms_norm", {}, {"eps": "small"}, "attribute 'eps' must be of kind float, got 'small'"),
    ("layer_norm", {2: "f32[5]"}, {}, "operand 'bias' has shape [5], must be [4]"),
    ("layer_norm", {1: "f32[1,4]"}, {}, "operand 'weight' has shape [1,4], must be [4]"),
    ("add_rms_norm", {1: "f32[4]"}, {}, "operand 'residual' has shape [4], must be [3,4] (the shape of operand 'x')"),
    ("add_rms_norm", {1: "i32[3,4]"}, {}, "operand 'residual' must have a float type, got i32"),
    ("add_rms_norm", {2: "f32[3]"}, {}, "operand 'weight' has shape [3], must be [4]"),
    (
        "rms_norm_quantize",
        {0: "f32[3,33]", 1: "f32[33]"},
        {},
        "operand 'x' has shape [3,33], must have rows of a multiple",
    ),
    ("rms_norm_quantize", {1: "f32[32]"}, {}, "operand 'weight' has shape [32], must be [64] (the last dimension"),
    ("rms_norm_quantize", {}, {"eps": -1.0}, "attribute 'eps' is -1.0, must not be negative"),
    ("rms_norm_matmul", {0: "q8a[3,64]"}, {}, "operand 'lhs' must have a float type, got q8a"),
    (
        "rms_norm_matmul",
        {1: "f32[3]"},
        {},
        "operand 'gain' has shape [3], must be [4] (the last dimension of operand 'lhs')",
    ),
    ("rms_norm_matmul", {1: "i32[4]"}, {}, "operand 'gain' must have a float type, got i32"),
    ("rms_norm_matmul", {2: "f32[8,5]"}, {}, "operand 'rhs' has 8 rows but operand 'lhs' has 4 columns"),
    ("rms_norm_matmul", {4: "f32[5,3]"}, {}, "operand 'residual' has shape [5,3], must be [3,5]"),
    ("rms_norm_matmul", {}, {"eps": -1.0}, "attribute 'eps' is -1.0, must not be negative"),
    ("rms_norm_matmul", {}, {"transpose_lhs": True}, "attribute 'transpose_lhs' is unknown to rms_norm_matmul"),
    ("rms_norm_glu_matmul", {0: "f32[]"}, {}, "operand 'x' must have rank 1 or more, got a scalar"),
    ("rms_norm_glu_matmul", {1: "f32[5]"}, {}, "operand 'gain' has shape [5], must be [4] (the last dimension of"),
    ("rms_norm_glu_matmul", {3: "f32[4,6]"}, {}, "operand 'up' has shape [4,6], must be [4,5] (the shape of operand"),
    ("quantize_matmul", {0: "q8a[3,64]"}, {}, "operand 'lhs' must have a float type, got q8a"),
    (
        "quantize_matmul",
        {0: "f32[3,33]"},
        {},
        "operand 'lhs' has shape [3,33], must have rows of a multiple of 32 elements",
    ),
    ("quantize_matmul", {1: "f32[5,64]"}, {}, "operand 'rhs' must be of type q8 or q4, got f32"),
    ("quantize_matmul", {1: "q8[5,32]"}, {}, "operand 'rhs' has 32 columns (transposed: rows)"),
    ("quantize_matmul", {}, {"transpose_rhs": False}, "operand 'rhs' is quantised (q4) and must be [N, K] with"),
    ("quantize_matmul", {2: "f32[3]"}, {}, "operand 'bias' has shape [3], must be [5]"),
    ("quantize_matmul", {}, {"eps": 1e-5}, "attribute 'eps' is unknown to quantize_matmul"),
    ("quantize_matmul", {}, {"format": "q8a"}, "attribute 'format' is unknown to quantize_matmul"),
    ("quantize_glu_matmul", {1: "bf16[5,64]"}, {}, "operand 'gate' must be of type q8 or q4, got bf16"),
    ("rms_norm_quantize_matmul", {1: "f32[32]"}, {}, "operand 'gain' has shape [32], must be [64]"),
    ("rms_norm_quantize_matmul", {2: "q8a[5,64]"}, {}, "operand 'rhs' must be of type q8 or q4, got q8a"),
    ("rms_norm_quantize_matmul", {4: "f32[5,3]"}, {}, "operand 'residual' has shape [5,3], must be [3,5]"),
    ("rms_norm_quantize_matmul", {}, {"eps": -1.0}, "attribute 'eps' is -1.0, must not be negative"),
    ("rms_norm_quantize_glu_matmul", {3: "q8[5,64]"}, {}, "operand 'up' has type q8 but operand 'gate' has q4"),
    ("rope", {0: "f32[3,8]"}, {}, "operand 'x' must have rank 3, got shape [3,8]"),
    ("rope", {0: "i32[3,2,8]"}, {}, "operand 'x' must have a float type, got i32"),
    ("rope", {1: "i32[4]"}, {}, "operand 'positions' has shape [4], must be [3]"),
    ("rope", {1: "f32[3]"}, {}, "operand 'positions' must be of type i32, got f32"),
    ("rope", {}, {"rotary_dim": 10}, "attribute 'rotary_dim' is 10: an even number of the 8 elements"),
    ("rope", {}, {"rotary_dim": 3}, "attribute 'rotary_dim' is 3: an even number of the 8 elements"),
    ("rope", {0: "f32[3,2,7]"}, {}, "attribute 'rotary_dim' is 0: an even number of the 7 elements"),
    ("rope", {}, {"theta": 0.0}, "attribute 'theta' is 0.0, must be positive"),
    ("rope", {}, {"factor": -1.0}, "attribute 'factor' is -1.0, must be positive"),
    ("rope", {}, {"max_position": 0}, "attribute 'max_position' is 0, must be positive"),
    ("rope", {}, {"scaling": "yarn"}, "attribute 'scaling' is 'yarn', must be one of none, linear, llama3"),
    ("rope", {}, {"scaling": "llama3"}, "attribute 'original_max_position' must be positive for scaling 'llama3'"),
    (
        "rope",
        {},
        {"scaling": "llama3", "original_max_position": 8, "high_freq_factor": 1.0},
        "attribute 'high_freq_factor' is 1.0, must be above low_freq_factor, 1.0",
    ),
    ("silu", {0: "i32[3]"}, {}, "operand 'x' must have a float type, got i32"),
    ("gelu", {0: "i8[3]"}, {}, "operand 'x' must have a float type, got i8"),
    ("gelu", {}, {"approximate": "erf"}, "attribute 'approximate' is 'erf', must be one of none, tanh"),
    ("add", {1: "f32[3]"}, {}, "operand 'b' has shape [3], which does not broadcast with 'a' [3,4]"),
    ("add", {0: "i32[3,4]"}, {}, "operand 'a' must have a float type, got i32"),
    ("mul", {1: "i32[4]"}, {}, "operand 'b' must have a float type, got i32"),
    ("mul", {1: "f32[2,4]"}, {}, "operand 'b' has shape [2,4], which does not broadcast with 'a' [3,4]"),
    ("cast", {}, {"dtype": "f8"}, "attribute 'dtype' is 'f8', must be one of f64, f32"),
    ("embedding", {0: "f32[9]"}, {}, "operand 'table' must have rank 2, got shape [9]"),
    ("embedding", {0: "i8[9,4]"}, {}, "operand 'table' must have a float type, got i8"),
    ("embedding", {1: "i32[1,3]"}, {}, "operand 'ids' must have rank 1, got shape [1,3]"),
    ("embedding", {1: "f32[3]"}, {}, "operand 'ids' must be of type i32, got f32"),
    ("embedding", {}, {"dtype": "i32"}, "attribute 'dtype' is 'i32', must be one of"),
    ("kv_cache_update", {0: "f32[9,2,8]"}, {}, "operand 'cache' must have rank 4, got shape [9,2,8]"),
    ("kv_cache_update", {1: "f32[3,4,8]"}, {}, "operand 'new' has shape [3,4,8], must be [3,2,8] (tokens, then heads"),
    ("kv_cache_update", {1: "f32[3,16]"}, {}, "operand 'new' must have rank 3, got shape [3,16]"),
    ("kv_cache_update", {0: "i8[2,9,2,8]"}, {}, "operand 'cache' must have a float type, got i8"),
    ("kv_cache_update", {2: "i32[2]"}, {}, "operand 'positions' has shape [2], must be [3]"),
    ("kv_cache_update", {3: "i64[3]"}, {}, "operand 'slots' must be of type i32, got i64"),
    (
        "rope_cache_update",
        {0: "f32[3,4,16]"},
        {},
        "operand 'q' has shape [3,4,16], must be [3,4,8] (tokens and head size",
    ),
    ("rope_cache_update", {1: "f32[3,8]"}, {}, "operand 'k' must have rank 3, got shape [3,8]"),
    ("rope_cache_update", {0: "bf16[3,4,8]"}, {}, "operand 'k' is of type f32, must be of that of operand 'q', bf16"),
    ("rope_cache_update", {2: "f16[3,2,8]"}, {}, "operand 'v' is of type f16, must be of that of operand 'q', f32"),
    ("rope_cache_update", {2: "f32[3,4,8]"}, {}, "operand 'v' has shape [3,4,8], must be [3,2,8] (tokens, then heads"),
    ("rope_cache_update", {3: "f32[2,9,16]"}, {}, "operand 'key_cache' must have rank 4, got shape [2,9,16]"),
    ("rope_cache_update", {3: "i8[2,9,2,8]"}, {}, "operand 'key_cache' must have a float type, got i8"),
    (
        "rope_cache_update",
        {4: "f16[2,9,2,8]"},
        {},
        "operand 'value_cache' is of type f16, must be of that of operand 'key_cache', f32",
    ),
    (
        "rope_cache_update",
        {4: "f32[2,7,2,8]"},
        {},
        "operand 'value_cache' has shape [2,7,2,8], must be [2,9,2,8] (the shape of operand 'key_cache')",
    ),
    ("rope_cache_update", {5: "i32[2]"}, {}, "operand 'positions' has shape [2], must be [3]"),
    ("rope_cache_update", {6: "i64[3]"}, {}, "operand 'slots' must be of type i32, got i64"),
    ("rope_attention", {1: "f32[3,8]"}, {}, "operand 'k' must have rank 3, got shape [3,8]"),
    ("rope_attention", {0: "f32[3,3,8]"}, {}, "operand 'q' has 3 heads, which 2 heads of operand 'k' do not divide"),
    ("rope_attention", {}, {"softcap": -1.0}, "attribute 'softcap' is -1.0, must not be negative"),
    ("rope_attention", {}, {"causal": True}, "attribute 'causal' is unknown to rope_attention"),
    ("rope_cache_update", {}, {"rotary_dim": 3}, "attribute 'rotary_dim' is 3: an even number of the 8 elements"),
    ("argmax", {0: "f32[]"}, {}, "operand 'x' of shape [] has no last axis to search"),
    ("argmax", {0: "f32[3,0]"}, {}, "operand 'x' of shape [3,0] has no last axis to search"),
    ("argmax", {0: "i32[3]"}, {}, "operand 'x' must have a float type, got i32"),
    ("sample", {0: "f32[4]"}, {}, "operand 'logits' must have rank 2, got shape [4]"),
    ("sample", {0: "f32[3,0]"}, {}, "operand 'logits' of shape [3,0] has no tokens to choose from"),
    (
        "sample",
        {1: "f32[2]"},
        {},
        "operand 'temperature' has shape [2], must be [3] (one for each row of operand 'logits')",
    ),
    ("sample", {2: "f32[3]"}, {}, "operand 'top_k' must be of type i32, got f32"),
    ("sample", {5: "f16[3]"}, {}, "operand 'uniform' must be of type f32, got f16"),
    ("reshape", {}, {"shape": (5, 5)}, "operand 'x' has 24 elements but attribute 'shape' [5,5] has 25"),
    ("reshape", {}, {"shape": (5, -1)}, "operand 'x' of shape [4,6] does not fit attribute 'shape' [5,-1]"),
    ("reshape", {}, {"shape": (-1, -1)}, "attribute 'shape' is [-1,-1]: sizes, of which one may be -1, are wanted"),
    ("reshape", {}, {"shape": (-2, 4)}, "attribute 'shape' is [-2,4]: sizes"),
    ("reshape", {0: "f32[tokens,6]"}, {"shape": (6, 8)}, "attribute 'shape' is [6,8], must keep the dynamic dimension"),
    ("reshape", {0: "f32[tokens,6]"}, {"shape": (-1, 3)}, "and have 6 elements besides it"),
    ("reshape", {0: "f32[tokens,rows]"}, {"shape": (-1,)}, "has more than one dynamic dimension"),
    ("transpose", {}, {"perm": (0, 0)}, "attribute 'perm' is [0,0], not an order of the 2 axes of operand 'x'"),
    ("transpose", {}, {"perm": (0, 1, 2)}, "attribute 'perm' is [0,1,2], not an order of the 2 axes"),
    ("slice", {}, {"starts": (1,)}, "attribute 'starts' has 1 entries for the 2 axes of operand 'x'"),
    ("slice", {}, {"sizes": (1, 1, 1)}, "attribute 'sizes' has 3 entries for the 2 axes of operand 'x'"),
    ("slice", {}, {"sizes": (4, -1)}, "axis 0 of operand 'x' has size 4: start 1 and size 4 do not lie in it"),
    ("slice", {}, {"starts": (-1, 0)}, "axis 0 of operand 'x' has size 4: start -1 and size 2 do not lie in it"),
    ("slice", {}, {"sizes": (-2, 1)}, "axis 0 of operand 'x' has size 4: start 1 and size -2 do not lie in it"),
    ("slice", {}, {"starts": (5, 0), "sizes": (-1, -1)}, "axis 0 of operand 'x' has size 4: start 5 and size -1"),
    ("slice", {0: "f32[tokens,6]"}, {}, "axis 0 of operand 'x' is dynamic ("),
    ("split", {}, {"sizes": (2, 5)}, "attribute 'sizes' [2,5] sums to 7, axis 1 of 'x' has 6"),
    ("split", {}, {"sizes": ()}, "attribute 'sizes' is [], must be one or more sizes"),
    ("split", {}, {"sizes": (-1, 7)}, "attribute 'sizes' is [-1,7], must be one or more sizes"),
    ("split", {}, {"axis": -3}, "attribute 'axis' is -3, out of range for operand 'x' of rank 2"),
    ("split", {0: "f32[tokens,6]"}, {"axis": 0}, "axis 0 of operand 'x' is dynamic ("),
    (
        "concat",
        {1: "f32[3,2]"},
        {},
        "operand 'xs' number 1 has shape [3,2], differing from the first, [4,6], off axis 1",
    ),
    ("concat", {1: "f32[4]"}, {}, "operand 'xs' number 1 has shape [4], differing from the first"),
    ("concat", {1: "bf16[4,2]"}, {}, "operand 'xs' number 1 has type bf16, the first has f32"),
    ("concat", {}, {"axis": 2}, "attribute 'axis' is 2, out of range"),
    ("concat", {1: "f32[4,tokens]"}, {}, "axis 1 of operand 'xs' number 1 is dynamic ("),
]


def case(
    name: str, changed: dict[int, str | None] | list[str | None], attrs: Mapping[str, Attr]
) -> tuple[OpDef, list[TensorType | None], dict[str, Attr]]:
    good, good_attrs = GOOD[name]
    texts = list(good)
    if isinstance(changed, list):
        texts = changed
    else:
        texts += [None] * (max(changed, default=-1) + 1 - len(texts))
        for i, text in changed.items():
            texts[i] = text
    return BY_NAME[name], [None if t is None else parse_tensor_type(t) for t in texts], {**good_attrs, **attrs}


CONTEXT = context_for({op.full_name: op for op in OPS})


def parse(op: OpDef, operands: list[TensorType | None], attrs: Mapping[str, Attr], results: list[TensorType]) -> None:
    given = [t for t in operands if t is not None]
    texts = {name: attr_text(value) for name, value in attrs.items()}
    if op.variadic:
        texts[SEGMENTS] = f"array<i32: {', '.join(map(str, run_lengths(operands)))}>"
    elif sum(o.optional for o in op.operands) > 1:
        present = [int(t is not None) for t in operands] + [0] * (len(op.operands) - len(operands))
        texts[SEGMENTS] = f"array<i32: {', '.join(map(str, present))}>"
    if op.variadic_results:
        texts[RESULT_SEGMENTS] = f"array<i32: {', '.join(map(str, run_lengths(results)))}>"
    types = ", ".join(tensor_text(t.shape, t.dtype) for t in given)
    out = ", ".join(tensor_text(t.shape, t.dtype) for t in results)
    parse_module(
        f"func.func @f({', '.join(f'%a{i}: {tensor_text(t.shape, t.dtype)}' for i, t in enumerate(given))}) {{\n"
        f'  %0:{len(results)} = "{op.full_name}"({", ".join(f"%a{i}" for i in range(len(given)))}) '
        f"{{{', '.join(f'{k} = {v}' for k, v in texts.items())}}} : ({types}) -> ({out})\n  return\n}}",
        CONTEXT,
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_the_good_case_is_good(name: str) -> None:
    op, operands, attrs = case(name, {}, {})
    parse(op, operands, attrs, list(op.problem(operands, attrs).results))


@pytest.mark.parametrize(("name", "changed", "attrs", "message"), BAD)
def test_refusal(
    name: str, changed: dict[int, str | None] | list[str | None], attrs: dict[str, Attr], message: str
) -> None:
    op, operands, complete = case(name, changed, attrs)
    with pytest.raises(OpError, match=re.escape(message)):
        op.problem(operands, complete)
    good_op, good_operands, good_attrs = case(name, {}, {})
    results = list(good_op.problem(good_operands, good_attrs).results)
    # In MLIR dynamic dimensions have no names.
    message = message.replace("(tokens)", "(?)").replace("[tokens,", "[?,")
    with pytest.raises(
        UsageError, match=re.escape(f"error: \"-\":2:10: 'transformer.{name}' op ") + ".*" + re.escape(message)
    ):
        parse(op, operands, complete, results)


@pytest.mark.parametrize("name", BY_NAME)
def test_wrong_counts_are_refused(name: str) -> None:
    op, operands, attrs = case(name, {}, {})
    results = list(op.problem(operands, attrs).results)
    least = sum(not o.optional for o in op.operands)
    with pytest.raises(OpError, match=r"takes operands \(.*\), got"):
        op.problem(operands[: least - 1], attrs)
    with pytest.raises(UsageError, match=rf"'transformer.{name}' op (takes operands|operand '\w+' is required)"):
        parse(op, operands[: least - 1], attrs, results)
    if not op.variadic:
        too_many = [*operands, *[operands[0]] * (len(op.operands) - len(operands) + 1)]
        with pytest.raises(OpError, match=r"takes operands \(.*\), got"):
            op.problem(too_many, attrs)
        with pytest.raises(
            UsageError, match=rf"'transformer.{name}' op (takes operands|attribute 'operandSegmentSizes')"
        ):
            parse(op, too_many, attrs, results)


@pytest.mark.parametrize("name", BY_NAME)
def test_unknown_and_missing_attributes_are_refused(name: str) -> None:
    op, operands, attrs = case(name, {}, {})
    results = list(op.problem(operands, attrs).results)
    with pytest.raises(UsageError, match=f"'transformer.{name}' op attribute 'bogus' is unknown to {name}"):
        parse(op, operands, {**attrs, "bogus": 1}, results)
    for spec in op.attributes:
        if spec.default is None:
            with pytest.raises(UsageError, match=f"'transformer.{name}' op attribute '{spec.name}' is required"):
                parse(op, operands, {k: v for k, v in attrs.items() if k != spec.name}, results)


@pytest.mark.parametrize("name", BY_NAME)
def test_wrong_results_are_refused(name: str) -> None:
    op, operands, attrs = case(name, {}, {})
    results = list(op.problem(operands, attrs).results)
    first = op.results[0]
    shown = f"{first[1:]} number 0" if op.variadic_results else first
    extra = 64 if results[0].quantised else 77
    longer = TensorType((*results[0].shape, extra), results[0].dtype)
    with pytest.raises(UsageError, match=rf"op result '{shown}' has type .*x{extra}x?[\w!.]+>, must be tensor<"):
        parse(op, operands, attrs, [longer, *results[1:]])
    other = TensorType(results[0].shape, "i8")
    with pytest.raises(UsageError, match=rf"op result '{shown}' has type tensor<.*i8>, must be tensor<"):
        parse(op, operands, attrs, [other, *results[1:]])
    with pytest.raises(UsageError, match=f"op has {len(results) + 1} results, must have {len(results)}"):
        parse(op, operands, attrs, [*results, results[0]])
