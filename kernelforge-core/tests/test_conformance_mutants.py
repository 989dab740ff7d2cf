"""The conformance suite kills every mutant for the right reason, and lets every honest plugin pass."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kernel_mutants
import pytest
from kernel_mutants import HONEST, MUTANTS, mutant_variant
from mutant_target import MutantBackend, Plugin, registry, variant
from other_mutants import BACKENDS, DIALECTS, PASSES, TUNERS, HonestPass, HonestTuner, Mutant

from kernelforge.descriptors import DialectSpec, PassSpec, TunerSpec
from kernelforge.testing.backend_cases import backend_cases
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Kind, Outcome, run_case
from kernelforge.testing.collect import Scope, collect
from kernelforge.testing.dialect_cases import dialect_cases
from kernelforge.testing.kernel_cases import kernel_cases
from kernelforge.testing.pass_cases import pass_cases
from kernelforge.testing.runner import Request, run_plugin
from kernelforge.testing.tuner_cases import tuner_cases
from kernelforge.variant import KernelVariant

FOCUS = {"reads-hidden": ".hidden."}
"""Of mutants that only few of many cases can tell: what the names of those hold."""
THINNED = {"attention": 3}
"""Every so many cases of an honest kernel are run: there are many, and each takes long."""


def first_failure(tested: KernelVariant, level: int, *, focus: str = "", step: int = 1) -> tuple[Outcome | None, int]:
    """Of the variant's cases in order, and how many were run."""
    with Bench(registry(Plugin([tested]))) as bench:
        op, info, ran = bench.registry.ops[tested.op], bench.session("mutant").device.info, 0
        for upto in range(1, level + 1):  # most live no longer than the first
            cases = [c for c in kernel_cases(tested, op, info, {upto}) if focus in c.id]
            outcome, more = run_until_failure(cases[::step], bench)
            ran += more
            if outcome is not None:
                return outcome, ran
    return None, ran


def run_until_failure(cases: list[Case], bench: Bench) -> tuple[Outcome | None, int]:
    ran = 0
    for case in cases:
        outcome = run_case(case, bench)
        ran += outcome.status != "not-claimed"
        if outcome.status == "failed":
            return outcome, ran
    return None, ran


def killed(outcome: Outcome | None, kind: Kind) -> None:
    assert outcome is not None, "it lives"
    assert outcome.kind == kind, outcome.message


@pytest.mark.parametrize("op", HONEST)
def test_an_honest_kernel_passes(op: str) -> None:
    outcome, ran = first_failure(variant("honest", f"transformer.{op}", HONEST[op]), 4, step=THINNED.get(op, 1))
    assert outcome is None
    assert ran > 50


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, _, _, kind in MUTANTS])
def test_a_mutant_is_killed_for_the_right_reason(name: str, kind: Kind) -> None:
    level = 6 if name == "first-size" else 4
    outcome, _ = first_failure(mutant_variant(name), level, focus=FOCUS.get(name, ""))
    killed(outcome, kind)


def test_there_are_enough_of_them() -> None:
    assert len({name for name, _, _, _ in MUTANTS}) == len(MUTANTS) >= 50


@pytest.mark.parametrize(("plugin", "kind"), [("CRASHING", "crashed"), ("HANGING", "timed-out")])
def test_native_death_is_a_result(plugin: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(kernel_mutants.__file__).parent)
    given = registry(getattr(kernel_mutants, plugin))
    name = getattr(kernel_mutants, plugin).kernels[0].name
    request = Request(
        "Plugin",
        case=f"mutant/transformer.silu/{name}/1/f32.*",
        extra=(f"kernel_mutants:{plugin}",),
        jobs=1,
        timeout_s=2.0,
    )
    report = run_plugin(given, request)
    assert [o.kind for o in report.failures] == [kind] * len(report.outcomes)
    assert len(report.outcomes) == 2
    assert all("running transformer.silu(f32[7,33])" in o.message for o in report.failures)


KILLED = """
from kernelforge.testing.collect import Scope
from kernelforge.testing.worker import Setup, Worker
class Telling(Worker):
    def _reply(self, patience_s):
        reply = super()._reply(patience_s)
        print(self._process.pid, reply.get("note"), flush=True)
        return reply
Telling(Setup(Scope("Plugin"), extra=("kernel_mutants:HANGING",))).run(CASE, 600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by its number as POSIX does")
def test_a_worker_ends_when_its_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(kernel_mutants.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", folder)
    with Bench(registry(kernel_mutants.HANGING)) as bench:
        case = collect(bench, Scope("Plugin", 1, variant="hangs"))[0].id
    command = [sys.executable, "-c", KILLED.replace("CASE", repr(case))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = next(int(line.split()[0]) for line in process.stdout if "transformer.silu" in line)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- passes ---


def failure_of_pass(tested: type[Mutant]) -> tuple[Outcome | None, int]:
    with Bench(registry(Plugin(passes=[PassSpec("mutant", tested)]))) as bench:
        return run_until_failure(pass_cases(bench.registry, "Plugin"), bench)


def test_an_honest_pass_passes() -> None:
    outcome, ran = failure_of_pass(HonestPass)
    assert outcome is None
    assert ran > 20


@pytest.mark.parametrize(("tested", "kind"), PASSES, ids=lambda given: getattr(given, "__name__", given))
def test_a_wrong_pass_is_killed(tested: type[Mutant], kind: Kind) -> None:
    killed(failure_of_pass(tested)[0], kind)


# --- tuners ---


def failure_of_tuner(tested: type[HonestTuner]) -> tuple[Outcome | None, int]:
    with Bench(registry(Plugin(tuners=[TunerSpec("mutant", tested)]))) as bench:
        return run_until_failure(tuner_cases(bench.registry, "Plugin"), bench)


def test_an_honest_tuner_passes() -> None:
    outcome, ran = failure_of_tuner(HonestTuner)
    assert outcome is None
    assert ran > 20


@pytest.mark.parametrize(("tested", "kind"), TUNERS, ids=lambda given: getattr(given, "__name__", given))
def test_a_wrong_tuner_is_killed(tested: type[HonestTuner], kind: Kind) -> None:
    killed(failure_of_tuner(tested)[0], kind)


# --- dialects ---


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, _, kind in DIALECTS])
def test_a_wrong_dialect_is_killed(name: str, kind: Kind) -> None:
    spec = DialectSpec("wrong", f"other_mutants:NAMED.{name.replace('-', '_')}")
    with Bench(registry(Plugin(dialects=[spec]))) as bench:
        killed(run_until_failure(dialect_cases(bench.registry, "Plugin"), bench)[0], kind)


# --- backends ---


def failure_of_backend(tested: type[MutantBackend]) -> tuple[Outcome | None, int]:
    with Bench(registry(Plugin(backend=tested))) as bench:
        return run_until_failure(backend_cases(bench.registry, "Plugin"), bench)


def test_an_honest_backend_passes() -> None:
    outcome, ran = failure_of_backend(MutantBackend)
    assert outcome is None
    assert ran > 20


@pytest.mark.parametrize(("tested", "kind"), [pytest.param(b, kind, id=name) for name, b, kind in BACKENDS])
def test_a_wrong_backend_is_killed(tested: type[MutantBackend], kind: Kind) -> None:
    killed(failure_of_backend(tested)[0], kind)
