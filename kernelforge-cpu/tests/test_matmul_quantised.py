"""`quantised` matmul and glu_matmul: both formats, low and full tiles, every vector width, the packed layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from kernel_checks import problem
from matmul_checks import WIDTHS, Products, device, inputs, matmul, variant

from kernelforge.problem import Problem
from kernelforge.quant import Array, dequantize, quantize
from kernelforge.variant import Accept, Reject
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.kernels.matmul.groups import Groups

FORMATS = ("q8", "q4")


def linear(m: int | str, n: int, k: int, dtype: str, x: str = "f32", **attrs: str) -> Problem:
    return matmul(f"{x}[{m},{k}]", f"{dtype}[{n},{k}]@const", transpose_rhs=True, **attrs)


def glu(m: int | str, n: int, k: int, dtype: str, x: str = "f32", activation: str = "silu") -> Problem:
    rhs = f"{dtype}[{n},{k}]@const"
    return problem("glu_matmul", f"{x}[{m},{k}]", rhs, rhs, transpose_rhs=True, activation=activation)


PROBLEMS = [
    p
    for q in FORMATS
    for p in (
        *(linear(m, n, k, q) for m, n, k in ((1, 1, 32), (1, 64, 96), (2, 97, 64), (5, 33, 32), (13, 70, 160))),
        *(linear(m, n, k, q) for m, n, k in ((0, 5, 32), (4, 5, 0), (4, 0, 32), (1, 16, 1056))),
        linear(3, 40, 64, q, "bf16"),
        linear(9, 40, 64, q, "f16", epilogue="gelu"),
        matmul("f32[7,64]", f"{q}[45,64]@const", "bf16[45]", "f32[7,45]", transpose_rhs=True, epilogue="silu"),
        matmul("f32[2,3,64]:[999,100,1]", f"{q}[45,64]@const", "", "f32[2,3,45]", transpose_rhs=True),
        matmul("f32[64,7]", f"{q}[45,64]@const", transpose_rhs=True, transpose_lhs=True),
        *(glu(m, 50, 64, q, activation=a) for m, a in ((1, "silu"), (7, "gelu"), (14, "gelu_tanh"))),
        glu(3, 5, 32, q, "bf16"),
        glu(2, 16, 0, q),
    )
]


@pytest.fixture(scope="module", params=WIDTHS)
def products(request: pytest.FixtureRequest) -> Products:
    return Products([(p, None) for p in PROBLEMS], "quantised", lanes=request.param)


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=lambda i: str(PROBLEMS[i]))
def test_static_problems(products: Products, index: int) -> None:
    products.check(index)


@pytest.mark.parametrize("q", FORMATS)
def test_any_number_of_rows(q: str) -> None:
    made = Products([(linear("tokens", 97, 64, q), None), (glu("tokens", 40, 64, q), None)], "quantised")
    for index, tokens in itertools.product((0, 1), (0, 1, 2, 5, 6, 7, 12, 13, 40)):
        made.check(index, {"tokens": tokens}, parts=(1, 7))


@pytest.mark.parametrize("q", FORMATS)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_every_config(q: str, lanes: int) -> None:
    """Corners of the space: the smallest and the largest of each parameter, blocks of the inner dimension."""
    p = linear(26, 75, 1120, q)
    v, info = variant(p, "quantised"), device(lanes)
    space = v.config_space(p.canonical(), info)
    ends = [{values[0], values[-1]} for _, values in space.parameters]
    names = [name for name, _ in space.parameters]
    configs = [c for values in itertools.product(*ends) if (c := dict(zip(names, values, strict=True))) in space][::3]
    assert len(configs) >= 4
    made = Products([(p, c) for c in configs], "quantised", lanes=lanes)
    for index in range(len(configs)):
        made.check(index, parts=(1, 3))


@pytest.mark.parametrize("q", FORMATS)
def test_weights_of_every_scale_and_value(q: str) -> None:
    """Zero and subnormal scales, the ends of the values."""
    rng = np.random.default_rng(3)
    p = linear(4, 48, 64, q)
    arrays = inputs(p)
    groups = quantize(rng.standard_normal((48, 64)), q)
    groups["values"] = rng.integers(0, 256, groups["values"].shape).astype(np.uint8).view(groups["values"].dtype)
    groups["scale"] = np.resize(np.array([1, -1, 0, 6e-8, -6e-5, 65504, 0.1], np.float16), groups.shape)
    Products([(p, None)], "quantised").check(0, arrays=[arrays[0], groups, None, None])


def test_infinite_activations_reach_their_row_alone() -> None:
    p = linear(8, 40, 64, "q4")
    arrays = inputs(p)
    x, weight = arrays[0], arrays[1]
    assert x is not None
    assert weight is not None
    clean = x.copy()
    x[3, 5] = np.inf
    made = Products([(p, None)], "quantised")
    got, without = made.run(0, arrays), made.run(0, [clean, weight, None, None])
    rest = np.arange(8) != 3
    np.testing.assert_array_equal(got[rest], without[rest])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got[3], (np.inf * dequantize(weight)[:, 5]).astype(np.float32))


@pytest.mark.parametrize("q", FORMATS)
def test_the_packed_layout_is_as_documented(q: str) -> None:
    weight = quantize(np.random.default_rng(0).standard_normal((11, 96)), q)
    layout = Groups(q, vectors=2, lanes=4, columns=11, inner=96)
    packed = layout.packed(weight)
    assert len(packed) == layout.scales + 2 * 2 * 3 * 8
    assert layout.scales == 2 * 3 * layout.group_bytes
    scales = packed[layout.scales :].view(np.float16).reshape(2, 3, 8).astype(np.float32)
    numbers = np.zeros((16, 96), np.float32)
    for panel, group, octet, step, column in np.ndindex(2, 3, 4, 8, 8):
        value = _stored(packed[: layout.scales], layout, panel, group, octet, step, column)
        inner = group * 32 + octet * layout.stride + layout.step(step)
        numbers[panel * 8 + column, inner] = value * scales[panel, group, column]
    np.testing.assert_array_equal(numbers[:11], dequantize(weight))
    np.testing.assert_array_equal(numbers[11:], 0)


def _stored(packed: Array, layout: Groups, panel: int, group: int, octet: int, step: int, column: int) -> int:
    if layout.dtype == "q8":
        return int(packed.view(np.int8).reshape(2, 3, 32, 8)[panel, group, 8 * octet + step, column])
    nibble = int(packed.view("<u4").reshape(2, 3, 4, 8)[panel, group, octet, column]) >> 4 * step & 15
    return nibble - 16 if nibble >= 8 else nibble


def test_rows_of_one_and_of_many_share_a_packed_weight() -> None:
    info = device()
    keys = set()
    for p in (linear(1, 576, 64, "q4"), linear("t", 576, 64, "q4").canonical()):
        v = variant(p, "quantised")
        keys.add(v.build_kernel(p, v.default_config(p, info), info).packs[1].key)
    assert keys == {f"groups{2 * host_target().lanes if host_target().lanes == 16 else host_target().lanes}:q4"}


@pytest.mark.parametrize(
    ("p", "reason"),
    [
        (matmul("f32[3,32]", "f32[5,32]@const", transpose_rhs=True), "takes quantised weights, not f32"),
        (matmul("f32[3,32]", "q8[5,32]", transpose_rhs=True), "takes constant weights of rank 2, not q8[5,32]"),
        (matmul("f32[2,3,32]", "q8[2,5,32]@const", transpose_rhs=True), "takes constant weights of rank 2"),
        (matmul("f64[3,32]", "q8[5,32]@const", transpose_rhs=True), "takes f32, bf16, f16, not f64"),
        (matmul("f32[3,32]", "q8[n,32]@const", transpose_rhs=True), "takes a static number of columns, not n"),
    ],
)
def test_refusals(p: Problem, reason: str) -> None:
    verdict = variant(p, "quantised").judge(p, device())
    assert isinstance(verdict, Reject)
    assert verdict.reason.startswith(reason)


def test_other_variants_say_that_they_take_no_quantised_weights() -> None:
    p = linear(3, 5, 32, "q8")
    verdict = variant(p, "vectorized").judge(p, device())
    assert verdict == Reject("takes f32, bf16, f16, not q8")
    assert variant(p, "quantised").judge(p, device()) == Accept()
