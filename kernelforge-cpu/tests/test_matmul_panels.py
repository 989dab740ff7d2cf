"""The packed layout: where every element is, what fills it up, which problems share it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matmul_checks import device, matmul, variant

from kernelforge.dtype import to_numpy
from kernelforge_cpu.kernels.matmul.panels import Panels, pack_panels
from kernelforge_cpu.store import address


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (300, 19), (2, 3, 4, 9), (0, 7), (7, 0)])
def test_every_element_has_its_place_and_the_rest_is_zero(dtype: str, vectors: int, shape: tuple[int, ...]) -> None:
    layout = Panels(vectors, 8, dtype)
    matrix: Any = np.random.default_rng(0).standard_normal(shape).astype(to_numpy(dtype))
    packed = pack_panels(matrix.swapaxes(-1, -2), layout)
    *outer, rows, columns = shape
    assert packed.shape == (*outer, -(-columns // layout.width), rows, layout.width)
    assert packed.dtype == matrix.dtype
    assert not packed.size or address(packed) % 64 == 0
    for *batch, panel, row, lane in itertools.product(*map(range, packed.shape)):
        column = panel * layout.width + lane
        want = matrix[(*batch, row, column)] if column < columns else 0
        assert packed[(*batch, panel, row, layout.position(lane))] == want


def test_two_vectors_of_bf16_alternate() -> None:
    layout = Panels(2, 8, "bf16")
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert [layout.position(column) for column in order] == list(range(16))
    assert not Panels(1, 8, "bf16").interleaved
    assert not Panels(2, 8, "f16").interleaved


def test_a_transposed_weight_is_packed_as_the_matrix_it_stands_for() -> None:
    matrix = np.arange(35, dtype=np.float32).reshape(5, 7)
    stored, layout = np.ascontiguousarray(matrix.T), Panels(1, 4, "f32")
    np.testing.assert_array_equal(layout.pack(True).pack(stored), layout.pack(False).pack(matrix))


def test_keys_tell_apart_whatever_changes_the_layout() -> None:
    layouts = [Panels(v, lanes, d) for v in (1, 2, 4) for lanes in (8, 16) for d in ("f32", "bf16")]
    keys = {p.pack(t).key: (p.width, p.dtype, t, p.interleaved and p.lanes) for p in layouts for t in (False, True)}
    assert len(set(keys.values())) == len(keys)
    assert Panels(2, 8, "f32").pack(True).key == Panels(1, 16, "f32").pack(True).key
    assert Panels(2, 8, "bf16").pack(True).key != Panels(1, 16, "bf16").pack(True).key


def test_a_packed_weight_serves_any_number_of_rows_and_threads() -> None:
    keys = set()
    for rows, info in itertools.product(
        ("1", "4", "100", "?0"), (device(threads=1), device(threads=8, l2_bytes=1 << 18))
    ):
        p = matmul(f"f32[{rows},64]", "bf16[192,64]@const", transpose_rhs=True)
        v = variant(p, "vectorized")
        keys.add(v.build_kernel(p, v.default_config(p, info), info).packs[1].key)
    assert len(keys) == 1
