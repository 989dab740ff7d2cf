"""The config space of `vectorized` matrix products and its default, for machines that are not here."""

from __future__ import annotations

import itertools

import pytest
from kernel_checks import problem
from matmul_checks import device, matmul, variant

from kernelforge.problem import Problem
from kernelforge.variant import DeviceInfo
from kernelforge_cpu.kernels.cores import ZEN5

MACHINES = {
    "sse": DeviceInfo("cpu", "sse", "", limits=(("vector_bytes", 16),)),
    "avx2": DeviceInfo("cpu", "avx2", "", frozenset({"avx2", "fma"}), (("l2_bytes", 1 << 18), ("vector_bytes", 32))),
    "zen5": DeviceInfo(
        "cpu", "avx512", "", frozenset({"avx512f", ZEN5}), (("l2_bytes", 1 << 20), ("vector_bytes", 64))
    ),
    "avx512": DeviceInfo("cpu", "avx512", "", frozenset({"avx512f"}), (("l2_bytes", 5 << 18), ("vector_bytes", 64))),
    "neon": DeviceInfo("cpu", "neon", "", frozenset({"asimd"}), (("l2_bytes", 4 << 20), ("vector_bytes", 16))),
}
each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def products(m: int | str, n: int, k: int, dtype: str) -> list[Problem]:
    rhs = f"{dtype}[{k},{n}]@const"
    return [
        matmul(f"f32[{m},{k}]", rhs),
        matmul(f"bf16[{m},{k}]", rhs),
        problem("glu_matmul", f"f32[{m},{k}]", rhs, rhs),
    ]


@each_machine
def test_the_default_is_a_legal_config_of_every_problem(machine: DeviceInfo) -> None:
    rows: tuple[int | str, ...] = (0, 1, 3, 4, 6, 7, 12, 13, 1000, "t")
    for m, n, k, dtype in itertools.product(rows, (0, 1, 5, 17, 100, 4096), (0, 1, 700, 9000), ("f32", "bf16")):
        for p in products(m, n, k, dtype):
            variant(p, "vectorized").default_config(p, machine)  # raises if it is not in the space


@each_machine
def test_tiles_fit_the_registers_and_hide_the_latency(machine: DeviceInfo) -> None:
    p = matmul("f32[t,4096]", "f32[4096,4096]@const")
    registers = {"sse": 14, "avx2": 16, "avx512": 32, "neon": 32}[machine.name]
    configs = list(variant(p, "vectorized").config_space(p, machine))
    assert configs
    for c in configs:
        rows, columns = int(c["rows"]), int(c["panels"]) * int(c["vectors"])
        assert rows * columns >= 8
        assert rows * columns + columns + 1 <= registers


@each_machine
def test_the_panels_of_a_group_stay_in_l2(machine: DeviceInfo) -> None:
    for n, k, dtype in itertools.product((64, 4096), (64, 4096, 16384), ("f32", "bf16")):
        p = matmul(f"f32[256,{k}]", f"{dtype}[{k},{n}]@const")
        c = variant(p, "vectorized").default_config(p, machine)
        width = int(c["panels"]) * int(c["vectors"]) * machine.limit("vector_bytes") // 4
        held = int(c["kc"]) * int(c["group"]) * width * (2 if dtype == "bf16" and c["widen"] == "tile" else 4)
        assert held <= machine.limit("l2_bytes", 1 << 18) // 2


def test_a_result_that_cannot_hold_a_partial_sum_is_not_blocked() -> None:
    machine = MACHINES["avx512"]
    f32, bf16, glu = products(100, 64, 9000, "f32")
    kc = [{c["kc"] for c in variant(p, "vectorized").config_space(p, machine)} for p in (f32, bf16, glu)]
    assert kc == [{512, 1024, 2048, 9000}, {9000}, {9000}]


@pytest.mark.parametrize(("m", "rows", "panels"), [(1, 1, 2), (5, 5, 2), (6, 6, 2), (8, 8, 1), (12, 12, 1), (13, 6, 2)])
def test_rows_that_fit_one_tile_read_the_weight_once(m: int, rows: int, panels: int) -> None:
    p = matmul(f"f32[{m},9000]", "bf16[9000,4096]@const")
    c = variant(p, "vectorized").default_config(p, MACHINES["avx512"])
    assert (c["rows"], c["panels"]) == (rows, panels)
    assert (c["kc"] == 9000) == (m <= 12)


@pytest.mark.parametrize(("m", "rows", "panels"), [(1, 1, 4), (2, 2, 4), (3, 3, 2), (6, 6, 2), (8, 4, 2), (64, 6, 2)])
def test_f32_with_avx2_is_read_as_several_panels_of_one_vector(m: int, rows: int, panels: int) -> None:
    """All heights share a packed weight. Few columns have no more panels than there are."""
    for n, most in ((4096, panels), (9, 2), (8, 1)):
        c = variant(p := matmul(f"f32[{m},700]", f"f32[700,{n}]@const"), "vectorized").default_config(
            p, MACHINES["avx2"]
        )
        assert (c["vectors"], c["panels"]) == (1, min(panels, most))
        assert n < 4096 or c["rows"] == rows


@pytest.mark.parametrize(
    ("machine", "bf16", "f16"),
    [
        *(("sse", "tile", "once"), ("avx2", "tile", "tile"), ("avx512", "once", "once"), ("neon", "tile", "tile")),
        ("zen5", "tile", "once"),
    ],
)
def test_weights_are_widened_once_where_that_is_slow_and_rows_are_many(machine: str, bf16: str, f16: str) -> None:
    for dtype, wanted in (("f32", "tile"), ("bf16", bf16), ("f16", f16)):
        for m in (1, 16, 64, 512, "t"):
            p = matmul(f"f32[{m},700]", f"{dtype}[700,4096]@const")
            c = variant(p, "vectorized").default_config(p, MACHINES[machine])
            few = m in ((1, 16, 64) if machine == "zen5" else (1, 16))
            assert c["widen"] == ("tile" if few else wanted), (dtype, m)


def test_panels_that_are_too_many_to_keep_are_widened_for_each_tile() -> None:
    p = problem("glu_matmul", "f32[64,9000]", *["f16[9000,64]@const"] * 2)
    space = variant(p, "vectorized").config_space(p, MACHINES["avx512"])
    assert variant(p, "vectorized").default_config(p, MACHINES["avx512"])["widen"] == "tile"
    kept = [int(c["kc"]) * max(2, int(c["panels"])) * int(c["vectors"]) * 64 for c in space if c["widen"] == "once"]
    assert all(n <= 512 * 1024 for n in kept)


def test_weights_are_one_stream_where_much_can_be_asked_for_ahead() -> None:
    """Where little can be, one row reads several panels at a time."""
    for core, streams, ahead in ((ZEN5, 1, 8192), ("another", 4, 2048)):
        for rows in (1, 5, 100, "t"):
            p = matmul(f"q8a[{rows},64]", "q4[96,64]@const", transpose_rhs=True)
            c = variant(p, "integer").default_config(p, device(core=core))
            assert (c["streams"], c["ahead"]) == (1 if rows in (5, 100) else streams, ahead)
