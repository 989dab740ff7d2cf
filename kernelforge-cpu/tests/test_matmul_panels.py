"""The packed layout: where every element is, what fills it up, which problems share it."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from matmul_checks import device, matmul, variant

from kernelforge_cpu.kernels.matmul.panels import pack_panels, panel_pack
from kernelforge_cpu.store import address


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (300, 19), (2, 3, 4, 9), (0, 7), (7, 0)])
def test_every_element_has_its_place_and_the_rest_is_zero(dtype: type, shape: tuple[int, ...]) -> None:
    matrix: Any = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    packed = pack_panels(matrix, 8)
    *outer, rows, columns = shape
    assert packed.shape == (*outer, -(-columns // 8), rows, 8)
    assert packed.dtype == matrix.dtype
    assert address(packed) % 64 == 0
    for *batch, panel, row, lane in itertools.product(*map(range, packed.shape)):
        column = panel * 8 + lane
        want = matrix[(*batch, row, column)] if column < columns else 0
        assert packed[(*batch, panel, row, lane)] == want


def test_a_transposed_weight_is_packed_as_the_matrix_it_stands_for() -> None:
    matrix = np.arange(35, dtype=np.float32).reshape(5, 7)
    stored = np.ascontiguousarray(matrix.T)
    np.testing.assert_array_equal(panel_pack(4, "f32", True).pack(stored), panel_pack(4, "f32", False).pack(matrix))


def test_keys_tell_apart_width_type_and_transposition_only() -> None:
    assert len({panel_pack(w, d, t).key for w in (8, 16) for d in ("f32", "bf16") for t in (False, True)}) == 8


def test_a_packed_weight_serves_any_number_of_rows_and_threads() -> None:
    keys = set()
    for rows, info in itertools.product(
        ("1", "4", "100", "?0"), (device(threads=1), device(threads=8, l2_bytes=1 << 18))
    ):
        p = matmul(f"f32[{rows},64]", "bf16[192,64]@const", transpose_rhs=True)
        v = variant(p, "vectorized")
        keys.add(v.build_kernel(p, v.default_config(p, info), info).packs[1].key)
    assert len(keys) == 1
