"""Built-in kernels are conformant: a few ops at the smoke level here, all by `kernelforge conformance run metal`."""

from __future__ import annotations

import warnings

import pytest

from kernelforge.errors import KernelForgeWarning
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.testing.runner import Report, Request, run_plugin


def run(request: Request) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
        return run_plugin(default_registry(), request)


@pytest.mark.parametrize("op", ["attention", "embedding", "glu_matmul", "rope_cache_update", "softmax"])
def test_smoke(gpu: Session, op: str) -> None:
    report = run(Request("metal", 1, op=f"transformer.{op}", isolate=False))
    assert [(o.case, o.message) for o in report.failures] == []
    assert report.totals["passed"] > 5


def test_random_problems_of_attention(gpu: Session) -> None:
    report = run(Request("metal", 5, case="gpu/transformer.attention/*/5/random", isolate=False))
    assert [(o.case, o.message) for o in report.failures] == []
    assert report.totals["passed"] >= 3
