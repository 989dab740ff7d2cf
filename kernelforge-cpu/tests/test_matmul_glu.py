"""`vectorized` glu_matmul: both products, every activation, constant and other weights, low and full tiles."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import problem
from matmul_checks import WIDTHS, Products, device, inputs, variant

from kernelforge.problem import Problem


def glu(x: str, rhs: str, transpose_rhs: bool = False, activation: str = "silu", up: str = "") -> Problem:
    return problem("glu_matmul", x, rhs, up or rhs, transpose_rhs=transpose_rhs, activation=activation)


PROBLEMS = [
    *(glu("f32[9,37]", "f32[37,70]@const", activation=a) for a in ("silu", "gelu", "gelu_tanh")),
    *(glu(f"f32[{m},20]", "bf16[45,20]@const", True) for m in (1, 2, 5, 6, 7)),
    glu("f32[1,600]", "f16[64,600]@const", True),
    glu("f32[2,3,8]", "f16[5,8]@const", True),
    glu("f32[7,20]:[50,1]", "f32[20,33]"),
    glu("f32[7,20]", "bf16[33,20]:[40,2]", True),
    glu("f32[7,20]", "f32[20,33]", up="f32[20,33]@const"),
    glu("bf16[7,20]", "bf16[20,33]@const", activation="gelu"),
    *(glu(f"f32[{m},{k}]", f"f32[{k},{n}]@const") for m, k, n in ((1, 1, 1), (0, 4, 4), (4, 0, 4), (4, 4, 0))),
]


@pytest.fixture(scope="module", params=WIDTHS)
def products(request: pytest.FixtureRequest) -> Products:
    return Products([(p, None) for p in PROBLEMS], lanes=request.param)


@pytest.mark.parametrize("index", range(len(PROBLEMS)), ids=lambda i: str(PROBLEMS[i]))
def test_static_problems(products: Products, index: int) -> None:
    products.check(index)


def test_any_number_of_rows() -> None:
    made = Products([(glu("f32[tokens,40]", "bf16[97,40]@const", True), None)])
    for tokens in (0, 1, 3, 6, 11, 40):
        made.check(0, {"tokens": tokens}, parts=(1, 7))


@pytest.mark.parametrize("panels", [1, 2], ids=["apart", "together"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gate_and_up_in_one_tile_or_one_after_the_other(panels: int, dtype: str) -> None:
    p = glu("f32[tokens,40]", f"{dtype}[70,40]@const", True)
    configs = [
        c for c in variant(p, "vectorized").config_space(p, device()) if c["panels"] == panels and c["group"] == 2
    ]
    assert configs
    made = Products([(p, c) for c in configs])
    for i in range(len(configs)):
        made.check(i, {"tokens": 13}, parts=(1, 3))


def test_a_gate_that_is_not_finite_spreads_to_its_element_alone() -> None:
    p = glu("f32[8,40]", "f32[40,70]@const")
    made = Products([(p, None)])
    for operand, at in ((0, (3, 5)), (1, (7, 69)), (2, (7, 3))):
        arrays = inputs(p)
        array = arrays[operand]
        assert array is not None
        array[at] = np.inf
        made.check(0, arrays=arrays, parts=(1,))
