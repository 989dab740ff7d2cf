"""rope: pairing, scaling, partial rotation, padding, and the table that ropes share."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import DEFS, F32, Array, Arrays, Kernels, device, problem, verdict

from kernelforge.problem import Attr, Problem
from kernelforge.variant import Reject
from kernelforge_cpu.isa import host_targets
from kernelforge_cpu.kernels.rope import build_rope


def from_rotation(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """Cosine and sine are rounded, then two products and a sum: three roundings of both elements of a pair, of which neither
    exceeds the pair's largest in the head."""
    x = np.abs(np.asarray(arrays[0], np.float64))
    return [3 * F32 * 2 * x.max(axis=-1, keepdims=True, initial=0.0) * np.ones(exact[0].shape)]


LLAMA3: dict[str, Attr] = {"scaling": "llama3", "factor": 8.0, "original_max_position": 256, "theta": 5e5}
PROBLEMS = [
    problem("rope", "f32[1,1,2]", "i32[1]", max_position=4),
    problem("rope", "f32[0,2,8]", "i32[0]", max_position=4),
    problem("rope", "f32[5,3,64]", "i32[5]", max_position=300),
    problem("rope", "f32[5,3,64]", "i32[5]", max_position=300, interleaved=True),
    problem("rope", "bf16[5,3,32]", "i32[5]", max_position=300),
    problem("rope", "f16[5,3,32]", "i32[5]", max_position=300, interleaved=True),
    problem("rope", "f32[5,3,20]", "i32[5]", max_position=300, rotary_dim=14),
    problem("rope", "f32[5,3,20]", "i32[5]", max_position=300, rotary_dim=14, interleaved=True),
    problem("rope", "f32[5,2,74]:[500,100,1]", "i32[5]:[2]", max_position=300),
    problem("rope", "f32[5,2,16]", "i32[5]", max_position=5000, scaling="linear", factor=4.0),
    problem("rope", "f32[5,2,64]", "i32[5]", max_position=5000, **LLAMA3),
]
DYNAMIC = problem("rope", "f32[tokens,3,16]:[144,16,1]", "i32[tokens]", max_position=64)


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels([*PROBLEMS, DYNAMIC], request.param)


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_against_reference(kernels: Kernels, p: Problem) -> None:
    kernels.check(p, from_rotation)


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_dynamic_dimension(kernels: Kernels, tokens: int) -> None:
    kernels.check(DYNAMIC, from_rotation, {"tokens": tokens})


def test_padding_counts_as_position_0(kernels: Kernels) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 20)).astype(np.float32)
    positions = np.array([-1, 2**30, 0, -1, 3], np.int32)  # one is beyond every table
    for p in PROBLEMS[6:8]:
        (out,) = kernels.run(p, [x, positions], parts=2)
        np.testing.assert_array_equal(out[:2], x[:2])
        np.testing.assert_array_equal(out[2:4], x[2:4])  # position 0 is no rotation
        assert np.abs(out[4, :, :14] - x[4, :, :14]).max() > 0.1
        np.testing.assert_array_equal(out[..., 14:], x[..., 14:])


TOKENS = 9
FUSED: list[tuple[str, str, int, dict[str, Attr]]] = [
    ("f32", "f32", 64, {}),
    ("f16", "f32", 64, {"interleaved": True}),
    ("bf16", "bf16", 20, {"rotary_dim": 14}),
    ("f32", "f16", 6, {"rotary_dim": 4, "interleaved": True}),
    ("q8", "f32", 96, {}),
    ("q8", "bf16", 64, {"rotary_dim": 34, **LLAMA3}),
]


def layer(cache: str, x: str, size: int, attrs: dict[str, Attr]) -> tuple[Problem, list[Problem]]:
    """rope_cache_update of 6 heads over 2 with rows that lie apart, and rope of its queries and keys and both updates."""
    row, places = 10 * size + 3, f"i32[{TOKENS}]"
    wide, narrow = (f"{x}[{TOKENS},{n},{size}]:[{row},{size},1]" for n in (6, 2))
    memory = f"{cache}[3,20,2,{size}]"
    given = {"max_position": 64, **attrs}
    whole = problem("rope_cache_update", wide, narrow, narrow, memory, memory, places, places, **given)
    turned = f"{x}[{TOKENS},2,{size}]"
    updates = [problem("kv_cache_update", memory, new, places, places) for new in (turned, narrow)]
    return whole, [*(problem("rope", t, places, **given) for t in (wide, narrow)), *updates]


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def layers(request: pytest.FixtureRequest) -> Kernels:
    made = [layer(*case) for case in FUSED]
    return Kernels([p for whole, parts in made for p in (whole, *parts)], request.param)


@pytest.mark.parametrize(("cache", "x", "size", "attrs"), FUSED)
def test_rope_and_cache_updates_in_one(layers: Kernels, cache: str, x: str, size: int, attrs: dict[str, Attr]) -> None:
    """Bit by bit what the three kernels give, but that keys are not rounded before the cache's type."""
    whole, (rope_q, rope_k, update_keys, update_values) = layer(cache, x, size, attrs)
    arrays = DEFS["rope_cache_update"].make_inputs(whole, np.random.default_rng(3))
    q, k, v, keys, values, positions, slots = arrays
    assert positions is not None
    positions[::4] = -1  # padding
    (rotated,), (turned,) = layers.run(rope_q, [q, positions]), layers.run(rope_k, [k, positions])
    want = [
        rotated,
        *layers.run(update_keys, [keys, turned, positions, slots]),
        *layers.run(update_values, [values, v, positions, slots]),
    ]
    for parts in (1, 2, 7):
        got = layers.run(whole, arrays, parts=parts)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[2], want[2])
        if x == "f32":
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize(("cache", "x", "size", "attrs"), FUSED[::4])
def test_what_belongs_outside_the_caches_goes_nowhere(
    layers: Kernels, cache: str, x: str, size: int, attrs: dict[str, Attr]
) -> None:
    whole, _ = layer(cache, x, size, attrs)
    q, k, v, keys, values, _, _ = DEFS["rope_cache_update"].make_inputs(whole, np.random.default_rng(3))
    assert keys is not None
    assert values is not None
    positions = np.array([20, 63, 64, 2**30, -(2**31), 0, 0, 0, 0], np.int32)
    slots = np.array([0, 0, 0, 0, 0, 3, -1, 2**30, -(2**31)], np.int32)
    got = layers.run(whole, [q, k, v, keys, values, positions, slots])
    assert [a.tobytes() for a in got[1:]] == [keys.tobytes(), values.tobytes()]


def test_equal_ropes_share_one_table() -> None:
    q = problem("rope", "f32[7,9,64]", "i32[7]", max_position=128)
    k = problem("rope", "bf16[tokens,3,64]", "i32[tokens]", max_position=128)
    other = problem("rope", "f32[7,9,64]", "i32[7]", max_position=128, theta=5e5)
    tables = [build_rope(p, {}, device()).tables[0] for p in (q, k, other)]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]
    assert tables[0].shape == (128, 2, 32)


def test_the_table_is_right_at_far_positions() -> None:
    p = problem("rope", "f32[1,1,128]", "i32[1]", max_position=131072)
    table = build_rope(p, {}, device()).tables[0]
    angle = 131071 * 10000.0 ** (-2 * 5 / 128)
    assert abs(table[131071, 0, 5] - np.cos(angle)) < 1e-7
    assert abs(table[131071, 1, 5] - np.sin(angle)) < 1e-7


def test_refusals() -> None:
    assert verdict(problem("rope", "f32[1,1,4]", "i32[1]", max_position=131073)) == Reject(
        "tabulates at most 131072 positions, not 131073"
    )
    places = ("i32[1]", "i32[1]")
    heads, cache = ("f32[1,1,32]",) * 3, ("q8[1,8,g,32]",) * 2
    whole = problem("rope_cache_update", "f32[1,1,32]", *("f32[1,g,32]",) * 2, *cache, *places, max_position=8)
    assert verdict(whole) == Reject("takes a quantised cache with a static number of heads and head size")
    far = problem("rope_cache_update", *heads, *("f32[1,8,1,32]",) * 2, *places, max_position=131073)
    assert verdict(far) == Reject("tabulates at most 131072 positions, not 131073")
    assert verdict(problem("rope", "f32[1,1,d]", "i32[1]", max_position=8)) == Reject("takes heads of a static size")
