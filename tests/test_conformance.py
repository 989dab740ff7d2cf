"""Every plugin of this repository is conformant."""

from __future__ import annotations

import pytest

from kernelforge.registry import default_registry
from kernelforge.testing.case import DEFAULT_LEVEL
from kernelforge.testing.report import failure_text
from kernelforge.testing.runner import Request, run_plugin

LEVELS = {"metal": 1, "rowwise": 1}
"""A software device runs every case of a GPU's kernels, but slowly."""
TIMEOUT_S = 300.0
"""Beside other tests a case may have to wait."""


@pytest.mark.filterwarnings("ignore:.* is a software GPU")
@pytest.mark.parametrize("plugin", [name for name, p in default_registry().plugins.items() if p.state == "loaded"])
def test_it_is_conformant(plugin: str) -> None:
    request = Request(plugin, LEVELS.get(plugin, DEFAULT_LEVEL), timeout_s=TIMEOUT_S)
    report = run_plugin(default_registry(), request)
    assert "\n\n".join(failure_text(report, outcome) for outcome in report.failures) == ""
    assert report.unused == ()
    if plugin in LEVELS and not report.ran:
        pytest.skip("there is no GPU here")
    assert report.ran


def test_nothing_that_is_built_in_is_announced_to_fail() -> None:
    from kernelforge.testing.collect import expectations

    for plugin in ("core", "cpu", "llm", "metal"):
        assert expectations(plugin).failures == ()
