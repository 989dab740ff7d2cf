"""The built-in kernels are conformant: the smoke level here, all levels by `kernelforge conformance run cpu`."""

from __future__ import annotations

from kernelforge.registry import default_registry
from kernelforge.testing.runner import Request, run_plugin


def test_smoke() -> None:
    report = run_plugin(default_registry(), Request("cpu", 1, isolate=False))
    assert [(o.case, o.message) for o in report.failures] == []
    assert report.totals["passed"] > 300


def test_nothing_is_written_behind_a_single_last_column_of_16_bits() -> None:
    case = "cpu/transformer.matmul/vectorized/1/bf16.guarded.*"
    report = run_plugin(default_registry(), Request("cpu", case=case, isolate=False))
    assert [o.status for o in report.outcomes] == ["passed"]
