"""attention against its reference: both forms, grouped heads, windows, soft caps, ragged batches, what must not leak."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from kernel_checks import F32, Array, Arrays, Kernels, device, problem, reference, verdict

from kernelforge.dialects.transformer.attention import ATTENTION
from kernelforge.dtype import to_numpy
from kernelforge.problem import Attr, Problem
from kernelforge.quant import widened
from kernelforge.variant import Reject
from kernelforge_cpu.isa import CpuTarget, host_targets
from kernelforge_cpu.kernels.attention import attention_space, build_attention


def cached(q: str, cache: str, *, tokens: str = "tokens", lengths: str = "", **attrs: Attr) -> Problem:
    return problem("attention", q, cache, cache, f"i32[{tokens}]", f"i32[{tokens}]", lengths, **attrs)


SMALL = cached("f32[tokens,9,64]", "f32[3,200,3,64]")
CACHED = [
    SMALL,
    cached("f32[tokens,9,64]:[960,64,1]", "bf16[3,200,3,64]"),  # q as a slice of a fused projection
    cached("f32[tokens,8,20]", "f16[3,90,8,20]:[20000,200,24,1]"),
    cached("bf16[tokens,2,33]", "f16[4,70,1,33]", window=5, softcap=3.0),
    cached("f16[tokens,8,16]", "bf16[2,150,2,16]", window=70, scale=0.3),
    cached("f32[tokens,40,8]", "f32[2,100,2,8]"),  # 20 heads for each kv head: two bundles of 10
    cached("f32[tokens,17,4]", "f32[2,100,1,4]"),  # 17 heads: bundles of one
    cached("f32[tokens,16,24]", "bf16[2,100,1,24]"),
    cached("f32[tokens,4,12]", "f32[3,100,2,12]", lengths="i32[3]", causal=False),
    cached("f32[tokens,3,1]", "f32[2,100,3,1]", lengths="i32[2]", causal=False, window=9),
]
QUANTISED = [
    cached("f32[tokens,9,64]", "q8[3,200,3,64]"),
    cached("f16[tokens,4,32]", "q8[3,90,2,32]", window=5),
]
ONE_TOKEN = [
    cached("f32[1,8,96]", "q8[1,400,4,96]", tokens="1"),
    cached("f32[1,2,256]", "bf16[1,100,1,256]", tokens="1"),
    cached("f32[1,6,72]", "f32[1,100,1,72]", tokens="1"),
]
SPLIT = [
    cached("f32[4,32,64]", "f16[2,300,8,64]", tokens="4"),  # ranges of at least 32 keys
    cached("f32[1,12,128]", "bf16[2,300,4,128]:[300000,1000,200,1]", tokens="1", window=200, softcap=4.0),
    cached("f32[3,16,256]", "f32[2,300,1,256]", tokens="3", window=100),  # two bundles of 8 heads
]
DENSE = [
    problem("attention", "f32[5,4,8]", "f32[9,2,8]", "f32[9,2,8]"),
    problem("attention", "f32[3,4,6,40]", "bf16[3,7,2,40]", "bf16[3,7,2,40]", "", "", "i32[3]", causal=False, window=4),
    problem("attention", "bf16[2,70,2,32]", "f32[2,150,1,32]", "f32[2,150,1,32]", "", "", "i32[2]", window=66),
    problem("attention", "f32[6,3,16]", "f32[6,3,16]", "f32[6,3,16]", causal=False, softcap=5.0),
    problem("attention", "f32[0,2,8]", "f32[4,2,8]", "f32[4,2,8]"),
]
DYNAMIC = problem("attention", "f32[b,t,4,16]", "f32[b,t,2,16]", "f32[b,t,2,16]")


def from_scores(arrays: Arrays, exact: list[Array]) -> list[Array]:
    """A score's error, from a sum of D products, is the relative error of its weight; then a sum over the keys."""
    q, k, v = (np.nan_to_num(widened(np.asarray(a))) for a in arrays[:3])
    size, keys = q.shape[-1], k.shape[-3]
    score = np.linalg.norm(q, axis=-1).max(initial=0.0) * np.linalg.norm(k, axis=-1).max(initial=0.0) / math.sqrt(size)
    weight = (size / 4 + 10) * score + 8
    return [np.full(exact[0].shape, F32 * np.abs(v).max(initial=0.0) * (2 * weight + keys / 8 + 8))]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels([*CACHED, *QUANTISED, *ONE_TOKEN, *SPLIT, *DENSE, DYNAMIC])


@pytest.mark.parametrize("p", [*CACHED, *QUANTISED], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 19, 100])
def test_over_a_cache(kernels: Kernels, p: Problem, tokens: int) -> None:
    kernels.check(p, from_scores, {"tokens": tokens})


@pytest.mark.parametrize("p", [*ONE_TOKEN, *DENSE], ids=str)
def test_static_shapes(kernels: Kernels, p: Problem) -> None:
    kernels.check(p, from_scores)


@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 5), (2, 90), (0, 4)])
def test_dynamic_batch_and_length(kernels: Kernels, b: int, t: int) -> None:
    kernels.check(DYNAMIC, from_scores, {"b": b, "t": t})


@pytest.mark.parametrize("target", host_targets()[1:], ids=lambda t: t.level)
def test_lower_levels(target: CpuTarget) -> None:
    problems = [CACHED[1], CACHED[3], ONE_TOKEN[1]]
    kernels = Kernels(problems, target)
    for p in problems:
        kernels.check(p, from_scores, {"tokens": 19}, parts=(1, 3))


@pytest.mark.parametrize("key_block", [32, 128])
def test_key_blocks(key_block: int) -> None:
    kernels = Kernels([SMALL, CACHED[3]], config={"key_block": key_block, "ahead": 0})
    for p in (SMALL, CACHED[3]):
        kernels.check(p, from_scores, {"tokens": 30}, parts=(1, 2))


@pytest.mark.parametrize("target", host_targets(), ids=lambda t: t.level)
def test_the_next_block_asked_for_ahead(target: CpuTarget) -> None:
    """Every kind of cache, by itself and in ranges; it changes no bit."""
    cases = [CACHED[1], CACHED[3], *QUANTISED, ONE_TOKEN[0], SPLIT[1]]
    ahead, without = (Kernels(cases, target, {"key_block": 32, "ahead": n}) for n in (1, 0))
    for p in cases:
        assert "prefetch" in ahead.kernels[p].text
        assert "prefetch" not in without.kernels[p].text
        sizes = {"tokens": 9} if p.dims else {}
        ahead.check(p, from_scores, sizes, parts=(1, 3))
        arrays = ATTENTION.make_inputs(p.with_dims(sizes), np.random.default_rng(7))
        np.testing.assert_array_equal(ahead.run(p, arrays, sizes)[0], without.run(p, arrays, sizes)[0])


def inputs(tokens: int, positions: list[int], slots: list[int], seed: int = 0) -> list[Any]:
    """Of `SMALL`."""
    rng = np.random.default_rng(seed)
    shapes = ((tokens, 9, 64), (3, 200, 3, 64), (3, 200, 3, 64))
    floats = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    return [*floats, np.array(positions, np.int32), np.array(slots, np.int32), None]


def test_runs_are_found_whatever_the_order(kernels: Kernels) -> None:
    """Consecutive positions of another slot, gaps, repeats, reversed order and padding in between."""
    positions = [5, 6, 7, 7, 8, 150, 151, -1, 152, 3, 2, 1, 0, 199, -5, -1, 64, 65, 63]
    slots = [0, 0, 1, 1, 1, 2, 2, 0, 2, 0, 0, 0, 0, 1, 1, 9, 0, 1, 1]
    kernels.check(SMALL, from_scores, {"tokens": 19}, arrays=inputs(19, positions, slots))


def test_a_batch_equals_its_sequences_alone(kernels: Kernels) -> None:
    positions, slots = [*range(40, 70), *range(3), 120], [*[0] * 30, *[2] * 3, 1]
    arrays = inputs(34, positions, slots)
    (together,) = kernels.run(SMALL, arrays, {"tokens": 34}, 2)
    for t in (0, 1, 29, 30, 33):
        q, k, v, p, s = arrays[:5]
        (alone,) = kernels.run(SMALL, [q[t : t + 1], k, v, p[t : t + 1], s[t : t + 1], None], {"tokens": 1})
        np.testing.assert_allclose(alone[0], together[t], rtol=0, atol=2e-6)


def test_what_a_token_does_not_see_cannot_reach_it(kernels: Kernels) -> None:
    """Unwritten memory is NaN; a NaN in one token's value spoils only the tokens that see it."""
    positions, slots = list(range(60, 80)), [1] * 20
    arrays = inputs(20, positions, slots)
    k, v = arrays[1:3]
    hidden = [a.copy() for a in (k, v)]
    for a in hidden:
        a[[0, 2]] = np.nan
        a[1, 80:] = np.nan
    kernels.check(SMALL, from_scores, {"tokens": 20}, arrays=[arrays[0], *hidden, *arrays[3:]])
    v[1, 73, 1, 5] = np.nan
    k[1, 76, 2, 0] = np.inf
    for parts in (1, 2):
        (out,) = kernels.run(SMALL, arrays, {"tokens": 20}, parts)
        spoilt = np.isnan(out)
        assert not spoilt[:13].any()
        assert spoilt[13:, 3:6, 5].all()
        assert not spoilt[:16, 6:].any()
        assert not spoilt[:, :3].any()


def test_a_window_hides_what_left_it(kernels: Kernels) -> None:
    p = CACHED[4]  # a window of 70
    rng = np.random.default_rng(2)
    q = rng.standard_normal((9, 8, 16)).astype(np.float16)
    k, v = (rng.standard_normal((2, 150, 2, 16)).astype(to_numpy("bf16")) for _ in range(2))
    k[0, :31], v[0, :31] = np.nan, np.nan
    arrays = [q, k, v, np.arange(100, 109, dtype=np.int32), np.zeros(9, np.int32), None]
    kernels.check(p, from_scores, {"tokens": 9}, arrays=arrays)
    (out,) = kernels.run(p, arrays, {"tokens": 9})
    assert np.isfinite(out.astype(np.float32)).all()


def test_rows_without_keys_are_zero(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4, 12), (3, 100, 2, 12), (3, 100, 2, 12)))
    positions, slots = np.array([0, 1, 2, -1, 0, 0], np.int32), np.array([0, 0, 0, 1, 1, 2], np.int32)
    lengths = np.array([0, 5, 0], np.int32)
    (out,) = kernels.run(CACHED[8], [q, k, v, positions, slots, lengths], {"tokens": 6}, 3)
    assert not out[[0, 1, 2, 3, 5]].any()
    assert out[4].any()


@pytest.mark.parametrize("p", [SMALL, *QUANTISED, SPLIT[0]], ids=str)
def test_tokens_of_slots_that_are_not_there_get_zeros(kernels: Kernels, p: Problem) -> None:
    tokens = {"tokens": 4} if p.dims else {}
    arrays = ATTENTION.make_inputs(p.with_dims(tokens), np.random.default_rng(0))
    arrays[3] = np.array([7, 2**31 - 1, 8, 9], np.int32)  # a position beyond the cache sees all of it
    arrays[4] = np.array([0, 1, 2**30, -7], np.int32)
    (out,) = kernels.run(p, arrays, tokens)
    assert np.isfinite(out[:2].astype(np.float32)).all()
    assert out[:2].any()
    assert not out[2:].any()


def test_extreme_scores(kernels: Kernels) -> None:
    """Scores far apart and far from zero: one key takes all the weight, nothing overflows."""
    arrays = inputs(1, [150], [0])
    q, k, v = arrays[:3]
    q[:] = 100.0
    k[0, :, :, :] = -100.0
    k[0, 77] = 100.0
    (out,) = kernels.run(SMALL, arrays, {"tokens": 1})
    np.testing.assert_array_equal(out[0].reshape(3, 3, 64), np.repeat(v[0, 77][:, None], 3, axis=1))
    k[0, 78] = 100.0
    (out,) = kernels.run(SMALL, arrays, {"tokens": 1})
    np.testing.assert_allclose(out[0, ::3], (v[0, 77] + v[0, 78]) / 2, rtol=1e-6, atol=1e-7)


def test_dense_equals_cached(kernels: Kernels) -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((1, 90, 4, 16), (1, 90, 2, 16), (1, 90, 2, 16)))
    (dense,) = kernels.run(DYNAMIC, [q, k, v, None, None, None], {"b": 1, "t": 90}, 2)
    form = cached("f32[90,4,16]", "f32[1,90,2,16]", tokens="90")
    (want,) = reference(ATTENTION, form, [q[0], k, v, np.arange(90), np.zeros(90, np.int64), None])
    np.testing.assert_allclose(dense[0], want, rtol=0, atol=2e-6)


def test_parts() -> None:
    def parts(p: Problem, tokens: int, threads: int) -> list[int]:
        dims = [tokens] if p.dims else []
        built = build_attention(p.canonical(), {"key_block": 64, "ahead": 0}, device())
        return [phase.parts(dims, threads) for phase in built.phases]

    large = cached("f32[tokens,32,64]", "f32[4,4096,8,64]")
    assert [parts(large, 1, threads) for threads in (1, 2, 16)] == [[1], [8], [8]]  # a kv head each
    assert [parts(large, 512, threads) for threads in (1, 2, 4)] == [[1], [32], [64]]
    assert parts(cached("f32[tokens,2,8]", "f32[1,32,1,8]"), 4, 4) == [1]  # too little work
    one = cached("f32[1,32,64]", "f32[4,4096,8,64]", tokens="1")
    assert [parts(one, 1, threads) for threads in (1, 2, 16)] == [[1, 1], [4, 1], [32, 1]]  # ranges of keys, a merge
    assert parts(cached("f32[1,2,8]", "f32[1,32,1,8]", tokens="1"), 1, 4) == [1, 1]


@pytest.mark.parametrize("p", SPLIT, ids=str)
@pytest.mark.parametrize("depth", [0, 15, 16, 63, 64, 65, 128, 150, 255, 256, 296])
def test_ranges_of_keys_are_merged(kernels: Kernels, p: Problem, depth: int) -> None:
    """Contexts of one range, of several, of ranges that are no whole blocks, and padding; what is hidden is NaN."""
    rng = np.random.default_rng(depth)
    tokens, heads, size = p.operand(0).static_shape()
    cache = p.operand(1)
    q = rng.standard_normal((tokens, heads, size)).astype(np.float32)
    k, v = (rng.standard_normal(cache.static_shape()).astype(to_numpy(cache.dtype)) for _ in range(2))
    positions = np.array([depth, -1, max(0, depth - 70), depth + 3][:tokens], np.int32)
    slots = np.array([1, 77, 0, 1][:tokens], np.int32)
    for slot, most in ((0, max(0, depth - 70)), (1, depth + 3 if tokens > 3 else depth)):
        k[slot, most + 1 :], v[slot, most + 1 :] = np.nan, np.nan
    kernels.check(p, from_scores, arrays=[q, k, v, positions, slots, None], parts=(1, 2, 3, 7))


def test_blocks_of_keys_fit_the_stack() -> None:
    """Of heads of 512 elements in q8 the usual 64 keys are too many beside many tokens, but not for one."""
    for tokens, heads, blocks in (("300", 32, [32]), ("1", 4, [64, 32, 128])):
        p = cached(f"f32[{tokens},{heads},512]", "q8[1,64,4,512]", tokens=tokens)
        assert list(dict.fromkeys(c["key_block"] for c in attention_space(p, device()))) == blocks
    assert verdict(cached("f32[300,128,512]", "q8[1,64,1,512]", tokens="300")) == Reject(
        "takes heads whose rows fit the stack, not 128 of 512 elements over 1 kv heads"
    )


def test_refusals() -> None:
    assert verdict(cached("f32[1,2,600]", "f32[1,9,1,600]", tokens="1")) == Reject(
        "takes heads of at most 512 elements, not 600"
    )
    assert verdict(problem("attention", "f32[4,h,8]", "f32[4,2,8]", "f32[4,2,8]")) == Reject(
        "takes static numbers of heads and head sizes"
    )
    assert verdict(cached("f32[4,2,8]:[16,1,2]", "f32[1,9,1,8]", tokens="4")) == Reject(
        "takes tensors whose last axis has stride 1, not f32[4,2,8]:[16,1,2]"
    )
