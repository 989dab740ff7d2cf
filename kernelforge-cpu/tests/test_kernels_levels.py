"""Every native variant is also generated for machines that are not here."""

from __future__ import annotations

import pytest
from kernel_checks import DEFS, NATIVE, module, native, problem

from kernelforge_cpu.isa import LEVELS
from kernelforge_cpu.jit import compile_object

PROBLEMS = [
    problem("attention", "bf16[t,4,20]", "f16[2,64,2,20]", "f16[2,64,2,20]", "i32[t]", "i32[t]", window=9, softcap=2.0),
    problem("softmax", "f16[t,50]"),
    problem("rms_norm", "bf16[t,50]", "f16[50]"),
    problem("layer_norm", "f16[t,50]", "bf16[50]"),
    problem("add_rms_norm", "f16[t,50]", "bf16[t,50]", "f32[50]"),
    problem("rope", "f16[t,3,20]", "i32[t]", max_position=32, interleaved=True),
    problem("silu", "bf16[t,50]"),
    problem("gelu", "f16[t,50]"),
    problem("add", "f16[t,50]", "bf16[50]"),
    problem("mul", "bf16[t,50]", "f16[t,1]"),
    problem("cast", "f16[t,50]", dtype="bf16"),
    problem("embedding", "bf16[99,50]", "i32[t]", dtype="f16"),
    problem("quantize", "bf16[t,64]", format="q8a"),
    problem("kv_cache_update", "f16[2,64,2,20]", "bf16[t,2,20]", "i32[t]", "i32[t]"),
    problem("kv_cache_update", "q8[2,64,2,32]", "bf16[t,2,32]", "i32[t]", "i32[t]"),
    problem("attention", "bf16[t,4,32]", "q8[2,64,2,32]", "q8[2,64,2,32]", "i32[t]", "i32[t]"),
    problem("attention", "f32[1,4,32]", "q8[2,64,2,32]", "q8[2,64,2,32]", "i32[1]", "i32[1]"),
    problem("argmax", "f16[t,50]"),
    problem("reshape", "f16[t,3,10]:[40,10,1]", shape=(-1, 30)),
    problem("transpose", "i8[t,30]", perm=(1, 0)),
    problem("slice", "f16[t,30]", starts=(0, 3), sizes=(-1, 9)),
    problem("split", "f16[t,30]", axis=1, sizes=(13, 17)),
    problem("concat", "f16[t,30]", "f16[t,1]", axis=1),
    problem("matmul", "bf16[t,50]", "f16[50,30]@const"),
    problem("matmul", "f16[t,64]", "q8[30,64]@const", transpose_rhs=True),
    problem("matmul", "f32[t,64]", "q4[30,64]@const", transpose_rhs=True),
    problem("glu_matmul", "bf16[t,64]", "q4[30,64]@const", "q4[30,64]@const", transpose_rhs=True),
    problem("embedding", "q8[99,64]@const", "i32[t]"),
    problem("embedding", "q4[99,64]@const", "i32[t]", dtype="f16"),
    problem("glu_matmul", "f32[t,50]", "bf16[50,30]@const", "bf16[50,30]@const"),
]


def test_all_ops_are_here() -> None:
    computed_when_compiling = {"dequantize"}
    assert {p.op.partition(".")[2] for p in PROBLEMS} == set(NATIVE) == set(DEFS) - computed_when_compiling


@pytest.mark.parametrize("level", LEVELS)
def test_code_for_every_level(level: str) -> None:
    target = LEVELS[level]
    code = compile_object(module(native(PROBLEMS, target)), cpu=target)
    assert len(code) > 10_000
