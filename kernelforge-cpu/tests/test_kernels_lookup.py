"""embedding, kv_cache_update and argmax: exact, with numpy's rules."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import DEFS, NATIVE, QUANTISED, Array, Kernels, device, problem, reference

from kernelforge.dialects.transformer.lookup import ARGMAX
from kernelforge.dtype import to_numpy
from kernelforge.problem import Problem
from kernelforge.quant import quantize
from kernelforge_cpu.isa import host_targets

EMBEDDINGS = [
    problem("embedding", "f32[1,1]", "i32[1]"),
    problem("embedding", "f32[9,67]", "i32[0]"),
    problem("embedding", "bf16[50,67]@const", "i32[7]", dtype="f32"),
    problem("embedding", "f16[50,32]@const", "i32[300]", dtype="bf16"),
    problem("embedding", "f32[11,20]:[31,1]", "i32[5]:[3]", dtype="f16"),
    problem("embedding", "bf16[11,8]", "i32[5]"),
    problem("embedding", "q8[50,96]@const", "i32[7]"),
    problem("embedding", "q4[50,96]@const", "i32[7]"),
    problem("embedding", "q4[3,32]@const", "i32[1]", dtype="bf16"),
    problem("embedding", "q8[50,32]@const", "i32[300]:[2]", dtype="f16"),
    problem("embedding", "q8[50,0]@const", "i32[3]"),
]
UPDATES = [
    problem(
        "kv_cache_update",
        f"{cache}[3,20,{heads}]",
        f"{new}[{tokens},{heads}]{strides}",
        f"i32[{tokens}]",
        f"i32[{tokens}]",
    )
    for cache, new, tokens, heads, strides in (
        ("f32", "f32", 1, "1,1", ""),
        ("f32", "f32", 16, "2,33", ""),
        ("bf16", "f32", 9, "2,16", ":[100,16,1]"),
        ("f16", "bf16", 9, "3,20", ":[300,64,1]"),
        ("f16", "f16", 9, "5,1", ":[20,3,7]"),
        ("q8", "f32", 9, "2,96", ":[200,96,1]"),
        ("q8", "bf16", 3, "1,32", ""),
    )
]
UPDATES.append(problem("kv_cache_update", "f32[3,20,2,8]:[1000,40,16,1]", "f32[5,2,8]", "i32[5]:[2]", "i32[5]"))
ARGMAXES = [
    problem("argmax", t) for t in ("f32[1]", "f32[0,4]", "f32[3,4,301]", "bf16[3,77]", "f16[2,5]", "f32[2,40]:[99,1]")
]
DYNAMIC = [
    problem("embedding", "f32[tokens,24]", "i32[rows]"),
    problem("kv_cache_update", "f32[2,64,2,8]", "f32[tokens,2,8]", "i32[tokens]", "i32[tokens]"),
    problem("argmax", "f32[tokens,50]"),
    problem("embedding", "q4[50,64]@const", "i32[rows]"),
]


@pytest.fixture(scope="module", params=host_targets(), ids=lambda t: t.level)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels([*EMBEDDINGS, *UPDATES, *ARGMAXES, *DYNAMIC], request.param)


@pytest.mark.parametrize("p", [*EMBEDDINGS, *UPDATES, *ARGMAXES], ids=str)
def test_equals_reference(kernels: Kernels, p: Problem) -> None:
    kernels.check(p)


@pytest.mark.parametrize("table", ["f32[67,19]", "f16[67,19]", "bf16[67,19]", "q8[67,64]", "q4[67,64]"])
def test_rows_of_packed_tables(kernels: Kernels, table: str) -> None:
    """Exactly those of the plain table, in every layout that products of the table may have."""
    p = problem("embedding", f"{table}@const", "i32[rows]", dtype="f32")
    info = device(kernels.target)
    space = (QUANTISED if table[0] == "q" else NATIVE)["embedding"].config_space(p.canonical(), info)
    assert len(list(space)) == 4
    for config in space:
        built = Kernels([p], kernels.target, config)
        assert (config["layout"] == "rows") != bool(built.kernels[p].packs)
        built.check(p, sizes={"rows": 67}, arrays=[*every_row(p)], parts=(1, 3))
        rows, ids = every_row(p)
        ids[::2] = np.resize(np.array([*OUTSIDE, 67], np.int32), 34)
        (out,) = built.run(p, [rows, ids], sizes={"rows": 67})
        assert not out[::2].any()
        assert out[1::2].any(axis=-1).all()


def every_row(p: Problem) -> list[Array]:
    table, _ = DEFS["embedding"].make_inputs(p.with_dims({"rows": 67}), np.random.default_rng(7))
    assert table is not None
    return [table, np.arange(67, dtype=np.int32)[::-1].copy()]


@pytest.mark.parametrize("tokens", [1, 2, 60])
def test_dynamic_dimensions(kernels: Kernels, tokens: int) -> None:
    kernels.check(DYNAMIC[0], sizes={"tokens": tokens, "rows": 3})
    kernels.check(DYNAMIC[3], sizes={"rows": tokens})
    kernels.check(DYNAMIC[1], sizes={"tokens": tokens})
    kernels.check(DYNAMIC[2], sizes={"tokens": tokens})


def test_rows_of_a_quantised_cache_are_those_of_the_quantiser(kernels: Kernels) -> None:
    """Zeros, subnormal scales, ties, and numbers of all sizes; NaN and infinity spoil their group alone."""
    p = UPDATES[5]
    rng = np.random.default_rng(3)
    new = (rng.standard_normal((9, 2, 96)) * 10.0 ** rng.uniform(-9, 4, (9, 2, 1))).astype(np.float32)
    new[0, 0, :32], new[0, 0, 32:64], new[1, 0, :32] = 0.0, 1e-42, np.arange(32) - 15.5
    new[1, 0, 31] = 127.0
    cache = quantize(np.zeros((3, 20, 2, 96), np.float32), "q8")
    positions, slots = np.arange(9, dtype=np.int32), np.ones(9, np.int32)
    kernels.check(p, arrays=[cache, new, positions, slots])
    new[2, 1, 40], new[3, 0, 95] = np.nan, -np.inf
    (got,) = kernels.run(p, [cache, new, positions, slots])
    spoilt = np.isnan(got["scale"].astype(np.float32))
    assert np.argwhere(spoilt).tolist() == [[1, 2, 1, 1], [1, 3, 0, 2]]


def test_an_update_of_padding_alone_changes_nothing(kernels: Kernels) -> None:
    p = UPDATES[1]
    rng = np.random.default_rng(0)
    cache, new = (rng.standard_normal(t.static_shape()).astype(np.float32) for t in (p.operand(0), p.operand(1)))
    positions, slots = np.full(16, -1, np.int32), np.full(16, 99, np.int32)
    (out,) = kernels.run(p, [cache, new, positions, slots], parts=3)
    np.testing.assert_array_equal(out, cache)


OUTSIDE = (-(2**31), -9, 2**30, 2**31 - 1)


@pytest.mark.parametrize("p", [*EMBEDDINGS[2:5], *EMBEDDINGS[6:8]], ids=str)
def test_an_index_outside_a_table_gives_zeros(kernels: Kernels, p: Problem) -> None:
    table, ids = DEFS["embedding"].make_inputs(p, np.random.default_rng(0))
    assert table is not None
    assert ids is not None
    (wanted,) = kernels.run(p, [table, ids])
    outside = np.arange(ids.size) % 2 == 1
    ids[outside] = np.resize(np.array([*OUTSIDE, len(table)], np.int32), outside.sum())
    (out,) = kernels.run(p, [table, ids])
    assert out[~outside].tobytes() == wanted[~outside].tobytes()
    assert not out[outside].any()


@pytest.mark.parametrize("p", [UPDATES[1], UPDATES[5]], ids=str)
def test_what_belongs_outside_a_cache_goes_nowhere(kernels: Kernels, p: Problem) -> None:
    rng = np.random.default_rng(0)
    cache, new = (rng.standard_normal(t.static_shape()).astype(np.float32) for t in (p.operand(0), p.operand(1)))
    slot_count, capacity = cache.shape[:2]
    if p.operand(0).dtype == "q8":
        cache = quantize(cache, "q8")
    outside = [(0, i) for i in (*OUTSIDE, capacity)] + [(i, 0) for i in (*OUTSIDE, slot_count)]
    slots, positions = np.resize(np.array(outside, np.int32), (len(new), 2)).T
    (out,) = kernels.run(p, [cache, new, positions.copy(), slots.copy()])
    assert out.tobytes() == cache.tobytes()


def first_rows(values: list[list[float]]) -> Array:
    rows = np.full((3, 4, 301), -5.0, np.float32)
    for i, row in enumerate(values):
        rows.reshape(12, 301)[i, 100 : 100 + len(row)] = row
    return rows


def test_argmax_of_ties_zeros_nan_and_infinities(kernels: Kernels) -> None:
    nan, inf = np.nan, np.inf
    rows: list[list[float]] = [
        [1, 3, 3],
        [0.0, -0.0],
        [-0.0, 0.0],
        [nan, inf],
        [inf, nan, nan],
        [-nan, 7],
        [inf, inf],
        [1e-45, 0],
        [-1e-45, 0, -0.0],
    ]
    x = first_rows(rows)
    x[2, 2] = -inf
    x[2, 3, [300, 16]] = nan
    kernels.check(ARGMAXES[2], arrays=[x])
    (want,) = reference(ARGMAX, ARGMAXES[2], [x])
    assert want.reshape(-1).tolist() == [101, 100, 100, 100, 101, 100, 100, 100, 101, 0, 0, 16]


def test_argmax_of_16_bit_types(kernels: Kernels) -> None:
    x = np.full((3, 77), -np.inf)
    x[1, [70, 75]] = 2.5
    x[2, 76] = np.nan
    kernels.check(ARGMAXES[3], arrays=[x.astype(to_numpy("bf16"))])
