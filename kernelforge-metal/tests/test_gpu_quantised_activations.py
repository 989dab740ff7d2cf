"""Activations in q8a: written as the quantiser writes them, bit by bit, and multiplied by quantised weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import GROUP, to_numpy
from kernelforge.problem import Problem, parse_tensor_type
from kernelforge.quant import dequantize, quantize
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import Config, DeviceInfo, Reject
from kernelforge_metal.kernels.matmul import gemm_integer
from kernelforge_metal.kernels.matmul.gemm import NAMES
from kernelforge_metal.kernels.quantised_activations import takes_floats

DEFS = {op.name: op for op in OPS}
FORMAT = "q8a"


def problem(op: str, *operands: str, **attrs: Any) -> Problem:
    return DEFS[op].problem([parse_tensor_type(t) for t in operands], attrs).canonical()


def numbers(rows: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Groups of every scale, among them halves to round, zeros, and the smallest scale that is not 0."""
    rng = np.random.default_rng(5)
    groups = rng.standard_normal((rows * width // GROUP, GROUP), np.float32)
    groups *= np.exp2(rng.uniform(-110, 120, (len(groups), 1))).astype(np.float32)
    halves = rng.integers(-127, 127, groups[::3].shape) + 0.5  # times d: the last bit of 1 / d decides
    halves[:, 5] = 127
    groups[::3] = halves * rng.uniform(1, 2, (len(halves), 1))
    groups[1] = 0.0
    groups[2] = np.linspace(-1, 1, GROUP) * 127 * 2.0**-126
    groups[3] = np.linspace(-1, 1, GROUP) * np.nextafter(np.float32(127 * 2.0**-126), np.float32(0))
    groups[4, :2] = 3.4e38, -3e38
    for group, value in ((5, np.nan), (7, np.inf), (9, -np.inf)):
        groups[group, group] = value
    return groups.reshape(rows, width)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_groups_are_those_of_the_quantiser(gpu: Session, plain_gpu: Session, dtype: str) -> None:
    """Rows of three groups, which end within a workgroup."""
    with np.errstate(all="ignore"):
        x = numbers(201, 96).astype(to_numpy(dtype))
    x[np.abs(x) < np.finfo(np.float32).tiny] *= 0  # which this GPU may or may not see
    want = quantize(x, FORMAT)
    for session in (gpu, plain_gpu):
        executable = session.compile_problem(problem("quantize", f"{dtype}[n,96]", format=FORMAT))
        for rows in (201, 1, 0):
            (found,) = executable.run({"x": x[:rows]})
            np.testing.assert_array_equal(np.asarray(found).view(np.uint32), want[:rows].view(np.uint32))


@pytest.mark.parametrize(
    "p",
    [
        problem("quantize", "f32[3,5,64]:[999,100,1]", format=FORMAT),
        problem("quantize", "f32[7,64]:[65,1]", format=FORMAT),  # no row but the first begins where four are one load
        problem("quantize", "bf16[5,32]:[1,5]", format=FORMAT),
        problem("rms_norm_quantize", "f32[3,96]:[101,1]", "bf16[96]"),
        problem("rms_norm_quantize", "f16[2,4256]", "f32[4256]@const"),  # a row is read twice
    ],
    ids=str,
)
def test_layouts(gpu: Session, p: Problem) -> None:
    assert gpu.select(p).variant.name == "wgsl"
    work = Workload(gpu, p)
    work.verify(gpu.compile_problem(p, constants=work.constants))


def test_what_a_norm_makes_of_nan_and_infinity(gpu: Session) -> None:
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    x[1, 3], x[2, 40] = np.nan, np.inf
    executable = gpu.compile_problem(problem("rms_norm_quantize", "f32[n,64]", "f32[64]"))
    (found,) = executable.run({"x": x, "weight": np.ones(64, np.float32)})
    spoilt = np.isnan(dequantize(np.asarray(found))).reshape(4, 2, GROUP).all(axis=2)
    assert spoilt.tolist() == [[False, False], [True, True], [False, True], [False, False]]
    assert not np.asarray(found)["scale"][2, 0]  # divided by infinity


@pytest.mark.parametrize("weight", ["q8", "q4"])
@pytest.mark.parametrize(("variant", "n"), [("gemm-integer", 45), ("gemm", 45), ("direct", 12)])
def test_products(gpu: Session, variant: str, n: int, weight: str) -> None:
    """Rows and columns that fill no tile, batches that are no rows of one matrix."""
    w = f"{weight}[{n},96]@const"
    types = [parse_tensor_type(t) for t in ("q8a[2,3,96]", w, f"bf16[{n}]", f"f32[2,3,{n}]:[{5 * n},{n},1]")]
    batched = DEFS["matmul"].problem(types, {"transpose_rhs": True, "epilogue": "silu"})
    gated = problem("glu_matmul", "q8a[37,96]", w, w, transpose_rhs=True)
    for p in (batched, gated):
        work = Workload(gpu, p)
        work.verify(gpu.compile_problem(p, constants=work.constants, variant=variant))


SLABS: dict[str, tuple[int, ...]] = {
    "gemm": (32, 32, 32, 4, 4, 32, 3, 4),
    "gemm-integer": (32, 64, 2, 4, 4, 4, 32, 1),
}
"""Configs of two groups in workgroup memory; in one more threads than units of q4."""


@pytest.mark.parametrize(("variant", "weight"), [("gemm", "q8"), ("gemm-integer", "q8"), ("gemm-integer", "q4")])
def test_a_slab_that_is_not_full(gpu: Session, variant: str, weight: str) -> None:
    p = problem("matmul", "q8a[33,96]", f"{weight}[36,96]@const", transpose_rhs=True)
    work = Workload(gpu, p)
    names = NAMES if variant == "gemm" else gemm_integer.NAMES
    config: Config = dict(zip(names, SLABS[variant], strict=True))
    work.verify(gpu.compile_problem(p, constants=work.constants, variant=variant, config=config))


@pytest.mark.parametrize("variant", ["gemm", "gemm-integer"])
def test_a_spoilt_group_spoils_its_row_alone(gpu: Session, variant: str) -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 64), (12, 64)))
    x[5, 3] = np.nan
    p = problem("matmul", "q8a[40,64]", "q8[12,64]@const", transpose_rhs=True)
    executable = gpu.compile_problem(p, constants={"rhs": quantize(weight, "q8")}, variant=variant)
    (found,) = executable.run({"lhs": quantize(x, FORMAT)})
    np.testing.assert_array_equal(np.isnan(np.asarray(found)).all(axis=1), np.arange(40) == 5)
    assert np.isfinite(np.delete(np.asarray(found), 5, axis=0)).all()


def test_formats_of_weights_are_not_computed_by_kernels(gpu: Session) -> None:
    found = gpu.select(problem("quantize", "f32[3,64]", format="q4")).decisions
    verdicts = {d.variant.name: d.verdict for d in found}
    assert verdicts["wgsl"] == Reject("makes q8a; q4 is computed when a module is compiled")
    wide = takes_floats(problem("rms_norm_quantize", "f64[3,64]", "f64[64]"), gpu.device.info)
    assert wide == Reject("takes f32, f16, bf16, not f64")


def test_products_in_integers_want_bytes_and_their_dot_products() -> None:
    weight = "q4[12,64]@const"
    device = DeviceInfo("gpu", "a GPU", "", frozenset(), ())
    verdict = gemm_integer.takes_integers(problem("matmul", "q8a[40,64]", weight, transpose_rhs=True), device)
    assert isinstance(verdict, Reject)
    assert verdict.reason.startswith("the device has no dot products of bytes")
    verdict = gemm_integer.takes_integers(problem("matmul", "f32[40,64]", weight, transpose_rhs=True), device)
    assert verdict == Reject("takes rows of q8a, not f32")


@pytest.mark.parametrize("op", ["matmul", "glu_matmul"])
def test_many_rows_are_multiplied_in_integers(gpu: Session, op: str) -> None:
    weights = ["q4[12,64]@const"] * (2 if op == "glu_matmul" else 1)
    assert gpu.select(problem(op, "q8a[n,64]", *weights, transpose_rhs=True)).variant.name == "gemm-integer"
