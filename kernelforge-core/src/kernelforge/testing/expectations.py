"""What a plugin announces of itself in `kernelforge_xfails.toml`, a file in its package:

    [[xfail]]
    case = "cpu/transformer.softmax/mine/4/*.huge.*"         # a pattern of case names
    kind = "wrong-values"                                    # as it fails; left out: any way
    reason = "the largest element is not subtracted"

    [[tolerance]]
    variant = "cpu/transformer.attention/mine"               # target/op/variant
    factor = 4.0                                             # times the error model's
    reason = "weights of keys are rounded to bf16"

An announced failure that does not come is a failure itself.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any, get_args

from kernelforge.errors import PluginError
from kernelforge.testing.case import Kind, Outcome

FILE = "kernelforge_xfails.toml"


@dataclass(frozen=True)
class ExpectedFailure:
    case: str
    """A pattern, as in file names."""
    reason: str
    kind: str = ""
    """Empty: any."""


@dataclass(frozen=True)
class LooserTolerance:
    variant: str
    """`target/op/variant`."""
    factor: float
    reason: str


@dataclass(frozen=True)
class Expectations:
    failures: tuple[ExpectedFailure, ...] = ()
    tolerances: tuple[LooserTolerance, ...] = ()

    @property
    def factors(self) -> dict[str, float]:
        """By variant key."""
        return {t.variant: t.factor for t in self.tolerances}

    def judge(self, outcome: Outcome) -> Outcome:
        """The outcome, given what was announced."""
        announced = next((f for f in self.failures if fnmatchcase(outcome.case, f.case)), None)
        if announced is None or outcome.status == "not-claimed":
            return outcome
        if outcome.status == "passed":
            message = f"it was announced to fail ({announced.reason}), and passed: take it out of {FILE}"
            return replace(outcome, status="failed", kind="unexpected-pass", message=message)
        if announced.kind and announced.kind != outcome.kind:
            return replace(outcome, message=f"{outcome.message} (announced as {announced.kind})")
        return replace(outcome, status="expected-failure", message=f"{announced.reason}: {outcome.message}")

    def unused(self, cases: list[str]) -> list[str]:
        """Patterns that no case has."""
        return [f.case for f in self.failures if not any(fnmatchcase(case, f.case) for case in cases)]


def expectations_of(package: str) -> Expectations:
    """What the file in a package says; nothing when there is none. Raises PluginError for a file that is wrong."""
    try:
        text = files(package).joinpath(FILE).read_text(encoding="utf-8")
    except (OSError, ModuleNotFoundError, TypeError):
        return Expectations()
    return parse(text, f"{FILE} of {package}")


def parse(text: str, source: str = FILE) -> Expectations:
    """Read the file's text. Raises PluginError, naming `source`, for what it must not hold."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PluginError(f"{source} is not TOML: {error}") from None
    if unknown := set(content) - {"xfail", "tolerance"}:
        raise PluginError(f"{source}: unknown table '{min(unknown)}'", hint="it holds [[xfail]] and [[tolerance]]")
    failures = [
        _entry(source, "xfail", e, {"case": str, "reason": str}, {"kind": str}) for e in content.get("xfail", ())
    ]
    for failure in failures:
        if failure.get("kind", "error") not in get_args(Kind):
            raise PluginError(
                f"{source}: unknown kind '{failure['kind']}'", hint=f"one of: {', '.join(get_args(Kind))}"
            )
    needed = {"variant": str, "factor": (int, float), "reason": str}
    tolerances = [_entry(source, "tolerance", e, needed, {}) for e in content.get("tolerance", ())]
    for tolerance in tolerances:
        if not tolerance["factor"] > 1:
            raise PluginError(f"{source}: factor {tolerance['factor']} of {tolerance['variant']} must be above 1")
    return Expectations(
        tuple(ExpectedFailure(**failure) for failure in failures),
        tuple(LooserTolerance(**tolerance) for tolerance in tolerances),
    )


def _entry(source: str, table: str, entry: Any, needed: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    known = {**needed, **optional}
    if not isinstance(entry, dict):
        raise PluginError(f"{source}: write [[{table}]], not [{table}]")
    for name, value in entry.items():
        if name not in known or not isinstance(value, known[name]) or value == "":
            raise PluginError(
                f"{source}: {name} = {value!r} is not for [[{table}]]", hint=f"it has: {', '.join(known)}"
            )
    if missing := needed.keys() - entry.keys():
        raise PluginError(f"{source}: a [[{table}]] has no {min(missing)}")
    return entry
