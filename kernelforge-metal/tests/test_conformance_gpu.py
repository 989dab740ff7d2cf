"""Random problems of the kernels with most cases; what `make test` checks of all others is the smoke level
(tests/test_conformance.py), and `kernelforge conformance run metal` checks everything."""

from __future__ import annotations

import warnings

from kernelforge.errors import KernelForgeWarning
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.testing.runner import Request, run_plugin


def test_random_problems_of_attention(gpu: Session) -> None:
    request = Request("metal", 5, case="gpu/transformer.attention/*/5/random", isolate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
        report = run_plugin(default_registry(), request)
    assert [(o.case, o.message) for o in report.failures] == []
    assert report.totals["passed"] >= 3
