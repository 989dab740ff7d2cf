"""Attention of one token that rotates and writes to the caches."""

from __future__ import annotations

import re

import pytest

from kernelforge.dialects.transformer.rope_attention import ROPE_ATTENTION
from kernelforge.problem import Problem, TensorType
from kernelforge.variant import Accept, DeviceInfo
from kernelforge_metal.kernels.rope_attention import build_rope_split, rope_split_space, takes_rope_split

BYTES = {"f32": 4, "i32": 4, "u32": 4, "vec2<u32>": 8, "vec4<f32>": 16}


def decode(heads: int, groups: int, size: int, dtype: str = "f32") -> Problem:
    q, new = (TensorType((1, n, size), "f32") for n in (heads, groups))
    cache, number = TensorType((1, 512, groups, size), dtype), TensorType((1,), "i32")
    return ROPE_ATTENTION.problem((q, new, new, cache, cache, number, number), {"max_position": 512}).canonical()


@pytest.mark.parametrize("dtype", ["f32", "q8"])
@pytest.mark.parametrize("features", [frozenset(), frozenset({"subgroup"})])
@pytest.mark.parametrize(
    ("memory", "heads", "groups", "size"), [(16384, 32, 8, 128), (32768, 16, 4, 256), (32768, 64, 8, 128)]
)
def test_every_config_fits_workgroup_memory(
    memory: int, heads: int, groups: int, size: int, features: frozenset[str], dtype: str
) -> None:
    limits = {
        "max-compute-workgroup-storage-size": memory,
        "max-compute-invocations-per-workgroup": 256,
        "max-storage-buffers-per-shader-stage": 10,
    }
    p, device = decode(heads, groups, size, dtype), DeviceInfo("gpu", "a GPU", "", features, tuple(limits.items()))
    assert isinstance(takes_rope_split(p, device), Accept)
    configs = list(rope_split_space(p, device))
    assert configs
    for config in configs:
        code = build_rope_split(p, config, device).dispatches[0].code
        arrays = re.findall(r"var<workgroup> \w+: array<([^,]+), ?(\d+)u?>", code)
        assert sum(BYTES[kind] * int(count) for kind, count in arrays) <= memory, config
