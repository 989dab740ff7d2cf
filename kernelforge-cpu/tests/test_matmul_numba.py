"""`blocked` and `parallel` matmul: f32 of any shape and layout, dynamic dimensions everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from matmul_checks import Products, device, inputs, matmul, variant

from kernelforge.problem import Problem
from kernelforge.variant import Reject

STATIC = [
    *(
        matmul(f"f32[{m},{k}]", f"f32[{k},{n}]@const")
        for m, n, k in ((1, 1, 1), (0, 5, 3), (3, 0, 4), (4, 5, 0), (1, 31, 17), (33, 70, 5), (40, 300, 290))
    ),
    *(
        matmul("f32[9,20]", "f32[45,20]", "f32[45]", "f32[9,45]", transpose_rhs=True, epilogue=e)
        for e in ("none", "silu")
    ),
    *(matmul("f32[9,20]", "f32[20,45]", "f32[45]", "f32[9,45]", epilogue=e) for e in ("gelu", "gelu_tanh")),
    matmul("f32[5,9]", "f32[5,70]", transpose_lhs=True),
    matmul(
        "f32[5,9]:[3,40]", "f32[70,5]:[1,90]", "f32[70]:[3]", "f32[9,70]:[1,9]", transpose_lhs=True, transpose_rhs=True
    ),
    matmul("f32[2,3,7,5]:[10,300,30,1]", "f32[2,3,5,9]"),
    matmul("f32[4,3,8]", "f32[8,6]", "", "f32[4,3,6]"),
]
DYNAMIC = [
    matmul("f32[m,k]", "f32[k,n]", "f32[n]", "f32[m,n]", epilogue="silu"),
    matmul("f32[b,m,k]", "f32[b,n,k]", transpose_rhs=True),
    matmul("f32[b,h,m,m]", "f32[b,h,m,16]"),
]


@pytest.fixture(scope="module", params=["blocked", "parallel"])
def products(request: pytest.FixtureRequest) -> Products:
    small = {"mc": 32, "kc": 128, "nc": 128}
    return Products([*((p, None) for p in STATIC), *((p, small) for p in DYNAMIC)], request.param)


@pytest.mark.parametrize("index", range(len(STATIC)), ids=lambda i: str(STATIC[i]))
def test_static_problems(products: Products, index: int) -> None:
    products.check(index)


@pytest.mark.parametrize("index", range(len(DYNAMIC)), ids=lambda i: str(DYNAMIC[i]))
@pytest.mark.parametrize("sizes", [(2, 3, 33, 5, 40), (1, 1, 1, 1, 1), (2, 2, 0, 7, 7), (1, 2, 40, 140, 130)])
def test_dynamic_dimensions(products: Products, index: int, sizes: tuple[int, ...]) -> None:
    products.check(len(STATIC) + index, dict(zip("bhmkn", sizes, strict=True)), parts=(1, 7))


def test_what_is_not_finite_spreads_as_in_the_formula(products: Products) -> None:
    index = STATIC.index(matmul("f32[9,20]", "f32[20,45]", "f32[45]", "f32[9,45]", epilogue="gelu"))
    for bad in (np.nan, np.inf, -np.inf):
        arrays = inputs(STATIC[index])
        assert arrays[0] is not None
        arrays[0][3, 5] = bad
        products.check(index, arrays=arrays, parts=(1,))


def test_only_parallel_is_shared_by_threads() -> None:
    p, d = matmul("f32[512,512]", "f32[512,512]"), device(threads=8)
    for name, many in (("blocked", 1), ("parallel", 32)):
        v = variant(p, name)
        (phase,) = v.build_kernel(p, v.default_config(p, d), d).phases
        assert phase.parts((), 8) == many
    tiny = matmul("f32[4,4]", "f32[4,4]")
    (phase,) = variant(tiny, "parallel").build_kernel(tiny, {"mc": 32, "kc": 256, "nc": 256}, d).phases
    assert phase.parts((), 8) == 1


@pytest.mark.parametrize("name", ["blocked", "parallel"])
def test_it_takes_f32_alone(name: str) -> None:
    p: Problem = matmul("f32[2,3]", "bf16[3,4]")
    assert variant(p, name).judge(p, device()) == Reject("takes f32, not bf16")
