"""rms_norm, layer_norm, add_rms_norm and softmax against their references."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import F32, Array, Arrays, Kernels, problem, verdict

from kernelforge.dtype import to_numpy
from kernelforge.problem import Problem
from kernelforge.variant import Reject
from kernelforge_cpu.isa import host_targets


def wide(arrays: Arrays, i: int) -> Array:
    a = arrays[i]
    assert a is not None
    return a.astype(np.float64)


def roundings(n: int) -> float:
    """Of a sum of n terms in 16 or more partial sums, and of the few operations after it."""
    return n / 16 + 16


def from_rms(arrays: Arrays, exact: list[Array]) -> list[Array]:
    return [roundings(e.shape[-1]) * F32 * np.abs(e) + 2.0**-126 for e in exact]


def from_add_rms(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """The sum is rounded once; that error reaches the norm, where terms may have cancelled."""
    total, norm = exact
    magnitude = np.abs(wide(arrays, 0)) + np.abs(wide(arrays, 1))
    gain = np.where(total == 0.0, 0.0, np.abs(norm / total))
    return [F32 * magnitude, F32 * (roundings(norm.shape[-1]) * np.abs(norm) + magnitude * gain) + 2.0**-126]


def from_layer_norm(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """x - mean cancels: its error is that of x and of the mean."""
    x, weight = wide(arrays, 0), wide(arrays, 1)
    bias = np.zeros(()) if arrays[2] is None else wide(arrays, 2)
    scale = np.abs(weight) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    spread = np.abs(x) + np.abs(x).mean(axis=-1, keepdims=True)
    return [F32 * (roundings(x.shape[-1]) * (np.abs(exact[0]) + np.abs(bias) + scale * spread)) + 2.0**-126]


def from_softmax(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """The error of x - max is the relative error of its exponential."""
    x = wide(arrays, 0)
    if x.size == 0:
        return [x]
    drop = np.nan_to_num(np.abs(x - x.max(axis=-1, keepdims=True)), posinf=0.0)
    return [np.abs(exact[0]) * F32 * (2 * drop + roundings(x.shape[-1])) + 2.0**-126]


BOUNDS = {"rms_norm": from_rms, "add_rms_norm": from_add_rms, "layer_norm": from_layer_norm, "softmax": from_softmax}

SHAPES = ("[1,1]", "[5]", "[0,8]", "[3,64]", "[2,3,129]", "[4,7,33]:[400,50,1]")
PROBLEMS: list[Problem] = []
for shape in SHAPES:
    n = shape.partition("]")[0].rpartition(",")[2].strip("[")
    PROBLEMS += [
        problem("rms_norm", f"f32{shape}", f"bf16[{n}]@const", eps=1e-6),
        problem("layer_norm", f"f32{shape}", f"f32[{n}]", f"f16[{n}]"),
        problem("add_rms_norm", f"f32{shape}", f"bf16{shape}", f"f32[{n}]"),
        problem("softmax", f"f32{shape}"),
    ]
for dtype in ("bf16", "f16"):
    x = f"{dtype}[3,70]"
    PROBLEMS += [
        problem("rms_norm", x, "f32[70]"),
        problem("layer_norm", x, f"{dtype}[70]"),
        problem("add_rms_norm", x, x, f"{dtype}[70]"),
        problem("softmax", x, axis=1),
    ]
DYNAMIC = [problem("rms_norm", "f32[tokens,3,40]:[500,40,1]", "f32[40]"), problem("softmax", "f32[tokens,keys]")]


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels([*PROBLEMS, *DYNAMIC], request.param)


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_against_reference(kernels: Kernels, p: Problem) -> None:
    kernels.check(p, BOUNDS[p.op.partition(".")[2]])


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_dynamic_dimensions(kernels: Kernels, tokens: int) -> None:
    kernels.check(DYNAMIC[0], from_rms, {"tokens": tokens})
    for keys in (1, 100):
        kernels.check(DYNAMIC[1], from_softmax, {"tokens": tokens, "keys": keys})


def test_special_values_stay_in_their_row(kernels: Kernels) -> None:
    for p in PROBLEMS:
        if p.operand(0).shape != (3, 64):
            continue
        for value in (np.nan, np.inf, -np.inf):
            x = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float32)
            x[1, 63] = value
            others: list[Array | None] = [
                None if t is None else np.ones(t.static_shape(), to_numpy(t.dtype)) for t in p.operands[1:]
            ]
            kernels.check(p, BOUNDS[p.op.partition(".")[2]], arrays=(x, *others), parts=(1,))


def test_softmax_of_large_and_of_hidden_scores(kernels: Kernels) -> None:
    p = next(p for p in PROBLEMS if p.op.endswith("softmax") and p.operand(0).shape == (3, 64))
    x = np.linspace(-300, 1e4, 192, dtype=np.float32).reshape(3, 64)
    x[0, 5:] = -np.inf
    x[1, :] = -np.inf  # NaN, as in numpy
    kernels.check(p, from_softmax, arrays=[x], parts=(1, 2))


def test_layer_norm_of_a_far_off_mean(kernels: Kernels) -> None:
    p = next(p for p in PROBLEMS if p.op.endswith("layer_norm") and p.operand(0).shape == (3, 64))
    x = (1000 + np.random.default_rng(1).standard_normal((3, 64))).astype(np.float32)
    arrays = (x, np.ones(64, np.float32), np.zeros(64, np.float16))
    kernels.check(p, from_layer_norm, arrays=arrays, parts=(1,))


def test_refusals() -> None:
    assert verdict(problem("softmax", "f32[2,3]", axis=0)) == Reject("works along the last axis, not along axis 0 of 2")
    assert verdict(problem("rms_norm", "f32[2,3]:[1,2]", "f32[3]")) == Reject(
        "takes tensors whose last axis has stride 1, not f32[2,3]:[1,2]"
    )
