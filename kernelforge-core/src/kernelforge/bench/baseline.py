"""Comparing a suite's report with an earlier one, as one does with measurements that vary."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelforge.bench.suite import SCHEMA
from kernelforge.errors import AssetError, KernelForgeWarning, UsageError

THRESHOLD = 0.10
"""A median slower by less than this share is no regression."""

_SPREADS = 2.0
_MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Change:
    """A case in both reports."""

    name: str
    before_ms: float
    now_ms: float
    spread_ms: float
    """The larger standard deviation of single runs, estimated from the median absolute deviation."""

    @property
    def ratio(self) -> float:
        """Above 1 is slower."""
        return self.now_ms / self.before_ms

    def verdict(self, threshold: float = THRESHOLD) -> str:
        """Slower or faster when the change exceeds both the threshold and twice the spread of runs, else the same."""
        clear = abs(self.now_ms - self.before_ms) > _SPREADS * self.spread_ms
        if clear and self.ratio > 1 + threshold:
            return "slower"
        return "faster" if clear and self.ratio < 1 / (1 + threshold) else "same"


def load_report(path: Path) -> dict[str, Any]:
    """A suite's report. Raises AssetError for a file that is missing or none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"cannot read the baseline {path}: {error.strerror or error}") from None
    except ValueError:
        raise AssetError(f"the baseline {path} is not JSON") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or not isinstance(report.get("cases"), list):
        raise AssetError(f"{path} is no report of benchmark-suite", hint="make one with --output")
    for case in report["cases"]:
        if not isinstance(case, dict) or not isinstance(case.get("name"), str) or not _readable(case):
            raise AssetError(f"the baseline {path} has a case that cannot be read: {str(case)[:80]}")
    return report


def _readable(case: Mapping[str, Any]) -> bool:
    if case.get("status") != "ok":
        return True
    latency = case.get("latency")
    if not isinstance(latency, dict):
        return False
    times: list[Any] = [latency.get("median"), latency.get("mad")]
    return all(isinstance(t, (int, float)) and math.isfinite(t) for t in times) and times[0] > 0


def compare_reports(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The cases that are the same problem in both and succeeded in both, in the order of `now`.

    Raises UsageError when the reports are of different targets; warns when they are of different devices.
    """
    if before.get("target") != now["target"]:
        raise UsageError(f"the baseline is of target '{before.get('target')}', this run of '{now['target']}'")
    if before.get("device") != now["device"]:
        message = f"the baseline was measured on another device: {before.get('device')}, now {now['device']}"
        warnings.warn(message, KernelForgeWarning, stacklevel=2)
    earlier = {case["name"]: case for case in before["cases"] if case.get("status") == "ok"}
    changes = []
    for case in now["cases"]:
        old = earlier.get(case["name"])
        if case["status"] != "ok" or old is None or old.get("problem") != case["problem"]:
            continue
        spread = _MAD_TO_DEVIATION * max(old["latency"]["mad"], case["latency"]["mad"])
        changes.append(Change(case["name"], old["latency"]["median"], case["latency"]["median"], spread))
    return changes


def lost_cases(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of cases that succeeded before and that no kernel takes now."""
    ran = {case["name"]: case.get("problem") for case in before["cases"] if case.get("status") == "ok"}
    unsupported = [case for case in now["cases"] if case["status"] == "unsupported"]
    return [case["name"] for case in unsupported if ran.get(case["name"]) == case["problem"]]
