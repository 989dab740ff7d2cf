from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer.rope import ATTRIBUTES, ROPE, RopeAttributes, inverse_frequencies
from kernelforge.dtype import from_numpy
from kernelforge.errors import UsageError
from kernelforge.graph import Graph
from kernelforge.problem import Attr, TensorType

Array = np.ndarray[Any, np.dtype[Any]]


def rotate(x: Array, positions: list[int], **attrs: Attr) -> Array:
    index = np.array(positions, np.int32)
    types = [TensorType(x.shape, from_numpy(x.dtype)), TensorType(index.shape, "i32")]
    problem = ROPE.problem(types, {"max_position": 1 << 20, **attrs})
    (out,) = ROPE.evaluate(problem, [x, index])
    return out


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def scaled(frequency: float, attrs: Mapping[str, Any]) -> float:
    """The stretched frequency, as the papers and model cards write it."""
    if attrs.get("scaling") == "linear":
        return frequency / float(attrs["factor"])
    if attrs.get("scaling") == "llama3":
        wavelength = 2 * math.pi / frequency
        old, factor = float(attrs["original_max_position"]), float(attrs["factor"])
        low, high = float(attrs["low_freq_factor"]), float(attrs["high_freq_factor"])
        if wavelength < old / high:
            return frequency
        if wavelength > old / low:
            return frequency / factor
        smooth = (old / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency
    return frequency


LLAMA3: dict[str, Attr] = {
    "scaling": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position": 8192,
    "theta": 500000.0,
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 6])
@pytest.mark.parametrize("scaling", [{}, {"theta": 500.0}, {"scaling": "linear", "factor": 4.0}, LLAMA3])
def test_against_complex_rotation_of_pairs(interleaved: bool, rotary_dim: int, scaling: dict[str, Any]) -> None:
    x, positions = normal(5, 3, 16), [0, 1, 77, 4095, 100000]
    out = rotate(x, positions, interleaved=interleaved, rotary_dim=rotary_dim, **scaling)
    size = rotary_dim or 16
    want = x.copy()
    for t, position in enumerate(positions):
        for i in range(size // 2):
            frequency = scaled(scaling.get("theta", 10000.0) ** (-2 * i / size), scaling)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
            turned = (x[t, :, a] + 1j * x[t, :, b]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            want[t, :, a], want[t, :, b] = turned.real, turned.imag
    np.testing.assert_allclose(out, want, rtol=1e-9, atol=1e-9)


def test_llama3_keeps_stretches_and_blends_frequencies() -> None:
    attrs = ROPE.complete_attrs({**LLAMA3, "max_position": 131072})
    got = inverse_frequencies(128, attrs)
    plain = [500000.0 ** (-2 * i / 128) for i in range(64)]
    np.testing.assert_allclose(got, [scaled(f, LLAMA3) for f in plain], rtol=1e-12)
    ratios = got / np.array(plain)
    assert ratios[0] == 1.0
    np.testing.assert_allclose(ratios[-1], 1 / 8)
    assert np.any((ratios > 0.13) & (ratios < 0.99))


def test_scores_depend_on_the_distance_only() -> None:
    q, k = normal(1, 1, 32), normal(1, 1, 32, seed=1)
    near = np.vdot(rotate(q, [9]), rotate(k, [4]))
    far = np.vdot(rotate(q, [1009]), rotate(k, [1004]))
    np.testing.assert_allclose(near, far, rtol=1e-10)


def test_padding_rows_are_unchanged() -> None:
    x = normal(3, 2, 8)
    out = rotate(x, [-1, 5, -9])
    np.testing.assert_array_equal(out[[0, 2]], x[[0, 2]])
    assert np.all(out[1] != x[1])


def test_a_position_beyond_the_last_is_refused() -> None:
    with pytest.raises(UsageError, match=r"position 8 is not below max_position 8 of transformer\.rope"):
        rotate(normal(2, 1, 4), [7, 8], max_position=8)


def test_inputs_cover_padding_and_stay_below_the_limit() -> None:
    for problem in ROPE.samples(random.Random(0)):
        positions = ROPE.make_inputs(problem, np.random.default_rng(0))[1]
        assert positions is not None
        assert positions.dtype == np.int32
        assert positions.min() >= -1
        assert positions.max() < dict(problem.attrs)["max_position"]


def test_attributes_and_arguments_have_the_same_names() -> None:
    assert set(RopeAttributes.__annotations__) == {a.name for a in ATTRIBUTES}


def test_a_graph_refuses_what_is_no_attribute() -> None:
    g = Graph()
    x, positions = g.input("x", (2, 1, 4), "f32"), g.input("positions", (2,), "i32")
    with pytest.raises(UsageError, match=r"'transformer\.rope': .*base"):
        g.rope(x, positions, max_position=8, base=1.0)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"'transformer\.rope': .*max_position"):
        g.rope(x, positions)  # type: ignore[call-arg]
