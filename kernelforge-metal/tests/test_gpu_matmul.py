"""Matrix products on a GPU: every variant, weight type, epilogue and layout against the ops' float64 references."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.dialects.transformer.matmul import GLU_MATMUL, MATMUL
from kernelforge.dialects.transformer.norm_matmul import (
    QUANTIZE_GLU_MATMUL,
    QUANTIZE_MATMUL,
    RMS_NORM_GLU_MATMUL,
    RMS_NORM_MATMUL,
    RMS_NORM_QUANTIZE_GLU_MATMUL,
    RMS_NORM_QUANTIZE_MATMUL,
)
from kernelforge.dtype import to_numpy
from kernelforge.problem import Problem, parse_problem
from kernelforge.quant import dequantize, quantize
from kernelforge.session import Session
from kernelforge.tolerance import expect
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, Config, DeviceInfo, KernelVariant, Reject
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.kernel import GpuKernel, shader
from kernelforge_metal.kernels.matmul import VARIANTS, gemm_integer
from kernelforge_metal.kernels.matmul.gemm import NAMES
from kernelforge_metal.kernels.matmul.weights import Quads, pieces

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHTS = ("f32", "f16", "bf16", "q8", "q4")
BY_NAME: dict[tuple[str, str], KernelVariant] = {(v.op.partition(".")[2], v.name): v for v in VARIANTS}


def matmul(lhs: str, rhs: str, bias: str = "_", residual: str = "_", **attrs: Any) -> Problem:
    """With the result's type inferred."""
    return _inferred("matmul", MATMUL, f"{lhs}, {rhs}, {bias}, {residual}", attrs)


def glu(x: str, weight: str, **attrs: Any) -> Problem:
    return _inferred("glu_matmul", GLU_MATMUL, f"{x}, {weight}, {weight}", attrs)


def _inferred(name: str, op: Any, operands: str, attrs: dict[str, Any]) -> Problem:
    parsed = parse_problem(f"transformer.{name}({operands}) -> (f32[1]) {{}}")
    made: Problem = op.problem(parsed.operands, attrs)
    return made


def normed(x: str, w: str, more: str = "_, _", **attrs: Any) -> Problem:
    """Of normalised rows, with a gain of the type of x."""
    dtype, width = x.partition("[")[0], x.rpartition(",")[2]
    return _inferred("rms_norm_matmul", RMS_NORM_MATMUL, f"{x}, {dtype}[{width}, {w}, {more}", attrs)


def linear(m: int | str, n: int, k: int, w: str, x: str = "f32", **attrs: Any) -> Problem:
    return matmul(f"{x}[{m},{k}]", f"{w}[{n},{k}]@const", transpose_rhs=True, **attrs)


def verify(session: Session, problem: Problem, variant: str, config: Config | None = None) -> None:
    work = Workload(session, problem)
    work.verify(session.compile_problem(problem, constants=work.constants, variant=variant, config=config))


LOW = (*((1, 37, 96, w) for w in WEIGHTS), *((3, 12, 1056, w) for w in WEIGHTS))
"""Few rows: columns that fill no workgroup, and more units than threads."""


@pytest.mark.parametrize(("m", "n", "k", "w"), LOW)
def test_gemv(gpu: Session, m: int, n: int, k: int, w: str) -> None:
    k += 3 * (not w.startswith("q"))  # no multiple of anything
    verify(gpu, linear(m, n, k, w), "gemv", {"columns": 4, "tiles": 1, "threads": 32, "unroll": 2})


@pytest.mark.parametrize("w", WEIGHTS)
def test_gemv_in_workgroup_memory(plain_gpu: Session, w: str) -> None:
    problem = matmul("f16[2,96]", f"{w}[36,96]@const", "bf16[36]", "f32[2,36]", transpose_rhs=True, epilogue="silu")
    quantised = w.startswith("q")
    assert plain_gpu.select(problem).variant.name == ("gemv-integer-shared" if quantised else "gemv-shared")
    verify(plain_gpu, problem, "gemv-shared", {"columns": 8, "tiles": 1, "threads": 64, "unroll": 1})


def test_gemv_of_one_tile_has_no_code_for_several() -> None:
    """Nor, where workgroup memory is large enough, for narrow subgroups that share it."""
    made = BY_NAME["matmul", "gemv-integer"]
    device = info("subgroup", "dot4", max_compute_invocations_per_workgroup=1024)
    for m, tiles, threads, more in ((1, 1, 256, False), (1, 4, 256, True), (8, 1, 1024, True)):
        problem = linear(m, 512, 2048, "q4")
        config: Config = {"columns": 4, "tiles": tiles, "threads": threads, "unroll": 1}
        kernel = made.build_kernel(problem, config, device)
        assert isinstance(kernel, GpuKernel)
        (dispatch,) = kernel.dispatches
        assert dispatch.code.count("if (turn == 0u)") == 2 * more  # SwiftShader does not get through one for each sum
        assert ("for (var tile" in dispatch.code) == (tiles > 1)


@pytest.mark.parametrize("w", WEIGHTS)
def test_gemv_of_several_tiles(gpu: Session, plain_gpu: Session, w: str) -> None:
    """The last of which are past the end; threads that have a unit less than others; a number of sums that is no power of two."""
    k = 800 + 3 * (not w.startswith("q"))
    four: Config = {"columns": 4, "tiles": 4, "threads": 64, "unroll": 4}
    two: Config = {"columns": 4, "tiles": 2, "threads": 128, "unroll": 2}
    plain = matmul(f"f16[1,{k}]", f"{w}[20,{k}]@const", "f32[20]", "f32[1,20]", transpose_rhs=True, epilogue="gelu")
    norm = normed(f"f32[3,{k}]", f"{w}[37,{k}]@const", "f32[37], f32[3,37]", transpose_rhs=True, eps=1e-2)
    gated = glu(f"f32[1,{k}]", f"{w}[36,{k}]@const", transpose_rhs=True)
    for variant in ("gemv", "gemv-integer") if w.startswith("q") else ("gemv",):
        verify(gpu, plain, variant, four)
        verify(gpu, norm, variant, two)
        verify(gpu, gated, variant, two)
        verify(plain_gpu, norm, f"{variant}-shared", two)


@pytest.mark.parametrize("w", WEIGHTS)
def test_gated_gemv(gpu: Session, w: str) -> None:
    verify(gpu, glu("f32[2,128]", f"{w}[21,128]@const", transpose_rhs=True, activation="gelu"), "gemv")


@pytest.mark.parametrize(("m", "n", "k", "w"), [LOW[0], *LOW[7:]])
def test_gemv_of_normalised_rows(gpu: Session, m: int, n: int, k: int, w: str) -> None:
    k += 3 * (not w.startswith("q"))
    problem = normed(f"f32[{m},{k}]", f"{w}[{n},{k}]@const", f"f32[{n}], f32[{m},{n}]", transpose_rhs=True, eps=1e-2)
    variant = "gemv-integer" if w.startswith("q") else "gemv"
    assert gpu.select(problem).variant.name == variant
    verify(gpu, problem, variant, {"columns": 4, "tiles": 1, "threads": 32, "unroll": 2})


@pytest.mark.parametrize("w", ["f16", "q8", "q4"])
def test_gemv_of_normalised_rows_in_workgroup_memory(plain_gpu: Session, w: str) -> None:
    problem = normed("bf16[2,96]", f"{w}[36,96]@const", transpose_rhs=True, epilogue="silu")
    verify(plain_gpu, problem, "gemv-shared", {"columns": 8, "tiles": 1, "threads": 64, "unroll": 1})


@pytest.mark.parametrize("w", WEIGHTS)
def test_gated_gemv_of_normalised_rows(gpu: Session, w: str) -> None:
    operands = f"f32[2,128], f16[128]@const, {w}[21,128]@const, {w}[21,128]@const"
    verify(gpu, _inferred("rms_norm_glu_matmul", RMS_NORM_GLU_MATMUL, operands, {"transpose_rhs": True}), "gemv")


@pytest.mark.parametrize(("w", "variant"), [("f32", "gemv"), ("f32", "gemv-shared"), ("q4", "gemv-integer")])
def test_what_a_norm_makes_of_nan_infinity_and_zeros(gpu: Session, w: str, variant: str) -> None:
    """Rows with NaN or infinity are NaN, and so are zeros without eps; the others do not see them."""
    rng = np.random.default_rng(0)
    lhs = rng.standard_normal((4, 96)).astype(np.float32)
    lhs[0, 95], lhs[1, 7], lhs[2] = np.nan, np.inf, 0.0
    weight, gain = rng.standard_normal((12, 96)).astype(np.float32), np.ones(96, np.float32)
    constant = quantize(weight, w) if w == "q4" else weight
    problem = normed("f32[4,96]", f"{w}[12,96]@const", transpose_rhs=True, eps=0.0)
    executable = gpu.compile_problem(problem, constants={"rhs": constant}, variant=variant)
    (out,) = executable.run({"lhs": lhs, "gain": gain})
    (want,) = RMS_NORM_MATMUL.compute(problem, [lhs, gain, constant, None, None])
    got = np.asarray(out)
    assert np.isnan(got[:3]).all()
    assert np.isnan(want[:3]).all()
    assert np.allclose(got[3], want[3], atol=1e-4)


QUANTISED = ("q8", "q4")


@pytest.mark.parametrize("w", QUANTISED)
def test_gemv_in_integers(gpu: Session, plain_gpu: Session, w: str) -> None:
    config: Config = {"columns": 4, "tiles": 1, "threads": 32, "unroll": 2}
    verify(gpu, linear(1, 37, 1056, w), "gemv-integer", config)
    verify(gpu, glu("bf16[3,128]", f"{w}[24,128]@const", transpose_rhs=True), "gemv-integer", config)
    operands = ("f16[2,96]:[1,2]", f"{w}[36,96]@const", "bf16[36]", "f32[2,36]")
    verify(plain_gpu, matmul(*operands, transpose_rhs=True, epilogue="silu"), "gemv-integer-shared", config)


@pytest.mark.parametrize("w", QUANTISED)
def test_integers_are_exact_where_f32_sums_are(gpu: Session, w: str) -> None:
    """At any magnitude, and beside others that are larger by 2^20; also where a scale for them would not be a normal number."""
    rng = np.random.default_rng(4)
    weight = quantize(rng.standard_normal((8, 64)).astype(np.float32), w)
    weight["scale"] = 0.5
    lhs = rng.integers(-500, 501, (4, 64)).astype(np.float32)
    lhs[0, ::4] += 2.0**20 * np.sign(lhs[0, ::4])
    lhs[1:] *= np.array([[2.0**-115], [2.0**-130], [2.0**100]], np.float32)
    executable = gpu.compile_problem(
        linear(4, 8, 64, w),
        constants={"rhs": weight},
        variant="gemv-integer",
        config={"columns": 4, "tiles": 1, "threads": 32, "unroll": 1},
    )
    got = np.asarray(executable.run({"lhs": lhs})[0])
    weights = dequantize(weight).astype(np.float64).T
    exact = lhs.astype(np.float64) @ weights
    assert np.array_equal(got[[1, 3]], exact[[1, 3]])
    # WGSL lets a GPU take subnormal numbers for zeros: of lhs, and of the sums on the way.
    subnormal = np.where(abs(lhs[2]) < 2.0**-126, abs(lhs[2]), 0.0)
    assert (abs(got[2] - exact[2]) <= subnormal @ abs(weights) + 64 * 2.0**-126).all()
    assert abs(got[0] - exact[0]).max() <= 2.0**-23 * abs(exact[0]).max()


@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("w", QUANTISED)
def test_gemv_of_bytes(gpu: Session, plain_gpu: Session, w: str, span: int) -> None:
    """Of several tiles, the last of which are past the end; groups that not all threads have as many of."""
    kept: Config = {"columns": 4, "tiles": 4, "threads": 64, "unroll": 4, "span": span}
    loop: Config = {"columns": 4, "tiles": 1, "threads": 32, "unroll": 1, "span": span}
    epilogue = ("bf16[20]", "f16[1,20]")
    verify(
        gpu,
        matmul("q8a[1,800]", f"{w}[20,800]@const", *epilogue, transpose_rhs=True, epilogue="gelu"),
        "gemv-bytes",
        kept,
    )
    verify(gpu, linear(8, 37, 1056, w, "q8a"), "gemv-bytes", loop)
    verify(gpu, glu("q8a[3,128]", f"{w}[21,128]@const", transpose_rhs=True), "gemv-bytes", {**loop, "unroll": 2})
    verify(plain_gpu, linear(2, 36, 96, w, "q8a"), "gemv-bytes-shared", loop)
    verify(plain_gpu, glu("q8a[1,288]", f"{w}[36,288]@const", transpose_rhs=True), "gemv-bytes-shared", loop)


@pytest.mark.parametrize(("rows", "variant"), [(2, "gemv-bytes"), (40, "gemm-integer")])
@pytest.mark.parametrize("w", QUANTISED)
def test_scales_whose_product_is_subnormal(gpu: Session, w: str, rows: int, variant: str) -> None:
    """It would have few bits, or be 0, where the result is a normal number."""
    weight = quantize(np.random.default_rng(7).standard_normal((8, 96)).astype(np.float32), w)
    weight["scale"] = np.float16(2.0**-14)
    lhs = quantize(np.random.default_rng(8).standard_normal((rows, 96)).astype(np.float32), "q8a")
    lhs["scale"] = np.float32(1.5e-37)
    executable = gpu.compile_problem(linear(rows, 8, 96, w, "q8a"), constants={"rhs": weight}, variant=variant)
    got = np.asarray(executable.run({"lhs": lhs})[0], np.float64)
    exact = dequantize(lhs).astype(np.float64) @ dequantize(weight).astype(np.float64).T
    assert abs(got - exact).max() <= 1e-6 * abs(exact).max()


@pytest.mark.parametrize("w", QUANTISED)
def test_gemv_that_quantises_its_rows(gpu: Session, w: str) -> None:
    """Groups shared by two and four threads, the last of which not all threads have; strided rows, norms and epilogues."""
    kept: Config = {"columns": 4, "tiles": 4, "threads": 64, "unroll": 4, "span": 2}
    loop: Config = {"columns": 4, "tiles": 1, "threads": 32, "unroll": 1, "span": 1 if w == "q4" else 2}
    weight = f"{w}[20,800]@const"
    product = f"f32[2,800]:[900,1], {weight}, bf16[20], f16[2,20]"
    verify(gpu, _inferred("quantize_matmul", QUANTIZE_MATMUL, product, {"epilogue": "gelu"}), "gemv-quantising", kept)
    normed = f"bf16[7,800], f16[800]@const, {weight}, _, _"
    verify(gpu, _inferred("rms_norm_quantize_matmul", RMS_NORM_QUANTIZE_MATMUL, normed, {}), "gemv-quantising", loop)
    for name, op, x in (
        ("quantize_glu_matmul", QUANTIZE_GLU_MATMUL, "f32[1,96]"),
        ("rms_norm_quantize_glu_matmul", RMS_NORM_QUANTIZE_GLU_MATMUL, "f32[1,96], f32[96]@const"),
    ):
        pair = _inferred(name, op, f"{x}, {w}[37,96]@const, {w}[37,96]@const", {})
        verify(gpu, pair, "gemv-quantising", loop)
        verify(gpu, pair, "gemv-quantising")


@pytest.mark.parametrize("w", QUANTISED)
def test_rows_that_a_gemv_quantises_have_the_quantisers_groups(gpu: Session, w: str) -> None:
    """NaN and infinity spoil their row, a group whose step would be subnormal counts as zeros, whole numbers are exact."""
    weight = quantize(np.random.default_rng(5).standard_normal((8, 96)).astype(np.float32), w)
    x = np.random.default_rng(6).integers(-127, 128, (4, 96)).astype(np.float32)
    x[:, ::32] = 127  # a step of 1
    x[1, 40], x[2, 70] = np.nan, np.inf
    x[3, 32:64] = 1e-37
    problem = _inferred("quantize_matmul", QUANTIZE_MATMUL, f"f32[4,96], {w}[8,96]@const, _, _", {})
    executable = gpu.compile_problem(problem, constants={"rhs": weight}, variant="gemv-quantising")
    got = np.asarray(executable.run({"lhs": x})[0])
    exact = dequantize(quantize(x[[0, 3]], "q8a")).astype(np.float64) @ dequantize(weight).astype(np.float64).T
    np.testing.assert_allclose(got[[0, 3]], exact, rtol=2e-6, atol=1e-4)
    assert np.isnan(got[[1, 2]]).all()


@pytest.mark.parametrize("w", QUANTISED)
def test_products_of_bytes_are_exact_where_f32_sums_are(gpu: Session, w: str) -> None:
    """With the largest values there are, and scales that are powers of two."""
    rng = np.random.default_rng(5)
    weight = quantize(rng.standard_normal((8, 96)).astype(np.float32), w)
    weight["scale"] = 0.5
    lhs = quantize(rng.integers(-127, 128, (3, 96)).astype(np.float32), "q8a")
    lhs["values"][0] = -127
    lhs["scale"] = 2.0**-10
    assert gpu.select(linear(3, 8, 96, w, "q8a")).variant.name == "gemv-bytes"
    executable = gpu.compile_problem(linear(3, 8, 96, w, "q8a"), constants={"rhs": weight})
    got = np.asarray(executable.run({"lhs": lhs})[0])
    assert np.array_equal(got, dequantize(lhs).astype(np.float64) @ dequantize(weight).astype(np.float64).T)


@pytest.mark.parametrize("w", QUANTISED)
@pytest.mark.parametrize("span", [1, 2])
def test_a_group_of_nan_spoils_its_row(gpu: Session, w: str, span: int) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((4, 96)).astype(np.float32)
    x[0, 95], x[1, 7], x[2] = np.nan, np.inf, 0.0
    weight = quantize(rng.standard_normal((12, 96)).astype(np.float32), w)
    config: Config = {"columns": 4, "tiles": 1, "threads": 32, "unroll": 1, "span": span}
    executable = gpu.compile_problem(
        linear(4, 12, 96, w, "q8a"), constants={"rhs": weight}, variant="gemv-bytes", config=config
    )
    lhs = quantize(x, "q8a")
    got = np.asarray(executable.run({"lhs": lhs})[0])
    assert np.isnan(got[:2]).all()
    assert (got[2] == 0).all()
    assert np.allclose(got[3], dequantize(lhs)[3] @ dequantize(weight).T, atol=1e-4)


SMALL: Config = dict(zip(NAMES, (32, 32, 32, 4, 4, 16, 1, 4), strict=True))
TALL: Config = dict(zip(NAMES, (32, 32, 16, 8, 4, 16, 0, 4), strict=True))
BRANCHLESS: Config = dict(zip(NAMES, (32, 32, 16, 4, 8, 16, 2, 4), strict=True))
TURNS: Config = dict(zip(NAMES, (32, 32, 16, 4, 8, 16, 3, 4), strict=True))
LINES: Config = dict(zip(NAMES, (32, 32, 8, 4, 4, 8, 3, 1), strict=True))


@pytest.mark.parametrize("w", WEIGHTS)
def test_gemm_with_a_full_epilogue_and_ragged_edges(gpu: Session, w: str) -> None:
    operands = ("f32[45,96]", f"{w}[74,96]@const", "f32[74]", "f32[45,74]")
    verify(gpu, matmul(*operands, transpose_rhs=True, epilogue="gelu_tanh"), "gemm", SMALL)


@pytest.mark.parametrize(
    "config", [TALL, BRANCHLESS, TURNS], ids=["not prefetched", "prefetched without a branch", "two slabs in turns"]
)
def test_other_tiles(gpu: Session, config: Config) -> None:
    verify(gpu, linear(70, 70, 96, "f32"), "gemm", config)
    verify(gpu, linear(70, 72, 128, "q4"), "gemm", config)


@pytest.mark.parametrize("k", [8, 40, 51, 64], ids=lambda k: f"{k} steps")
def test_operands_loaded_row_by_row(gpu: Session, k: int) -> None:
    """With one slab, an odd number of them, and one that is not full."""
    verify(gpu, linear(45, 70, k, "f32"), "gemm", LINES)
    verify(gpu, linear(33, 36, k, "bf16", "f16"), "gemm", {**LINES, "prefetch": 1})


def test_rows_are_loaded_one_by_one_only_where_they_can(gpu: Session) -> None:
    space = BY_NAME["matmul", "gemm"].config_space
    device = gpu.device.info
    assert LINES in space(linear(45, 70, 64, "f32"), device)
    for problem in (linear(45, 70, 64, "q8"), matmul("f32[19,64]", "f32[64,36]")):
        assert LINES not in space(problem, device)
        assert any(c["block"] == 4 for c in space(problem, device))


def test_software_gpus_have_no_tiles_of_many_guarded_loads() -> None:
    """Of the sums' last steps, which are not all there: SwiftShader compiles 24 in 15 s, 32 in none."""
    ragged, whole = linear(7, 17, 33, "f32"), linear(7, 17, 64, "f32")
    many = dict(zip(NAMES, (64, 32, 32, 8, 4, 32, 1, 1), strict=True))
    space = BY_NAME["matmul", "gemm"].config_space
    assert "so many loads" in str(space(ragged, info(SOFTWARE)).violation(many))
    assert many in space(ragged, info())
    assert many in space(whole, info(SOFTWARE))
    for problem in (ragged, matmul("f32[7,33]", "f32[33,17]"), linear(7, 17, 32, "q4")):
        assert BY_NAME["matmul", "gemm"].default_config(problem, info(SOFTWARE)) in space(problem, info(SOFTWARE))


@pytest.mark.parametrize("w", WEIGHTS)
def test_gemm_of_16_bit_activations(gpu: Session, w: str) -> None:
    verify(gpu, linear(33, 40, 64, w, "f16"), "gemm", SMALL)
    verify(gpu, glu("bf16[9,64]", f"{w}[36,64]@const", transpose_rhs=True), "gemm", SMALL)


LAYOUTS = [
    matmul("f32[19,21]", "f32[21,36]"),
    matmul("f16[19,21]", "bf16[21,36]"),
    matmul("f32[21,19]", "f32[22,21]", transpose_lhs=True, transpose_rhs=True),
    matmul("f32[2,3,9,20]", "f32[2,3,20,12]"),
    matmul("f32[2,3,9,20]:[1999,640,21,1]", "f16[20,12]@const"),
    matmul("f32[4,7,8]:[8,99,1]", "f32[24,8]@const", transpose_rhs=True),
    matmul("f32[20,64]", "f32[64,48]@const"),
    matmul("f32[20,0]", "f32[0,8]"),
]


@pytest.mark.parametrize("variant", ["gemm", "direct"])
@pytest.mark.parametrize("problem", LAYOUTS, ids=str)
def test_layouts(gpu: Session, problem: Problem, variant: str) -> None:
    if variant == "gemm" and isinstance(BY_NAME["matmul", "gemm"].judge(problem, gpu.device.info), Reject):
        pytest.skip("the other variant's")
    verify(gpu, problem, variant, TALL if variant == "gemm" else None)


@pytest.mark.parametrize("w", WEIGHTS)
def test_direct(gpu: Session, w: str) -> None:
    verify(gpu, matmul("bf16[3,64]", f"{w}[5,64]@const", "f32[5]", transpose_rhs=True, epilogue="gelu"), "direct")
    verify(gpu, glu("f32[2,64]", f"{w}[5,64]@const", transpose_rhs=True), "direct")


@pytest.mark.parametrize("w", ["f16", "q4"])
def test_any_number_of_rows_with_one_kernel(gpu: Session, w: str) -> None:
    problem = linear("tokens", 40, 64, w).canonical()
    op = gpu.registry.ops[problem.op]
    weight = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    constant = quantize(weight, w) if w == "q4" else weight.astype(to_numpy(w))
    executable = gpu.compile_problem(problem, constants={"rhs": constant}, variant="gemm", config=SMALL)
    for rows in (1, 31, 70, 2):
        lhs = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        (out,) = executable.run({"lhs": lhs})
        (want,) = expect(problem.with_dims({"?0": rows}), op, [lhs, constant, None, None])
        assert (abs(np.asarray(out) - want.exact) <= want.allowed).all()


@pytest.mark.parametrize(
    ("w", "variant"),
    [*((w, v) for w in WEIGHTS for v in ("gemv", "gemm", "direct")), *((w, "gemv-integer") for w in QUANTISED)],
)
def test_nan_and_infinity_stay_in_their_row(gpu: Session, w: str, variant: str) -> None:
    """Rows and columns that a tile reads beside its own, and zeros beyond the last step, must not spread them."""
    weight = np.random.default_rng(1).standard_normal((12, 96)).astype(np.float32)
    constant = quantize(weight, w) if w.startswith("q") else weight.astype(to_numpy(w))
    wide = dequantize(constant) if w.startswith("q") else constant.astype(np.float32)
    lhs = np.ones((3, 96), np.float32)
    lhs[0, 95], lhs[1, 7] = np.nan, np.inf
    config = SMALL if variant == "gemm" else None
    executable = gpu.compile_problem(linear(3, 12, 96, w), constants={"rhs": constant}, variant=variant, config=config)
    (out,) = executable.run({"lhs": lhs})
    got = np.asarray(out)
    with np.errstate(invalid="ignore"):
        infinite = np.inf * wide[:, 7]
    assert np.isnan(got[0]).all()
    assert np.array_equal(got[1], infinite, equal_nan=True)
    assert np.allclose(got[2], wide.sum(axis=1), atol=1e-4)


def test_a_broken_result_would_be_seen(gpu: Session) -> None:
    """The checks above compare something: another weight's result is refused."""
    problem = linear(2, 8, 64, "f32")
    work, other = Workload(gpu, problem), Workload(gpu, problem)
    with pytest.raises(Exception, match=r"result 'out' of transformer\.matmul"):
        work.verify(gpu.compile_problem(problem, constants=other.constants, variant="gemv"))


# --- without a device ---


def info(*features: str, **limits: int) -> DeviceInfo:
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    return DeviceInfo("gpu", "null", "null", frozenset(features), tuple(sorted(named.items())))


EVERYTHING = info(
    "subgroup",
    "shader-f16",
    "dot4",
    "cooperative-matrix",
    max_compute_workgroup_storage_size=49152,
    cooperative_matrix_f32_8=0,
    cooperative_matrix_f16_16=0,
)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.op.partition('.')[2]}-{v.name}")
def test_shaders_of_all_samples_are_written(variant: KernelVariant) -> None:
    """With shapes of real models; the default is legal, on devices with everything and with nothing."""
    op = next(op for op in OPS if op.full_name == variant.op)
    taken, step = 0, 1 if variant.name.startswith(("gemv-integer", "gemv-bytes", "gemv-quantising")) else 5  # few
    for problem in list(op.samples(random.Random(2)))[::step]:
        for device in (EVERYTHING, info("dot4")):
            verdict = variant.judge(problem, device)
            if isinstance(verdict, Reject):
                assert verdict.reason
                continue
            taken += 1
            kernel = variant.build_kernel(problem, variant.default_config(problem, device), device)
            assert isinstance(kernel, GpuKernel)
            for dispatch in kernel.dispatches:
                text = shader(problem, kernel, dispatch, immediates=True)
                by_subgroups = variant.name.startswith("gemv") and not variant.name.endswith("-shared")
                assert ("subgroupAdd" in text) == by_subgroups
                assert dispatch.grid([1] * len(problem.dims)) >= (1, 1, 1)
    assert taken > 3


@pytest.mark.parametrize(("dtype", "rows"), [("f32", 256), ("f16", 128), ("bf16", 128)])
def test_the_largest_tiles_are_for_weights_of_f32(dtype: str, rows: int) -> None:
    problem = _inferred("matmul", MATMUL, f"f32[4096,4096], {dtype}[4096,4096]@const", {"transpose_rhs": True})
    assert BY_NAME["matmul", "gemm"].default_config(problem, EVERYTHING)["rows"] == rows


@pytest.mark.parametrize("name", ["gemv", "gemv-shared", "gemv-integer", "gemv-integer-shared"])
def test_sums_of_many_rows_fit_workgroup_memory(name: str) -> None:
    operands = "f32[8,4096], f32[4096], q4[64,4096]@const, q4[64,4096]@const"
    problem = _inferred("rms_norm_glu_matmul", RMS_NORM_GLU_MATMUL, operands, {"transpose_rhs": True})
    variant = BY_NAME["rms_norm_glu_matmul", name]
    for limits in ({}, {"max_compute_workgroup_storage_size": 49152}):
        device = info("subgroup", "dot4", max_compute_invocations_per_workgroup=1024, **limits)
        space = variant.config_space(problem, device)
        assert variant.default_config(problem, device) in space
        for config in space:
            (dispatch,) = variant.build_kernel(problem, config, device).dispatches
            found = re.search(r"var<workgroup> parts: array<f32, (\d+)>", dispatch.code)
            assert found is not None
            assert 4 * int(found[1]) <= device.limit("max-compute-workgroup-storage-size", 16384)


def reason(name: str, problem: Problem, device: DeviceInfo) -> str:
    verdict = BY_NAME[problem.op.partition(".")[2], name].judge(problem, device)
    assert isinstance(verdict, Reject)
    return verdict.reason


def test_reasons_to_refuse() -> None:
    one = linear(1, 8, 8, "f32")
    assert reason("gemv", one, info()) == "the device has no subgroups"
    assert "1 to 8 rows, not 9" in reason("gemv-shared", linear(9, 8, 8, "f32"), info())
    assert "1 to 8 rows, not 0" in reason("gemv-shared", linear(0, 8, 8, "f32"), info())
    empty = matmul("f32[20,0]", "f32[0,8]@const")
    assert reason("gemm", empty, info()) == "takes sums of at least one number"
    assert "at least one column" in reason("gemv-shared", linear(1, 0, 8, "f32"), info())
    assert "a known number of rows" in reason("gemv-shared", linear("t", 8, 8, "f32").canonical(), info())
    assert "a constant right-hand side" in reason("gemv-shared", matmul("f32[1,8]", "f32[8,8]"), info())
    gated = _inferred("glu_matmul", GLU_MATMUL, "f32[1,6], f32[8,6]@const, f32[8,6]", {"transpose_rhs": True})
    assert "a constant right-hand side" in reason("gemv-shared", gated, info())
    assert "multiple of four columns" in reason("gemm", linear(9, 7, 8, "f32", "f16"), info())
    assert "not f64" in reason("direct", matmul("f64[1,8]", "f64[8,8]"), info())
    assert "same number of elements apart" in reason(
        "gemm", matmul("f32[2,3,9,20]:[1999,600,20,1]", "f32[2,3,20,12]"), info()
    )
    assert "rows of at least one" in reason(
        "gemv-shared", normed("f32[1,0]", "f32[8,0]@const", transpose_rhs=True), info()
    )
    assert "weights of q8 or q4, not f32" in reason("gemv-integer", one, info("subgroup", "dot4"))
    assert reason("gemv-bytes", one, info("subgroup", "dot4")) == "takes rows of q8a, not f32"
    assert reason("gemv-integer", linear(1, 8, 32, "q4", "q8a"), EVERYTHING) == "takes rows of floats, not q8a"
    assert "no dot products of bytes" in reason("gemv-bytes", linear(1, 8, 32, "q4", "q8a"), info("subgroup"))
    assert "no subgroups" in reason("gemv-bytes", linear(1, 8, 32, "q4", "q8a"), info("dot4"))
    assert "1 to 8 rows, not 9" in reason("gemv-bytes-shared", linear(9, 8, 32, "q4", "q8a"), info("dot4"))
    for rows, device, why in (
        (9, EVERYTHING, "1 to 8 rows, not 9"),
        (1, info("dot4"), "the device has no subgroups"),
        (1, info("subgroup"), "no dot products of bytes"),
    ):
        made = _inferred("quantize_matmul", QUANTIZE_MATMUL, f"f32[{rows},32], q4[8,32]@const, _, _", {})
        assert why in reason("gemv-quantising", made, device)
    assert "no dot products of bytes" in reason("gemv-integer", linear(1, 8, 32, "q4"), info("subgroup"))
    assert reason("gemv-integer", linear(1, 8, 32, "q4"), info("dot4")) == "the device has no subgroups"
    for name in ("gemv-shared", "gemm", "direct"):
        assert BY_NAME["matmul", name].judge(one, info()) == Accept()


@pytest.mark.parametrize(
    ("w", "variant"),
    [
        *((w, v) for w in WEIGHTS for v in ("gemv", "gemm")),
        *((w, v) for w in QUANTISED for v in ("gemv-integer", "gemv-bytes", "gemm-integer")),
    ],
)
def test_a_weight_larger_than_a_binding_is_read_in_pieces(gpu: Session, w: str, variant: str) -> None:
    """As embeddings of large vocabularies are: forced by a device that binds little."""
    x = "q8a" if variant in ("gemv-bytes", "gemm-integer") else "f32"
    problem = matmul(f"{x}[3,64]", f"{w}[300,64]@const", "f32[300]", transpose_rhs=True)
    known = gpu.device.info
    column = {"f32": 256, "f16": 128, "bf16": 128, "q8": 64, "q4": 32}[w]
    limits = {**dict(known.limits), "max-storage-buffer-binding-size": 130 * column}
    small = dataclasses.replace(known, limits=tuple(sorted(limits.items())))
    made = BY_NAME["matmul", variant]
    row: Config = {"columns": 4, "tiles": 1, "threads": 32, "unroll": 1}
    words: Config = dict(zip(gemm_integer.NAMES, gemm_integer.SMALL_TILE, strict=True))
    config = {"gemm": SMALL, "gemm-integer": words, "gemv-bytes": {**row, "span": 2}}.get(variant, row)
    kernel = made.build_kernel(problem, config, small)
    assert [dict(d.parameters)["first"] for d in kernel.dispatches] == [0, 128, 256]
    firsts = [b for d in kernel.dispatches for b in d.bindings if b.name in ("w", "b_w")]
    assert all(b.start % 256 == 0 and 0 < b.nbytes <= 130 * column for b in firsts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.device, "_info", small)
        patch.setattr(gpu.device, "_kernels", {})
        verify(gpu, problem, variant, config)


@pytest.mark.parametrize("w", ["q8", "q4"])
def test_packed_quantised_weights_have_the_same_numbers(w: str) -> None:
    """The place of every number and scale as documented, recomputed from the bytes."""
    weight = quantize(np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32), w)
    layout = Quads(w, 6, 96)
    data = layout.packs().pack(weight)
    words = data[: 16 * layout.quads * layout.units].view(np.uint8).reshape(layout.quads, layout.units, 4, 4)
    scales = data[words.size :].view(np.float16).reshape(layout.quads, layout.groups, 4)
    for column in range(6):
        for k in range(96):
            quad, lane = divmod(column, 4)
            if w == "q8":
                number = int(words[quad, k // 4, lane, k % 4].view(np.int8))
            else:
                number = int(words[quad, k // 8, lane, k % 4] >> 4 * (k % 8 // 4) & 15) - 8
            assert number * np.float32(scales[quad, k // 32, lane]) == dequantize(weight)[column, k]


def test_pieces_cover_a_weight() -> None:
    found = list(pieces(Quads("q4", 1000, 64), info(max_storage_buffer_binding_size=300 * 32)))
    assert [(p.first, p.columns) for p in found] == [(0, 256), (256, 256), (512, 256), (768, 256)]
