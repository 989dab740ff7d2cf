"""Runs of the suite: accounting, reports, the verbs, the pytest plugin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mutant_target import Call, Plugin, honest, registry, variant

from kernelforge import builtin
from kernelforge.cli import conformance_verbs as verbs
from kernelforge.cli.output import Output, use
from kernelforge.errors import PluginError, UsageError, WrongResultError
from kernelforge.hookspecs import hookimpl, hookspec
from kernelforge.lazy import Ref
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem
from kernelforge.provenance import BUILTIN, Provenance
from kernelforge.registry import Registry
from kernelforge.testing import assert_conformant
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Outcome, run_case
from kernelforge.testing.collect import Scope, collect, expectations, plugin_status, variants_of
from kernelforge.testing.report import as_data, html_text, json_text, junit_text, summary
from kernelforge.testing.runner import Report, Request, run_plugin
from kernelforge.variant import DeviceInfo, Verdict


def half_wrong(call: Call) -> None:
    honest(call)
    if call.results[0].dtype == np.float16:
        call.results[0][...] = 3


class FakeOutput(Output):
    def __init__(self, given: Registry) -> None:
        super().__init__("conformance run", target=None)
        self._given = given

    @property
    def registry(self) -> Registry:
        return self._given


WRONG = variant("half", "transformer.silu", half_wrong)


@pytest.fixture(scope="module")
def report() -> Report:
    return run_plugin(registry(Plugin([WRONG])), Request("Plugin", 1, op="silu", variant="half", isolate=False))


def test_the_totals_add_up(report: Report) -> None:
    assert sum(report.totals.values()) == len(report.cases) == len(report.outcomes) == 6
    assert report.totals["failed"] == len(report.failures) == 2
    assert not report.ok
    assert "6 cases: 4 passed, 2 failed, 0 expected failure, 0 not claimed" in summary(report)


def test_json_has_every_case(report: Report) -> None:
    data = json.loads(json_text(report))
    assert data == json.loads(json.dumps(as_data(report)))
    assert data["schema"] == "kernelforge.conformance/1"
    assert [c["status"] for c in data["cases"]].count("failed") == 2
    assert all(c["reproduce"].startswith("kernelforge conformance run Plugin --case mutant/") for c in data["cases"])


def test_junit_counts_them(report: Report) -> None:
    (suite,) = ElementTree.fromstring(junit_text(report))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("6", "2", "0")
    failures = suite.findall("testcase/failure")
    assert [f.get("type") for f in failures] == ["wrong-values", "wrong-values"]
    assert all("--case" in (f.text or "") for f in failures)


def test_the_page_needs_nothing_else(report: Report) -> None:
    page = html_text(report)
    assert "not conformant" in page
    assert "<th>mutant/half</th>" in page
    assert '<td class="failed">0 of 2</td>' in page
    assert '<td class="passed">2 of 2</td>' in page
    assert "http" not in page
    assert "<script" not in page


def test_the_verb_reports_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.xml", "c.html")]
    out = FakeOutput(registry(Plugin([WRONG])))
    with use(out), pytest.raises(WrongResultError, match="2 of 6 cases of 'Plugin' failed") as raised:
        verbs.run(
            "Plugin", 1, op="silu", variant="half", report_json=files[0], junit=files[1], html=files[2], in_process=True
        )
    assert raised.value.exit_code == 10
    printed = capsys.readouterr().out
    assert printed.count("\nFAILED mutant/transformer.silu/half/1/f16.") == 2
    assert printed.count("  kernelforge conformance run Plugin --case mutant/") == 2
    assert all(file.stat().st_size for file in files)
    assert out.data["totals"]["passed"] == 4


def test_one_case_is_run_alone() -> None:
    case = next(c for c in collect_ids(Plugin([WRONG])) if "/half/" in c)
    found = run_plugin(registry(Plugin([WRONG])), Request("Plugin", case=case, isolate=False))
    assert [o.case for o in found.outcomes] == [case]
    assert ": 1 case: 1 passed" in summary(found)


def collect_ids(plugin: Plugin) -> list[str]:
    with Bench(registry(plugin)) as bench:
        return [case.id for case in collect(bench, Scope("Plugin", 1))]


def test_what_does_not_exist_is_refused() -> None:
    given = registry(Plugin([WRONG]))
    with pytest.raises(UsageError, match="has no case with --case no/such/case"):
        run_plugin(given, Request("Plugin", case="no/such/case", isolate=False))
    with pytest.raises(UsageError, match="'Plugin' has no case with --op softmax --variant half"):
        run_plugin(given, Request("Plugin", 1, op="softmax", variant="half", isolate=False))
    with pytest.raises(UsageError, match="there is no level 9"):
        run_plugin(given, Request("Plugin", 9, isolate=False))
    with pytest.raises(UsageError, match="unknown plugin 'Other'"):
        run_plugin(given, Request("Other", 1, isolate=False))
    with use(FakeOutput(given)), pytest.raises(UsageError, match="there is no level 7"):
        verbs.list_cases("Plugin", 7)


class Empty:
    """A plugin that registers nothing."""


def test_no_case_is_a_failure() -> None:
    with (
        use(FakeOutput(load_registry(entry_points=[], extra_plugins=[builtin, Empty()]))),
        pytest.raises(WrongResultError, match="nothing of 'Empty' was tested"),
    ):
        verbs.run("Empty", 1, in_process=True)


def test_a_plugin_asserts_in_its_own_tests_that_it_is_conformant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_conformant("core", level=1, variant="grid")
    with pytest.raises(UsageError, match="has no case with --variant no-such-variant"):
        assert_conformant("core", level=1, variant="no-such-variant")
    monkeypatch.setattr("kernelforge.registry.default_registry", lambda: registry(Plugin([WRONG])))
    monkeypatch.setattr("kernelforge.testing.runner._run_apart", lambda cases, *_: {c.id: run_here(c) for c in cases})
    with pytest.raises(AssertionError, match="2 failed") as raised:
        assert_conformant("Plugin", level=1, variant="half")
    assert "\n\nFAILED mutant/transformer.silu/half/1/f16" in str(raised.value)
    assert "\n  kernelforge conformance run Plugin --case mutant/transformer.silu/half/1/f16" in str(raised.value)


def run_here(case: Case) -> Outcome:
    with Bench(registry(Plugin([WRONG]))) as bench:
        return run_case(case, bench)


def test_cases_are_listed_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with use(FakeOutput(registry(Plugin([WRONG])))):
        listed = verbs.list_cases("Plugin", 1)
        counted = verbs.list_cases(None, 1)
    assert "mutant/transformer.silu/half/1/" in capsys.readouterr().out
    assert any(c["claimed"] for c in listed["cases"])
    assert {row["plugin"] for row in counted["plugins"]} == {"kernelforge.builtin", "Plugin"}


def test_a_scope_makes_no_more_cases_than_it_must() -> None:
    given = registry(Plugin([WRONG]))
    names = {v.name for v in variants_of(given, "Plugin") if Scope("Plugin", op="silu").wants_kernel(v)}
    assert names == {"half", "numpy"}
    scope = Scope("Plugin", case="mutant/transformer.silu/half/1/*")
    assert scope.upto == 1
    assert [v.name for v in variants_of(given, "Plugin") if scope.wants_kernel(v)] == ["half"]
    assert (Scope("Plugin", case="*").upto, Scope("Plugin", 2, case="*").upto) == (6, 2)
    beside = Scope("Plugin", 3, op="silu").beside("mutant/transformer.silu/half/1/f16.a")
    assert (beside.case, beside.upto, beside.op) == ("mutant/transformer.silu/half/*", 3, "silu")
    assert scope.narrowing == "--case mutant/transformer.silu/half/1/*"
    assert not Scope("Plugin").narrowing
    assert plugin_status(given, "Plugin").state == "loaded"
    assert not expectations("no-such-plugin").failures


def test_the_variant_that_runs_is_the_one_that_is_tested() -> None:
    """The fallback of the target is forced as well, and other plugins' kernels are left out."""
    ids = collect_ids(Plugin([WRONG]))
    assert any("/numpy/" in i for i in ids)
    assert all(i.split("/")[0] in ("mutant", "backend") for i in ids)


def test_kernels_without_a_device_are_not_claimed() -> None:
    away = replace(WRONG, target="nowhere")
    given = registry(Plugin([away]))
    report = run_plugin(given, Request("Plugin", 1, op="silu", variant="half", isolate=False))
    assert [(o.status, o.message) for o in report.outcomes] == [("not-claimed", "unknown target 'nowhere'")]
    assert not report.ok
    with pytest.raises(UsageError, match="unknown target 'nowhere'"):
        run_plugin(given, Request("Plugin", 1, target="nowhere", isolate=False))


def test_a_kernel_that_cannot_tell_what_it_takes_fails() -> None:
    def broken(problem: Problem, device: DeviceInfo) -> Verdict:
        raise KeyError("key")

    plugin = Plugin([replace(WRONG, supports=broken)])
    found = run_plugin(registry(plugin), Request("Plugin", 1, op="silu", variant="half", isolate=False))
    assert found.failures
    for outcome in found.failures:
        assert re.search(
            r"'mutant/transformer.silu/half' of plugin Plugin \(.*\) fails: KeyError: 'key'", outcome.message
        )


def test_a_kernel_of_no_op_fails() -> None:
    report = run_plugin(
        registry(Plugin([replace(WRONG, op="transformer.sillu")])), Request("Plugin", 1, variant="half", isolate=False)
    )
    assert [(o.case, o.kind) for o in report.failures] == [("mutant/transformer.sillu/half/1/op", "error")]
    assert "unknown op 'transformer.sillu'" in report.failures[0].message


@dataclass(frozen=True)
class RecipeSpec:
    name: str
    load: Ref
    provenance: Provenance = BUILTIN


class RecipeHooks:
    @hookspec
    def kernelforge_recipes(self) -> list[RecipeSpec]:
        return []


class Recipes:
    kernelforge_hookspecs = RecipeHooks

    @hookimpl
    def kernelforge_recipes(self) -> list[RecipeSpec]:
        return [RecipeSpec("there", "json:loads"), RecipeSpec("gone", "json:no_such_name")]


def test_what_is_registered_under_a_plugins_own_hook_must_be_there() -> None:
    given = load_registry(entry_points=[], extra_plugins=[builtin, Recipes()])
    report = run_plugin(given, Request("Recipes", isolate=False))
    assert [(o.case, o.status) for o in report.outcomes] == [
        ("recipes/there/1/loads", "passed"),
        ("recipes/gone/1/loads", "failed"),
    ]


# --- the installed suite, from outside ---


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "kernelforge.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=env)


def test_pytest_runs_the_cases(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--kernelforge-plugin", "core", "--kernelforge-level", "1", "-q", "-k", "tuner")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 passed" in done.stdout


def test_pytest_refuses_what_is_not_there(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--kernelforge-plugin", "no-such-plugin")
    assert done.returncode == 4
    assert "unknown plugin 'no-such-plugin'" in done.stderr
    done = run_pytest(tmp_path, "--kernelforge-plugin", "core", "--kernelforge-level", "8")
    assert "--kernelforge-level takes 1 to 6, not 8" in done.stderr


def test_the_pytest_plugin_is_light_until_it_is_used() -> None:
    script = "import json, sys, pytest, kernelforge.testing.pytest_plugin; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"numpy", "hypothesis", "torch_mlir", "kernelforge.registry", "kernelforge.testing.case"}
    assert not heavy & set(json.loads(done.stdout))


def test_collecting_that_fails_is_an_error() -> None:
    request = Request("Plugin", 1, op="silu", extra=("no_such_module:PLUGIN",), jobs=1)
    with pytest.raises(PluginError, match="the cases of 'Plugin' cannot be run: ModuleNotFoundError"):
        run_plugin(registry(Plugin([WRONG])), request)
