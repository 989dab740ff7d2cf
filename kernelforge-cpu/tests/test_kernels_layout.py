"""Copies where a layout op cannot be a view; and the loop nests below all strided kernels."""

from __future__ import annotations

import pytest
from kernel_checks import Kernels, problem, verdict

from kernelforge.problem import Problem, TensorType
from kernelforge.variant import Reject
from kernelforge_cpu.isa import host_targets
from kernelforge_cpu.kernels.axes import (
    ONE,
    ZERO,
    Axis,
    Size,
    broadcast_strides,
    loop_nest,
    shared,
    size_of,
    strides_of,
)
from kernelforge_cpu.kernels.layout import takes_reshape

PROBLEMS = [
    problem("reshape", "f32[4,6]:[1,4]", shape=(24,)),
    problem("reshape", "bf16[3,5,8]:[100,16,2]", shape=(5, -1)),
    problem("reshape", "i32[1]", shape=()),
    problem("transpose", "f32[7,33]", perm=(1, 0)),
    problem("transpose", "bf16[3,4,40]", perm=(1, 0, 2)),
    problem("transpose", "i8[3,4,2,5]", perm=(3, 1, 0, 2)),
    problem("slice", "f32[6,9,5]", starts=(1, 0, 2), sizes=(2, -1, -1)),
    problem("slice", "f16[4,90]", starts=(3, 1), sizes=(1, 77)),
    problem("split", "f32[7,50]", axis=-1, sizes=(32, 1, 17)),
    problem("split", "bf16[6,4]:[1,6]", axis=0, sizes=(0, 2, 4)),
    problem("concat", "f32[3]", axis=0),
    problem("concat", "f32[3,8]", "f32[3,1]:[9,4]", "f32[3,20]", axis=-1),
    problem("concat", "i64[2,3]", "i64[4,3]", axis=0),
    problem("concat", "f16[0,3]", "f16[4,3]", axis=0),
]
DYNAMIC = [
    problem("transpose", "f32[3,tokens,8]", perm=(1, 0, 2)),
    problem("reshape", "f32[3,tokens,8]", shape=(-1, 24)),
    problem("slice", "f32[4,tokens,8]", starts=(1, 0, 2), sizes=(2, -1, 5)),
    problem("split", "bf16[4,tokens,9]", axis=0, sizes=(1, 3)),
    problem("concat", "f32[tokens,5]", "f32[tokens,40]", axis=1),
    problem("concat", "i32[2,tokens]", "i32[3,tokens]", axis=0),
]


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels([*PROBLEMS, *DYNAMIC], request.param)


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_equals_reference(kernels: Kernels, p: Problem) -> None:
    kernels.check(p)


@pytest.mark.parametrize("p", DYNAMIC, ids=str)
def test_dynamic_dimensions(kernels: Kernels, p: Problem) -> None:
    for tokens in (0, 1, 21):
        kernels.check(p, sizes={"tokens": tokens})


def test_a_reshape_into_a_strided_result_is_refused() -> None:
    whole = problem("reshape", "f32[4,6]:[1,4]", shape=(24,))
    strided = Problem(whole.op, whole.operands, (TensorType((24,), "f32", (2,)),), whole.attrs)
    assert takes_reshape(strided, None) == Reject("writes a contiguous result")  # type: ignore[arg-type]  # not looked at
    assert verdict(whole).__class__.__name__ == "Accept"


class TestLoopNest:
    def test_a_contiguous_tensor_is_one_loop_whatever_is_dynamic(self) -> None:
        t = TensorType((3, "b", 1, "t", 8), "f32")
        assert loop_nest(t.shape, strides_of(t), strides_of(t)) == [Axis(Size(24, ("b", "t")), (ONE, ONE))]

    def test_gaps_and_broadcasting_keep_loops_apart(self) -> None:
        rows = TensorType(("t", 4, 16), "f32", (100, 16, 1))
        bias = TensorType((16,), "f32")
        nest = loop_nest(rows.shape, strides_of(rows), broadcast_strides(bias, rows.shape))
        assert nest == [
            Axis(Size(1, ("t",)), (Size(100), ZERO)),
            Axis(Size(4), (Size(16), ZERO)),
            Axis(Size(16), (ONE, ONE)),
        ]

    def test_axes_repeated_together_merge(self) -> None:
        scalar = TensorType((1, 1), "f32")
        assert loop_nest((5, 7), broadcast_strides(scalar, (5, 7))) == [Axis(Size(35), (ZERO,))]

    def test_sizes(self) -> None:
        assert size_of(2, "b", 3, "a") == Size(6, ("a", "b"))
        assert size_of(0, "b") == ZERO
        assert size_of(2, "b").evaluate({"b": 5}) == 10


def test_little_work_is_not_shared() -> None:
    p = problem("silu", "f32[tokens,16]").canonical()
    parts = shared(p, size_of("?0", 16), grain=160)
    assert [parts([tokens], 4) for tokens in (0, 9, 19, 20, 30, 1000)] == [1, 1, 1, 2, 3, 4]
