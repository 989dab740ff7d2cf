"""`vectorized` matmul: shapes about the tile's edges, layouts, types, epilogues, dynamic rows, every kind of config."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from kernel_checks import problem
from matmul_checks import WIDTHS, Products, device, inputs, matmul, variant

from kernelforge.problem import Problem
from kernelforge.variant import Config, Reject
from kernelforge_cpu import isa
from kernelforge_cpu.jit import assembly
from kernelforge_cpu.kernels.cores import ZEN5

SIZES = [
    *((1, 1, 1), (0, 5, 3), (3, 0, 4), (4, 5, 0), (0, 0, 0)),  # nothing to do, or nothing to add up
    *((1, 31, 17), (1, 64, 64), (2, 33, 5), (3, 65, 129), (4, 16, 7), (5, 32, 16)),  # low tiles
    *((6, 64, 8), (7, 63, 33), (13, 97, 70), (12, 128, 48), (67, 31, 19)),  # full tiles and remainders
]
PLAIN = [matmul(f"f32[{m},{k}]", f"f32[{k},{n}]@const") for m, n, k in SIZES]
"""Constant f32 weights."""

WEIGHTS = [
    matmul(f"f32[{m},37]", f"{dtype}[{'70,37' if t else '37,70'}]@const", transpose_rhs=t)
    for dtype in ("f32", "bf16", "f16")
    for t in (False, True)
    for m in (1, 9)
]

LAYOUTS = [
    matmul("f32[9,5]", "f32[5,70]"),
    matmul("f32[9,5]", "f32[70,5]", transpose_rhs=True),
    matmul("f32[5,9]", "bf16[70,5]", transpose_lhs=True, transpose_rhs=True),
    matmul("f32[5,9]", "f32[5,70]@const", transpose_lhs=True),
    matmul("f32[9,5]:[40,1]", "f32[5,33]:[50,1]"),
    matmul("f32[9,5]:[3,40]", "f32[5,33]:[2,20]"),
    matmul("f32[2,3,7,5]", "f32[2,3,5,9]"),
    matmul("f32[2,3,7,5]", "f32[2,3,9,5]", transpose_rhs=True),
    matmul("f32[3,2,7,5]:[10,300,30,1]", "f16[3,2,5,9]"),
    matmul("f32[4,3,8]", "f32[8,6]@const", "", "f32[4,3,6]"),
    matmul("f32[4,3,8]:[100,30,1]", "f32[8,6]@const", "f32[6]", "f32[4,3,6]:[6,24,1]"),
    matmul("f32[4,1,8]", "f32[4,8,6]@const"),
    matmul("f32[0,3,8]", "f32[0,8,6]"),
    matmul("f32[2,3,0]", "f32[2,0,6]", "f32[6]"),
]

EPILOGUES = [
    matmul("f32[9,20]", "f32[20,45]@const", "f32[45]", "f32[9,45]", epilogue=e)
    for e in ("none", "silu", "gelu", "gelu_tanh")
] + [
    matmul("f32[1,20]", "bf16[20,45]@const", "bf16[45]@const", "", epilogue="silu"),
    matmul("f32[7,20]", "f16[20,45]@const", "f16[45]", "bf16[7,45]", epilogue="gelu"),
    matmul("bf16[7,20]", "bf16[20,45]@const", "bf16[45]", "bf16[7,45]", epilogue="silu"),
    matmul("f16[1,20]", "f16[45,20]@const", "", "f16[1,45]", transpose_rhs=True, epilogue="gelu_tanh"),
    matmul("bf16[20,7]", "f32[20,45]", transpose_lhs=True),
]

STATIC = [*PLAIN, *WEIGHTS, *LAYOUTS, *EPILOGUES]


@pytest.fixture(scope="module")
def products() -> Products:
    return Products([(p, None) for p in STATIC])


@pytest.mark.parametrize("index", range(len(STATIC)), ids=lambda i: str(STATIC[i]))
def test_static_problems(products: Products, index: int) -> None:
    products.check(index)


@pytest.mark.parametrize("lanes", WIDTHS[:-1])
def test_narrower_vectors(lanes: int) -> None:
    some = STATIC[lanes // 4 :: 4]
    made = Products([(p, None) for p in some], lanes=lanes)
    for i in range(len(some)):
        made.check(i, parts=(1, 3))


DYNAMIC = [
    matmul("f32[tokens,70]", "f32[70,97]@const"),
    matmul("f32[tokens,21]", "bf16[70,21]@const", "f32[70]", "f32[tokens,70]", transpose_rhs=True, epilogue="silu"),
    matmul("f32[b,tokens,12]", "f32[12,33]@const"),
    matmul("f32[b,tokens,12]", "f32[b,12,33]"),
    matmul("f32[12,tokens]:[999,1]", "f32[12,33]@const", transpose_lhs=True),
]


@pytest.fixture(scope="module")
def dynamic() -> Products:
    return Products([(p, None) for p in DYNAMIC])


@pytest.mark.parametrize("index", range(len(DYNAMIC)), ids=lambda i: str(DYNAMIC[i]))
def test_one_kernel_serves_any_number_of_rows(dynamic: Products, index: int) -> None:
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 13, 64):
        for batches in (1, 3) if "b" in DYNAMIC[index].dims else (1,):
            dynamic.check(index, {"tokens": tokens, "b": batches}, parts=(1, 7))


BLOCKED = matmul("f32[35,530]", "bf16[70,530]@const", "f32[70]", "f32[35,70]", transpose_rhs=True, epilogue="gelu")


def test_every_tile_and_every_blocking() -> None:
    seen: set[tuple[int | str, ...]] = set()
    chosen: list[Config] = []
    for c in variant(BLOCKED, "vectorized").config_space(BLOCKED, device()):
        tile, blocking = (c["rows"], c["panels"], c["vectors"], c["widen"]), (c["kc"], c["group"], c["widen"])
        if tile not in seen or blocking not in seen:
            chosen.append(c)
            seen |= {tile, blocking}
    made = Products([(BLOCKED, c) for c in chosen])
    for i in range(len(chosen)):
        made.check(i, parts=(1, 3))


def test_every_tile_of_few_rows() -> None:
    """Parts and the last panel end within a tile of several panels."""
    for m in (1, 2):
        p = matmul(f"f32[{m},53]", "f32[53,83]@const", "f32[83]", f"f32[{m},83]")
        configs = list(variant(p, "vectorized").config_space(p, device()))
        assert {c["panels"] for c in configs} >= {1, 2, 4}
        made = Products([(p, c) for c in configs])
        for i in range(len(configs)):
            made.check(i, parts=(1, 3, 5, 64))


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_weights_are_read_as_one_stream(dtype: str, lanes: int) -> None:
    """Chains of sums take neighbouring steps; those that are left over come after them."""
    cases = [matmul(f"f32[{m},{k}]", f"{dtype}[{k},83]@const") for m in (1, 2, 5) for k in (3, 53, 64)]
    cases.append(matmul("f32[53,2]", f"{dtype}[53,83]@const", transpose_lhs=True))
    made = Products([(p, None) for p in cases], lanes=lanes, core=ZEN5)
    for i in range(len(cases)):
        made.check(i, parts=(1, 3))


def test_more_columns_and_rows_than_a_group_and_a_block() -> None:
    """Enough for several groups of tiles, row blocks and blocks of the inner dimension at once."""
    p = matmul("f32[100,600]", "f32[600,333]@const")
    made = Products([(p, {"rows": 4, "panels": 2, "vectors": 1, "kc": 512, "group": 2, "widen": "tile"})])
    made.check(0, parts=(1, 2, 5, 64, 999))


@pytest.mark.parametrize(("n", "parts"), [(576, 6), (1536, 8), (192, 6), (64, 2), (16, 1)])
def test_parts_of_one_row_are_whole_tiles_where_that_is_as_even(n: int, parts: int) -> None:
    """Of 72 panels, 8 parts have 9 each, which are 3 tiles of four, and so are the 12 of 6 parts."""
    p, info = matmul("f32[1,576]", f"f32[576,{n}]@const"), device(8, threads=2)
    v = variant(p, "vectorized")
    (phase,) = v.build_kernel(p, v.default_config(p, info), info).phases
    assert phase.parts((), 2) == parts
    assert phase.parts((), 1) <= 4


@pytest.mark.parametrize(
    ("n", "threads", "parts"), [(576, 2, 16), (512, 2, 8), (576, 3, 24), (512, 3, 12), (576, 1, 8), (512, 1, 4)]
)
def test_parts_of_many_rows_are_smaller_where_they_would_not_be_even(n: int, threads: int, parts: int) -> None:
    """9 or 8 tiles side by side, and as many blocks of rows as make four for each part."""
    p, info = matmul("f32[512,576]", f"f32[576,{n}]@const").canonical(), device(16, threads)
    v = variant(p, "vectorized")
    (phase,) = v.build_kernel(p, v.default_config(p, info), info).phases
    assert phase.parts((), threads) == parts


KEPT = [
    (
        problem("matmul", "f32[67,530]", "bf16[530,333]@const"),
        {"kc": 512, "group": 2},
    ),  # blocks and groups, each kept anew
    (problem("matmul", "f32[tokens,37]", "f16[70,37]@const", transpose_rhs=True), {}),
    (problem("matmul", "bf16[3,35,20]", "f16[3,20,45]", "f32[45]", "", epilogue="silu"), {"group": 4}),
    (problem("glu_matmul", "f32[45,21]", "bf16[21,53]@const", "bf16[21,53]@const"), {}),
    (problem("glu_matmul", "f32[45,21]", "f16[21,53]@const", "f16[21,53]@const"), {"panels": 2, "vectors": 1}),
]


@pytest.mark.parametrize("lanes", WIDTHS)
def test_panels_widened_once_serve_all_tiles_of_rows(lanes: int) -> None:
    cases: list[tuple[Problem, Config | None]] = []
    for p, own in KEPT:
        c = variant(p, "vectorized").default_config(p.canonical(), device(lanes))
        cases.append((p, {**c, "rows": 4, "group": 1, **own, "widen": "once"}))
    made = Products(cases, lanes=lanes)
    for i, (p, _) in enumerate(KEPT):
        for tokens in (1, 31, 32, 50) if p.dims else (0,):
            made.check(i, {"tokens": tokens}, parts=(1, 3, 16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spreads_as_in_the_formula(bad: float) -> None:
    p = matmul("f32[8,40]", "f32[40,70]@const", "", "", epilogue="silu")
    plain = matmul("f32[8,40]", "f32[40,70]@const", "f32[70]", "f32[8,70]")
    kept = matmul("f32[64,40]", "f16[40,70]@const")
    config = {**variant(kept, "vectorized").default_config(kept, device(8)), "widen": "once"}
    made = Products([(p, None), (plain, None), (kept, config)])
    for index, case in enumerate((p, plain, kept)):
        for operand, at in ((0, (3, 5)), (1, (7, 69)), (2, (3,)), (3, (2, 1))):
            arrays = inputs(case)
            array = arrays[operand]
            if array is not None:
                array[at] = bad
                made.check(index, arrays=arrays, parts=(1,))


SUMS = {
    "x86-64-v2": r"mulps.*%xmm[\s\S]*addps.*%xmm",
    "x86-64-v3": r"vfmadd\w+ps.*%ymm",
    "x86-64-v4": r"vfmadd\w+ps.*%zmm",
    "neoverse-n1": r"fmla\s+v\d+\.4s",
    "apple-m1": r"fmla\.4s",
}
WIDENING = {
    ("x86-64-v3", "bf16"): r"vpslld.*%ymm",
    ("x86-64-v4", "bf16"): r"vpslld.*%zmm",
    ("x86-64-v3", "f16"): r"vcvtph2ps.*%ymm",
    ("x86-64-v4", "f16"): r"vcvtph2ps.*%zmm",
    ("neoverse-n1", "f16"): r"fcvtl",
    ("neoverse-n1", "bf16"): r"\bu?shll\b",
}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("level", SUMS)
def test_each_level_keeps_its_sums_in_its_widest_registers(
    level: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = isa.target(level)
    features = frozenset({"asimd"} if target.arch == "aarch64" else ())
    info = replace(device(target.lanes), features=features)
    monkeypatch.setattr(isa, "host_target", lambda: target)
    p = matmul("f32[?0,64]", f"{dtype}[64,100]@const")
    v = variant(p, "vectorized")
    config = v.default_config(p, info)
    code = assembly(v.build_kernel(p, config, info).text, cpu=target)
    products = code.split(f"_rows{config['rows']}_{dtype}:")[1].split("retq" if "x86" in level else "ret\n")[0]
    loop = max(
        re.split(r"\n[.L]\w+:|\n\s+j\w+\s.*|\n\s+b\.\w+.*", products),
        key=lambda b: len(re.findall("fma|fmla|mulps", b)),
    )
    assert re.search(SUMS[level], loop)
    assert re.search(WIDENING.get((level, dtype), ""), loop)
    assert not re.search(r"fmadd\w+ss|mulss|fmadd\s", loop), "a scalar product"
    if (level, dtype) != ("x86-64-v2", "f16"):  # which has no instruction for it, and no registers for doing without
        assert not re.search(r"\(%rsp\)|\[sp", loop), "a sum is spilled"


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (matmul("f64[2,3]", "f64[3,4]"), "takes f32, bf16, f16, not f64"),
        (matmul("f32[2,k]", "f32[k,4]"), "takes a static inner dimension, not k"),
        (matmul("f32[2,3]", "f32[3,n]"), "takes a static number of columns, not n"),
        (
            matmul("f32[2,3]", "f32[3,4]", "f32[4]:[2]"),
            "takes a bias, residual and result whose last axis has stride 1",
        ),
    ],
)
def test_what_it_refuses(p: Problem, reason: str) -> None:
    found = variant(p, "vectorized").judge(p, device())
    assert isinstance(found, Reject)
    assert reason in found.reason
