"""Every native variant is also generated for machines that are not here."""

from __future__ import annotations

import re

import pytest
from kernel_checks import DEFS, NATIVE, module, native, problem

from kernelforge.problem import Attr, Problem
from kernelforge_cpu.isa import LEVELS, CpuTarget
from kernelforge_cpu.jit import assembly, compile_object


def fused(cache: str, x: str, size: int, **attrs: Attr) -> Problem:
    """rope_cache_update of 6 heads over 2."""
    heads = (f"{x}[t,{n},{size}]" for n in (6, 2, 2))
    caches = [f"{cache}[2,64,2,{size}]"] * 2
    return problem("rope_cache_update", *heads, *caches, "i32[t]", "i32[t]", max_position=32, **attrs)


PROBLEMS = [
    problem("attention", "bf16[t,4,20]", "f16[2,64,2,20]", "f16[2,64,2,20]", "i32[t]", "i32[t]", window=9, softcap=2.0),
    problem("softmax", "f16[t,50]"),
    problem("rms_norm", "bf16[t,50]", "f16[50]"),
    problem("rms_norm_quantize", "bf16[t,64]", "f16[64]"),
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
    fused("f16", "bf16", 20, rotary_dim=14, interleaved=True),
    fused("q8", "f32", 32),
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
    taken_apart = {name for name, op in DEFS.items() if op.parts} - {"rms_norm_quantize", "rope_cache_update"}
    for_devices = {"sample"}  # a host samples by the op's reference
    elsewhere = computed_when_compiling | taken_apart | for_devices
    assert {p.op.partition(".")[2] for p in PROBLEMS} == set(NATIVE) == set(DEFS) - elsewhere


@pytest.mark.parametrize("level", LEVELS)
def test_code_for_every_level(level: str) -> None:
    target = LEVELS[level]
    code = compile_object(module(native(PROBLEMS, target)), cpu=target)
    assert len(code) > 10_000


ROW = {"add", "mul", "sqrt", "div"}
"""What is done once for a row: a mean, its root, a reciprocal."""
COUNTED = {
    problem("silu", "f32[t,64]"): set(),
    problem("gelu", "f32[t,64]"): set(),
    problem("add", "f32[t,64]", "f32[64]"): set(),
    problem("mul", "f32[t,64]", "f32[64]"): set(),
    problem("rope", "f32[t,3,64]", "i32[t]", max_position=32): set(),
    fused("f32", "f32", 64): set(),
    problem("rms_norm", "f32[t,64]", "f32[64]"): ROW,
    problem("rms_norm_quantize", "f32[t,64]", "f32[64]"): ROW,
    problem("layer_norm", "f32[t,64]", "f32[64]"): ROW,
    problem("add_rms_norm", "f32[t,64]", "f32[t,64]", "f32[64]"): ROW,
    problem("softmax", "f32[t,64]"): {"add", "div"},
    problem("quantize", "f32[t,64]", format="q8a"): {"div"},  # the scale of a group
    problem("matmul", "f32[1,64]", "q4[64,64]@const", transpose_rhs=True): set(),
    problem("matmul", "f32[4,64]", "q8[64,64]@const", transpose_rhs=True): set(),
    problem("glu_matmul", "f32[1,64]", "q4[64,64]@const", "q4[64,64]@const", transpose_rhs=True): set(),
    problem("embedding", "q8[99,64]@const", "i32[t]"): {"mul"},  # the scale of a group, where no instruction widens f16
    problem("embedding", "q4[99,64]@const", "i32[t]"): {"mul"},
    problem("attention", "f32[64,4,64]", "f16[2,64,2,64]", "f16[2,64,2,64]", "i32[64]", "i32[64]"): {
        *("add", "sub", "mul", "fma")  # how much a row's sum shrinks under its new maximum
    },
}
"""Problems whose rows are whole vectors at every level, and the arithmetic of single f32 numbers in their code."""
UNFUSED = {"add", "mul", "quantize", "embedding"}
"""Ops that have no product to add to."""


def arithmetic(code: str, target: CpuTarget) -> tuple[list[str], list[str]]:
    """The f32 arithmetic of some assembly: on full vectors and on single numbers. Sums across a vector are of neither."""
    packed: list[str] = []
    single: list[str] = []
    width = {4: "xmm", 8: "ymm", 16: "zmm"}[target.lanes]
    for line in code.splitlines():
        if target.arch == "aarch64":
            found = re.match(r"\tf(n?m(?:add|sub)|ml[as]|add|sub|mul|div|sqrt)(?:\.4s)?\t", line)
            alone, full = ".4s" not in line, True
        else:
            found = re.match(r"\tv?(fn?m(?:add|sub)\d+|add|sub|mul|div|sqrt)([ps])s\t", line)
            alone, full = found is not None and found[2] == "s", width in line
        if found is not None and (alone or full):
            name = "fma" if re.match(r"f?n?m(?:add|sub|l[as]$)", found[1]) else found[1]
            (single if alone else packed).append(name)
    return packed, single


def innermost_loops(code: str) -> list[str]:
    """From a label to a jump back to it, with no such loop inside."""
    lines, labels, found = code.splitlines(), dict[str, int](), list[tuple[int, int]]()
    for i, line in enumerate(lines):
        if label := re.match(r"([.\w$]+):", line):
            labels[label[1]] = i
        jump = re.match(r"\t(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\t(?:.*, )?([.\w$]+)\s*$", line)
        if jump and labels.get(jump[1], i) < i:
            found.append((labels[jump[1]], i))
    inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner]


@pytest.mark.parametrize("level", LEVELS)
def test_instructions_of_every_level(level: str) -> None:
    """Rows are computed by vectors of the level's full width, fused where it can; what is done once for a row is not."""
    target = LEVELS[level]
    for p, kernel in native(list(COUNTED), target).items():
        op, code = p.op.partition(".")[2], assembly(kernel.text, cpu=target)
        packed, single = arithmetic(code, target)
        assert set(single) <= COUNTED[p], f"{op}: {single}"
        assert 4 <= len(packed) >= 2 * len(single), f"{op}: {len(packed)} vector instructions, {single}"
        assert ("fma" in packed) == (level != "x86-64-v2" and op not in UNFUSED), op
        assert not re.search(r"\t(?:call\w*|blr?)\t.*(?:exp|tanh|erf|sqrt|fma)", code), f"{op}: calls a function"
        if op == "attention":
            products = [arithmetic(loop, target) for loop in innermost_loops(code)]
            assert any(len(vector) >= 32 and not alone for vector, alone in products), products
