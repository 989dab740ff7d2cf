"""Built-in kernels are conformant: the smoke level of a few ops here, everything by `kernelforge conformance run metal`."""

from __future__ import annotations

import warnings

import pytest

from kernelforge.errors import KernelForgeWarning
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.testing.runner import Request, run_plugin


@pytest.mark.parametrize("op", ["attention", "embedding", "glu_matmul", "softmax"])
def test_smoke(gpu: Session, op: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
        report = run_plugin(default_registry(), Request("metal", 1, op=f"transformer.{op}", isolate=False))
    assert [(o.case, o.message) for o in report.failures] == []
    assert report.totals["passed"] > 5
