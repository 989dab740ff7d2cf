"""Caches in q8: written as the quantiser writes them, bit by bit, and read by every kernel of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import GROUP
from kernelforge.problem import Problem, TensorType
from kernelforge.quant import dequantize, quantize
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import DeviceInfo, Reject
from kernelforge_metal.kernels.rope_attention import takes_rope_split

DEFS = {op.name: op for op in OPS}


def caches(*shape: int) -> tuple[TensorType, TensorType]:
    return TensorType(shape, "q8"), TensorType(shape, "q8")


def tokens(count: int) -> TensorType:
    return TensorType((count,), "i32")


def attention(count: int, heads: int, cache: tuple[int, int, int, int], dtype: str = "f32", **attrs: Any) -> Problem:
    q = TensorType((count, heads, cache[3]), dtype)
    return DEFS["attention"].problem([q, *caches(*cache), tokens(count), tokens(count), None], attrs).canonical()


def rope_attention(heads: int, cache: tuple[int, int, int, int], **attrs: Any) -> Problem:
    q, new = (TensorType((1, n, cache[3]), "f32") for n in (heads, cache[2]))
    operands = [q, new, new, *caches(*cache), tokens(1), tokens(1)]
    return DEFS["rope_attention"].problem(operands, {"max_position": cache[1], **attrs}).canonical()


def test_groups_are_those_of_the_quantiser(gpu: Session) -> None:
    """Over all magnitudes of scales that f16 has, with ties and zeros; rows of nine groups share words with their neighbours.
    NaN, infinity and a scale beyond f16 spoil their group and no other."""
    rng = np.random.default_rng(3)
    count, heads, size = 300, 3, 96
    cache = TensorType((2, 200, heads, size), "q8")
    new = TensorType((count, heads, size), "f32")
    problem = DEFS["kv_cache_update"].problem([cache, new, tokens(count), tokens(count)], {})
    groups = rng.standard_normal((count, heads, size // GROUP, GROUP), np.float32)
    groups *= np.exp2(rng.uniform(-30, 15, groups.shape[:-1]))[..., None].astype(np.float32)
    groups[40:80] = rng.integers(-4, 5, groups[40:80].shape) / 2.0
    groups[80:90, 1] = 0.0
    halves = rng.integers(-127, 127, groups[120:].shape) + 0.5  # times d: the last bit of 1 / d decides
    halves[..., 5] = 127
    groups[120:] = halves * rng.uniform(1, 2, halves.shape[:-1])[..., None]
    old = quantize(rng.standard_normal((2, 200, heads, size), np.float32), "q8")
    want, places = old.copy(), rng.permutation(400)[:count]
    slots, positions = places // 200, np.where(np.arange(count) % 10 == 9, -1, places % 200)
    written = positions >= 0
    want[slots[written], positions[written]] = quantize(groups.reshape(new.static_shape()), "q8")[written]
    spoilt = []
    for token, head, group, value in ((110, 0, 2, np.nan), (111, 1, 0, np.inf), (112, 2, 1, -np.inf), (113, 0, 0, 1e8)):
        groups[token, head, group, token % GROUP] = value
        spoilt.append((slots[token], positions[token], head, group))
    buffer = gpu.device.allocate(cache.static_shape(), "q8")
    buffer.write(old)
    arrays = {"new": groups.reshape(new.static_shape()), "positions": positions, "slots": slots}
    given = {n: a.astype(np.int32) if a.dtype.kind == "i" else a for n, a in arrays.items()}
    gpu.compile_problem(problem).run({"cache": buffer, **given})
    found = np.asarray(buffer.numpy())
    for place in spoilt:
        assert not np.isfinite(dequantize(found[place][None])).any(), place
        found[place] = want[place]
    np.testing.assert_array_equal(found["scale"], want["scale"])
    np.testing.assert_array_equal(found["values"], want["values"])


@pytest.mark.parametrize(
    ("name", "problem", "config"),
    [
        ("split", attention(1, 4, (2, 150, 1, 64), window=70), {"chunk": 32, "early": 16}),
        ("split", attention(2, 3, (1, 40, 3, 128), softcap=3.0), {"chunk": 32, "early": 16}),
        ("split", attention(2, 4, (2, 40, 2, 96), "f16"), {"chunk": 32, "early": 1}),
        ("split", attention(1, 2, (2, 40, 1, 32)), {"chunk": 32, "early": 16}),
        ("tile", attention(9, 4, (2, 40, 2, 64), window=9), {"rows": 32, "keys": 8, "at_once": 1}),
        ("wgsl", attention(3, 2, (2, 40, 1, 288)), {}),
    ],
    ids=str,
)
def test_attention(gpu: Session, name: str, problem: Problem, config: dict[str, int]) -> None:
    Workload(gpu, problem).verify(gpu.compile_problem(problem, variant=name, config=config))


@pytest.mark.parametrize(
    ("problem", "early"),
    [
        (rope_attention(4, (2, 70, 2, 64), window=40), 16),
        (rope_attention(2, (1, 40, 1, 128), interleaved=True, rotary_dim=64, softcap=3.0), 1),
    ],
    ids=str,
)
def test_attention_that_writes_its_row(gpu: Session, problem: Problem, early: int) -> None:
    Workload(gpu, problem).verify(gpu.compile_problem(problem, variant="split", config={"chunk": 32, "early": early}))


def test_a_row_that_shares_words_with_others_is_not_written_by_attention() -> None:
    device = DeviceInfo("gpu", "a GPU", "", frozenset(), (("max-storage-buffers-per-shader-stage", 10),))
    verdict = takes_rope_split(rope_attention(2, (1, 40, 1, 96)), device)
    assert isinstance(verdict, Reject)
    assert verdict.reason == "takes heads of a multiple of 64 elements in q8: others share words with their neighbours"


@pytest.mark.parametrize("name", ["split", "tile"])
def test_a_spoilt_group_reaches_the_rows_that_see_it_and_no_other(gpu: Session, name: str) -> None:
    problem = attention(3, 4, (1, 9, 2, 64))
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"q": rng.standard_normal((3, 4, 64), np.float32)}
    arrays |= {n: quantize(rng.standard_normal((1, 9, 2, 64), np.float32), "q8") for n in "kv"}
    arrays |= {"positions": np.array([2, 3, 4], np.int32), "slots": np.zeros(3, np.int32)}
    executable = gpu.compile_problem(problem, variant=name)
    whole = np.asarray(executable.run(arrays)[0])
    arrays["v"]["scale"][0, 3, 0, 1] = np.nan  # of the heads 0 and 1
    arrays["k"]["scale"][0, 4, 1, 0] = np.nan  # of the heads 2 and 3
    spoilt = np.zeros((3, 4, 64), bool)
    spoilt[1:, :2, 32:] = spoilt[2:, 2:] = True
    found = np.asarray(executable.run(arrays)[0])
    np.testing.assert_array_equal(np.isnan(found), spoilt)
    np.testing.assert_allclose(found[~spoilt], whole[~spoilt], rtol=1e-5)
