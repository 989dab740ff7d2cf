"""`integer` matmul and glu_matmul: 8-bit activations, both formats of weights, every vector width, other instruction sets."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import llvmlite.binding as llvm
import numpy as np
import pytest
from kernel_checks import problem
from matmul_checks import WIDTHS, Products, device, inputs, matmul, variant

from kernelforge.machine import probe
from kernelforge.problem import Problem
from kernelforge.quant import dequantize, quantize
from kernelforge.variant import Accept, Reject
from kernelforge_cpu import isa
from kernelforge_cpu.isa import LEVELS, host_target
from kernelforge_cpu.jit import assembly
from kernelforge_cpu.kernels.matmul.words import Words

FORMATS = ("q8", "q4")


def linear(m: int | str, n: int, k: int, dtype: str, **attrs: str) -> Problem:
    return matmul(f"q8a[{m},{k}]", f"{dtype}[{n},{k}]@const", transpose_rhs=True, **attrs)


def glu(m: int | str, n: int, k: int, dtype: str, activation: str = "silu") -> Problem:
    rhs = f"{dtype}[{n},{k}]@const"
    return problem("glu_matmul", f"q8a[{m},{k}]", rhs, rhs, transpose_rhs=True, activation=activation)


PROBLEMS = [
    p
    for q in FORMATS
    for p in (
        *(linear(m, n, k, q) for m, n, k in ((1, 1, 32), (1, 64, 96), (2, 97, 64), (5, 33, 32), (13, 70, 160))),
        *(linear(m, n, k, q) for m, n, k in ((0, 5, 32), (4, 5, 0), (4, 0, 32), (1, 16, 1056), (8, 24, 32))),
        linear(9, 40, 64, q, epilogue="gelu"),
        matmul("q8a[7,64]", f"{q}[45,64]@const", "bf16[45]", "f32[7,45]", transpose_rhs=True, epilogue="silu"),
        matmul("q8a[2,3,64]", f"{q}[45,64]@const", "", "f16[2,3,45]", transpose_rhs=True),
        matmul("q8a[3,64]", f"{q}[45,64]@const", "", "f32[3,45]:[99,1]", transpose_rhs=True),
        *(glu(m, 50, 64, q, activation=a) for m, a in ((1, "silu"), (7, "gelu"), (14, "gelu_tanh"))),
        glu(2, 16, 0, q),
    )
]


@pytest.fixture(scope="module", params=WIDTHS)
def products(request: pytest.FixtureRequest) -> Products:
    return Products([(p, None) for p in PROBLEMS], "integer", lanes=request.param)


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=lambda i: str(PROBLEMS[i]))
def test_static_problems(products: Products, index: int) -> None:
    products.check(index)


@pytest.mark.parametrize("q", FORMATS)
def test_any_number_of_rows(q: str) -> None:
    made = Products([(linear("tokens", 97, 64, q), None), (glu("tokens", 40, 64, q), None)], "integer")
    for index, tokens in itertools.product((0, 1), (0, 1, 2, 5, 6, 7, 12, 13, 40)):
        made.check(index, {"tokens": tokens}, parts=(1, 7))


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_every_config(q: str, lanes: int) -> None:
    """Corners of the space, for many rows and for few."""
    for p in (linear(50, 75, 320, q), linear(3, 75, 320, q), linear(1, 75, 320, q)):
        v, info = variant(p, "integer"), device(lanes)
        space = v.config_space(p.canonical(), info)
        ends = [{values[0], values[-1]} for _, values in space.parameters]
        names = [name for name, _ in space.parameters]
        configs = [c for values in itertools.product(*ends) if (c := dict(zip(names, values, strict=True))) in space]
        configs = configs[:: len(configs) // 6 or 1]
        made = Products([(p, c) for c in configs], "integer", lanes=lanes)
        for index in range(len(configs)):
            made.check(index, parts=(1, 3))


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_weights_of_every_scale_and_value(q: str, lanes: int) -> None:
    """Zero and subnormal scales, the ends of the values on both sides."""
    rng = np.random.default_rng(3)
    p = linear(4, 48, 64, q)
    groups = quantize(rng.standard_normal((48, 64)), q)
    groups["values"] = rng.integers(0, 256, groups["values"].shape).astype(np.uint8).view(groups["values"].dtype)
    groups["values"][:8] = np.array(-128 if q == "q8" else 0xFF).astype(groups["values"].dtype)
    groups["values"][8:16] = 127 if q == "q8" else 0
    groups["scale"] = np.resize(np.array([1, -1, 0, 6e-8, -6e-5, 65504, 0.1], np.float16), groups.shape)
    x = rng.standard_normal((4, 64)) * 10
    x[0], x[1] = 1.0, -1.0  # 127 and -127 throughout
    Products([(p, None)], "integer", lanes=lanes).check(0, arrays=[quantize(x, "q8a"), groups, None, None])


TALL = {"rows": 8, "group": 4, "ahead": 1024, "streams": 1}
needs_avx2 = pytest.mark.skipif(8 not in WIDTHS, reason="needs AVX2")


@needs_avx2
@pytest.mark.parametrize("q", FORMATS)
def test_tall_tiles_give_the_bits_of_low_ones(q: str) -> None:
    """Last tiles of each kind, several chunks of rows, blocks of the inner dimension that are not full, every epilogue."""
    cases = [
        *(linear(m, n, k, q) for m, n, k in ((48, 1, 32), (52, 70, 544), (261, 40, 1120))),
        matmul("q8a[5,11,64]", f"{q}[45,64]@const", "bf16[45]", "f32[5,11,45]", transpose_rhs=True, epilogue="silu"),
        matmul("q8a[49,64]", f"{q}[45,64]@const", "", "f16[49,45]:[99,1]", transpose_rhs=True),
        glu(63, 50, 64, q),
        glu(257, 20, 544, q, activation="gelu"),
        linear(64, 8, 0, q),
    ]
    low = {**TALL, "rows": 4, "group": 16}
    tall, reference = (
        Products([(p, TALL) for p in cases], "integer", lanes=8),
        Products([(cases[2], low)], "integer", lanes=8),
    )
    for index in range(len(cases)):
        tall.check(index, parts=(1, 2, 7))
    np.testing.assert_array_equal(tall.run(2, inputs(cases[2])), reference.run(0, inputs(cases[2])))


@needs_avx2
@pytest.mark.parametrize("q", FORMATS)
def test_tall_tiles_of_any_number_of_rows(q: str) -> None:
    made = Products([(linear("tokens", 97, 64, q), TALL), (glu("tokens", 40, 64, q), TALL)], "integer", lanes=8)
    for index, tokens in itertools.product((0, 1), (0, 1, 47, 48, 49, 290)):
        made.check(index, {"tokens": tokens}, parts=(1, 7))


@needs_avx2
@pytest.mark.parametrize("q", FORMATS)
def test_extremes_in_tall_tiles(q: str) -> None:
    rng = np.random.default_rng(3)
    groups = quantize(rng.standard_normal((48, 64)), q)
    groups["values"] = np.resize(
        np.array([-128, 127, 0, -1] if q == "q8" else [0xFF, 0, 0x0F, 0xF0]), groups["values"].shape
    )
    groups["values"][:16] = -128 if q == "q8" else 0xFF
    groups["scale"] = np.resize(np.array([1, -1, 0, 6e-8, -6e-5, 65504, 0.1], np.float16), groups.shape)
    x = rng.standard_normal((56, 64)) * 10
    x[0], x[1] = 1.0, -1.0  # 127 and -127 throughout
    made = Products([(linear(56, 48, 64, q), TALL)], "integer", lanes=8)
    arrays = [quantize(x, "q8a"), groups, None, None]
    made.check(0, arrays=arrays)
    without = made.run(0, arrays)
    x[3, 5] = np.nan
    got = made.run(0, [quantize(x, "q8a"), groups, None, None])
    rest = np.arange(56) != 3
    np.testing.assert_array_equal(got[rest], without[rest])
    assert np.isnan(got[3]).all()


@needs_avx2
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_parts_of_tall_tiles_have_scratch_and_rows_enough(threads: int) -> None:
    p, info = linear("t", 320, 576, "q4").canonical(), device(8, threads)
    tall, low = (variant(p, "integer").build_kernel(p, {**TALL, "rows": rows}, info) for rows in (8, 4))
    room = tall.scratch([1], 1) // 4
    for rows in (1, 64, 512, 4096):
        parts = tall.phases[0].parts([rows], threads)
        assert parts * room <= tall.scratch([rows], threads)
        assert parts <= low.phases[0].parts([rows], threads)
    # Of 40 panels 64 parts make blocks of 75 rows, where 128 would make blocks of 42, which are not done in tall tiles.
    assert tall.phases[0].parts([512], 16) == 64


@pytest.mark.parametrize(("rows", "lanes"), [(47, 8), ("t", 4), ("t", 16)])
def test_where_tall_tiles_are_not_offered(rows: int | str, lanes: int) -> None:
    p, info = linear(rows, 64, 64, "q8").canonical(), device(lanes)
    assert TALL not in variant(p, "integer").config_space(p, info)
    assert variant(p, "integer").default_config(p, info)["rows"] != 8


@needs_avx2  # inline assembly is parsed by the host's LLVM target alone
@pytest.mark.parametrize("q", FORMATS)
def test_the_loop_of_tall_tiles_keeps_everything_in_registers(q: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "host_target", lambda: LEVELS["x86-64-v3"])
    p, info = linear("t", 64, 64, q).canonical(), device(8)
    config = variant(p, "integer").default_config(p, info)
    assert config["rows"] == 8
    code = assembly(variant(p, "integer").build_kernel(p, config, info).text, cpu=LEVELS["x86-64-v3"])
    loop = code[code.index("_tall:") :]
    loop = loop[: loop.index("\tret")]
    assert len(re.findall("vpmaddubsw", loop)) == 64
    assert "rsp" not in loop


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_reach_their_row_alone(bad: float) -> None:
    p = linear(8, 40, 64, "q4")
    x = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    weight = inputs(p)[1]
    made = Products([(p, None)], "integer")
    without = made.run(0, [quantize(x, "q8a"), weight, None, None])
    x[3, 5] = bad
    got = made.run(0, [quantize(x, "q8a"), weight, None, None])
    rest = np.arange(8) != 3
    np.testing.assert_array_equal(got[rest], without[rest])
    assert np.isnan(got[3]).all()


@pytest.mark.parametrize("q", FORMATS)
def test_the_packed_layout_is_as_documented(q: str) -> None:
    weight = quantize(np.random.default_rng(0).standard_normal((11, 96)), q)
    layout = Words(q, width=8, columns=11, inner=96)
    assert layout.scale_bytes == 64
    assert layout.pack.key == f"words8:{q}"
    panels = layout.packed(weight).reshape(2, layout.panel_bytes)
    numbers = np.zeros((16, 96), np.float32)
    for panel, group, column, element in np.ndindex(2, 3, 8, 32):
        scale = panels[panel, :48].view(np.float16)[8 * group + column].astype(np.float32)
        words = panels[panel, 64:].reshape(3, layout.words, 8, 4)[group]
        if q == "q8":
            value = int(words[element // 4, column, element % 4].view(np.int8))
        else:
            value = (int(words[element % 16 // 4, column, element % 4]) >> 4 * (element // 16) & 15) - 8
        numbers[8 * panel + column, 32 * group + element] = value * scale
    np.testing.assert_array_equal(numbers[:11], dequantize(weight))
    np.testing.assert_array_equal(numbers[11:], 0)


def test_rows_of_one_and_of_many_share_a_packed_weight() -> None:
    info = device()
    keys = set()
    for p in (linear(1, 576, 64, "q4"), linear("t", 576, 64, "q4").canonical()):
        v = variant(p, "integer")
        keys.add(v.build_kernel(p, v.default_config(p, info), info).packs[1].key)
    assert keys == {f"words{host_target().lanes}:q4"}


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize(
    ("name", "level", "features", "instruction"),
    [
        ("integer", "x86-64-v2", "", r"\bpmaddubsw\b"),
        ("integer", "x86-64-v3", "", r"vpmaddubsw.*%ymm"),
        ("integer", "x86-64-v4", "", r"vpmaddubsw.*%zmm"),
        ("integer-vnni", "x86-64-v4", "+avx512vnni", r"vpdpbusd.*%zmm"),
        ("integer-vnni", "x86-64-v3", "+avxvnni", r"\{vex\}.*vpdpbusd.*%ymm"),
        ("integer-dotprod", "neoverse-n1", "", r"\bsdot\b"),
        ("integer-dotprod", "apple-m1", "", r"\bsdot"),
    ],
)
def test_instructions_of_every_level(
    name: str, level: str, features: str, instruction: str, q: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of each of four rows takes eight of them, and no byte is loaded alone."""
    target = replace(LEVELS[level], features=features)
    monkeypatch.setattr(isa, "host_target", lambda: target)
    p, info = linear(4, 64, 64, q), device(target.lanes)
    v = variant(p, name)
    code = assembly(v.build_kernel(p, v.default_config(p, info), info).text, cpu=target)
    tile = code[code.index("_rows4:") :]
    tile = tile[: tile.index("\tret")]
    assert len(re.findall(instruction, tile)) >= 32
    assert not re.findall(r"\bmovsb|\bmovzb|\bldrs?b|\bcall|(?<!%)\bbl\b", tile)


def test_a_core_that_llvm_does_not_know_has_the_instructions_that_the_system_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLVM ends the process where it is asked for an instruction that it takes the core not to have."""
    arm = replace(probe(), os="linux", arch="aarch64", features=frozenset({"asimd", "asimddp"}))
    monkeypatch.setattr(isa, "probe", lambda: arm)
    monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "generic")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: llvm.FeatureMap({"neon": True}))
    monkeypatch.setattr(llvm, "get_process_triple", lambda: LEVELS["neoverse-n1"].triple)
    unknown = isa.host_target.__wrapped__()
    assert unknown.features == "+neon,+dotprod"
    monkeypatch.setattr(isa, "host_target", lambda: unknown)
    p, info = linear(4, 64, 64, "q4"), device(unknown.lanes)
    v = variant(p, "integer-dotprod")
    assert "sdot" in assembly(v.build_kernel(p, v.default_config(p, info), info).text, cpu=unknown)


@pytest.mark.parametrize(
    ("name", "features", "reason"),
    [
        ("integer", frozenset(), "needs avx2, which this CPU does not have"),
        ("integer-vnni", frozenset({"avx2"}), "needs AVX-512 VNNI or AVX-VNNI"),
        ("integer-dotprod", frozenset({"avx2"}), "needs the dot product instructions of Armv8.2"),
    ],
)
def test_a_machine_without_the_instructions(name: str, features: frozenset[str], reason: str) -> None:
    p = linear(3, 5, 32, "q4")
    verdict = variant(p, name).judge(p, replace(device(8), features=features))
    assert isinstance(verdict, Reject)
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (matmul("f32[3,32]", "q8[5,32]@const", transpose_rhs=True), "takes activations in 8 bits (q8a), not f32"),
        (
            matmul("q8a[3,32]", "q8[5,32]", transpose_rhs=True),
            "takes constant quantised weights of rank 2, not q8[5,32]",
        ),
        (matmul("q8a[2,3,32]", "q8[2,5,32]@const", transpose_rhs=True), "takes constant quantised weights of rank 2"),
        (matmul("q8a[3,32]", "q8[5,32]@const", "f64[5]", transpose_rhs=True), "takes f32, bf16, f16, not f64"),
        (matmul("q8a[3,32]", "q8[n,32]@const", transpose_rhs=True), "takes a static number of columns, not n"),
    ],
)
def test_refusals(p: Problem, reason: str) -> None:
    verdict = variant(p, "integer").judge(p, device())
    assert isinstance(verdict, Reject)
    assert verdict.reason.startswith(reason)


def test_other_variants_say_that_they_take_no_8_bit_activations() -> None:
    p = linear(3, 5, 32, "q8")
    assert variant(p, "vectorized").judge(p, device()) == Reject("takes f32, bf16, f16, not q8a")
    assert variant(p, "quantised").judge(p, device()) == Reject("takes f32, bf16, f16, not q8a")
    assert variant(p, "integer").judge(p, device()) == Accept()
