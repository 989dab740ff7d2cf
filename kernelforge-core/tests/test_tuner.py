from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_target
import numpy as np
import pytest
from fake_target import Array, Kernel, Outputs, variant

from kernelforge.bench.matmul import matmul_problem
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.problem import Problem, parse_problem
from kernelforge.tune.grid import GridTuner
from kernelforge.tune.records import RecordStore
from kernelforge.tune.run import TuneResult, planned_trials, tunable, tune_problem
from kernelforge.tune.trial import ENDED, record_crashes, watched
from kernelforge.tune.tuner import Tuner
from kernelforge.variant import Config, ConfigSpace, KernelVariant, Reject

SPACE = ConfigSpace(
    (("tile", (4, 8, 16, 32)), ("unroll", (1, 2))),
    (("unroll 2 needs a tile of 8", lambda config: config["unroll"] == 1 or int(config["tile"]) >= 8),),
)


def asked(tuner: Tuner) -> list[Config]:
    found = []
    while (config := tuner.ask()) is not None:
        found.append(config)
        tuner.tell(config, 1.0)
    return found


def test_grid_begins_with_the_default_and_tries_each_legal_config_once() -> None:
    default = {"tile": 16, "unroll": 2}
    tuner = GridTuner(SPACE, default, trials=100)
    assert isinstance(tuner, Tuner)
    found = asked(tuner)
    assert found[0] == default
    assert sorted(map(str, found)) == sorted(map(str, map(dict, SPACE)))


def test_grid_takes_a_sample_that_the_seed_decides_when_trials_are_few() -> None:
    default = {"tile": 4, "unroll": 1}
    first, again, other = (asked(GridTuner(SPACE, default, trials=4, seed=seed)) for seed in (1, 1, 2))
    assert len(first) == 4
    assert first[0] == default
    assert first == again
    assert first != other


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "records.jsonl")


def speed_of_tile(config: Config) -> Kernel:
    return Kernel(seconds={4: 4e-3, 8: 2e-3, 16: 1e-3, 32: 3e-3}[int(config["tile"])])


def tune(store: RecordStore, *variants: KernelVariant, problem: Problem | None = None, **more: Any) -> TuneResult:
    with fake_target.session(store, *variants) as session:
        problem = problem or matmul_problem(session.registry, 5, 7, 6)
        return tune_problem(session, problem, store=store, **more)


def test_tuning_finds_the_fastest_and_selection_uses_it(store: RecordStore) -> None:
    slow, tiled = (
        variant("slow", lambda c: Kernel(seconds=5e-3), priority=9),
        variant("tiled", speed_of_tile, space=SPACE),
    )
    result = tune(store, slow, tiled)
    assert result.complete
    assert not result.interrupted
    assert result.best is not None
    assert (result.best.variant, result.best.config["tile"], result.best.median_s) == ("tiled", 16, 1e-3)
    tried = {(r.variant, r.config.get("tile"), r.config.get("unroll")) for r in result.records}
    assert len(tried) == 8
    fresh = RecordStore(store.path)
    with fake_target.session(fresh, slow, tiled) as session:
        selection = session.select(result.problem)
    assert (selection.variant.name, selection.config["tile"]) == ("tiled", 16)
    assert selection.chosen.config_source == "record"


def test_each_record_says_what_was_measured(store: RecordStore) -> None:
    result = tune(store, variant("only"))
    record = result.records[0]
    assert record == RecordStore(store.path).records[0]
    assert record.op == "transformer.matmul"
    assert record.problem == str(result.problem)
    assert (record.target, record.device, record.fingerprint, record.threads) == ("fake", "fake device", "fake-0", 2)
    assert (record.status, record.timing_source, record.variant_version) == ("ok", "scripted", "1")
    assert record.median_s == 1e-3
    assert len(record.samples_s) >= 5
    assert record.versions["python"]
    assert record.kernel_hash


def test_a_rerun_measures_only_what_is_missing(store: RecordStore) -> None:
    tune(store, variant("tiled", speed_of_tile, space=ConfigSpace((("tile", (8, 16)),))))
    result = tune(store, variant("tiled", speed_of_tile, space=ConfigSpace((("tile", (4, 8, 16)),))))
    assert result.known == 2
    assert {r.config["tile"] for r in result.records} == {4}
    again = tune(store, variant("tiled", speed_of_tile, space=ConfigSpace((("tile", (4, 8, 16)),))))
    assert (again.known, again.records, again.complete) == (3, (), True)
    assert again.best is not None
    assert again.best.config == {"tile": 16}


def test_a_new_version_of_a_kernel_is_measured_anew(store: RecordStore) -> None:
    tune(store, variant("only"))
    assert len(tune(store, variant("only", version="2")).records) == 1


def wrong(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
    return (results[0] + np.float32(0.5),)


def broken(config: Config) -> Kernel:
    raise OSError("the compiler is on holiday")


def fail_to_run() -> None:
    raise RuntimeError("device lost")


def test_failures_are_recorded_and_never_timed_or_tried_again(store: RecordStore) -> None:
    def never() -> None:
        pytest.fail("a wrong kernel was timed")

    variants = (
        variant("good"),
        variant("wrong", lambda c: Kernel(wrong, on_measure=never)),
        variant("broken", broken),
        variant("lost", lambda c: Kernel(on_measure=fail_to_run)),
    )
    told: list[str] = []
    result = tune(store, *variants, progress=lambda record: told.append(record.variant))
    by_name = {r.variant: r for r in result.records}
    assert by_name["good"].ok
    assert by_name["wrong"].status == "wrong-result"
    assert "relative error" in by_name["wrong"].message
    assert (by_name["broken"].status, by_name["broken"].message) == ("error", "OSError: the compiler is on holiday")
    assert (by_name["lost"].status, by_name["lost"].message) == ("error", "RuntimeError: device lost")
    assert sorted(told) == ["broken", "good", "lost", "wrong"]
    assert tune(store, *variants).known == 4


def test_what_is_timed_beside_one_that_fails_begins_again(store: RecordStore, tmp_path: Path) -> None:
    times = iter(range(100))

    def fail_late() -> None:
        if next(times) > 2:
            raise RuntimeError("device lost")

    good = variant("good", lambda c: Kernel(seconds=0.02))
    (alone,) = tune(RecordStore(tmp_path / "alone.jsonl"), good).records
    result = tune(store, good, variant("lost", lambda c: Kernel(on_measure=fail_late)))
    assert [(r.variant, r.ok) for r in result.records] == [("lost", False), ("good", True)]
    assert len(result.records[1].samples_s) == len(alone.samples_s)


def crash(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
    os.abort()


def be_killed(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError


CRASHING = (variant("crashes", lambda config: Kernel(crash)), variant("good", priority=-1))
KILLED = (variant("killed", lambda config: Kernel(be_killed)), variant("good", priority=-1))


def tune_to_the_end(path: Path, crashing: bool) -> None:
    tune(RecordStore(path), *(CRASHING if crashing else KILLED))


def ended_by(store: RecordStore, *, crashing: bool) -> int | None:
    """What ends another process that tunes."""
    child = multiprocessing.get_context("spawn").Process(target=tune_to_the_end, args=(store.path, crashing))
    child.start()
    child.join(60)
    return child.exitcode


def test_a_kernel_that_ends_the_process_is_told_and_not_tried_again(store: RecordStore) -> None:
    store = RecordStore(store.path.parent / "new" / store.path.name)
    assert ended_by(store, crashing=True) == -signal.SIGABRT
    told = r"ended \(Aborted\) while it tried kernel 'crashes' of plugin \w+ with config {}, which counts"
    with pytest.warns(KernelForgeWarning, match=told):
        result = tune(store, *CRASHING)
    assert [r.variant for r in result.records if r.ok] == ["good"]
    (failure,) = [r for r in store.records if not r.ok]
    assert (failure.variant, failure.status, failure.message) == ("crashes", "error", f"{ENDED}: Aborted")
    assert list(store.path.parent.iterdir()) == [store.path]


def test_a_kernel_whose_process_was_killed_is_tried_once_more(store: RecordStore) -> None:
    assert ended_by(store, crashing=False) == -signal.SIGTERM
    with pytest.warns(KernelForgeWarning, match=r"was killed while it tried kernel 'killed' .* tried again, and"):
        record_crashes(store)
    assert not store.records
    assert ended_by(store, crashing=False) == -signal.SIGTERM, "it was tried again"
    with pytest.warns(KernelForgeWarning, match=r"or was killed each time\) while it tried kernel 'killed'"):
        result = tune(store, *KILLED)
    assert [r.variant for r in result.records if r.ok] == ["good"]
    assert [r.variant for r in store.records if not r.ok] == ["killed"]
    assert list(store.path.parent.iterdir()) == [store.path]


def test_a_kernel_that_was_killed_and_then_returns_is_as_good_as_others(store: RecordStore) -> None:
    (done,) = tune(store, variant("only")).records
    trace = store.path.with_name(f"{store.path.name}.1.trial")
    trace.write_text(done.line())
    with pytest.warns(KernelForgeWarning, match="a process was killed while it tried kernel 'only'"):
        record_crashes(store)
    with watched(store, done):
        for trace in store.path.parent.glob("*.trial"):
            trace.unlink()  # as one may that looks at it before it is locked
    assert list(store.path.parent.iterdir()) == [store.path]


def test_what_crashes_are_told_to_stays(store: RecordStore) -> None:
    (done,) = tune(store, variant("only")).records
    was = faulthandler.is_enabled()
    for enabled, switch in ((False, faulthandler.disable), (True, lambda: faulthandler.enable(2))):
        switch()
        with watched(store, done):
            assert faulthandler.is_enabled()
        assert faulthandler.is_enabled() == enabled
    faulthandler.enable(2) if was else faulthandler.disable()


def test_a_trace_that_cannot_be_read_is_dropped(store: RecordStore) -> None:
    trace = store.path.with_name(f"{store.path.name}.999999999.trial")
    trace.write_bytes(b"\xff{")
    assert tune(store, variant("good")).best is not None
    assert not trace.exists()


def test_a_trial_of_another_thread_is_no_crash(store: RecordStore) -> None:
    (done,) = tune(store, variant("only")).records
    with watched(store, replace(done, status="error", message=ENDED)), warnings.catch_warnings():
        warnings.simplefilter("error")
        record_crashes(store)
    assert all(record.ok for record in store.records)


def test_interruption_keeps_what_was_measured(store: RecordStore) -> None:
    turns = iter(range(100))

    def interrupt_later() -> None:
        if next(turns) == 6:
            raise KeyboardInterrupt

    space = ConfigSpace((("tile", tuple(range(20))),))
    result = tune(store, variant("v", lambda c: Kernel(on_measure=interrupt_later), space=space))
    assert result.interrupted
    assert not result.complete
    assert 1 <= len(result.records) < 20
    assert result.records == tuple(RecordStore(store.path).records)


def test_without_time_each_variant_still_gets_its_first_candidate(store: RecordStore) -> None:
    space = ConfigSpace((("tile", tuple(range(50))),))
    result = tune(store, variant("v", space=space), budget_s=0.0)
    assert not result.complete
    assert [r.config["tile"] for r in result.records] == [0]


def test_trials_bound_the_search(store: RecordStore) -> None:
    space = ConfigSpace((("tile", tuple(range(50))),))
    result = tune(store, variant("v", space=space), trials=3)
    assert result.complete
    assert len({r.config["tile"] for r in result.records}) == 3
    with fake_target.session(store, variant("v", space=space)) as session:
        found = tunable(session, result.problem)
        assert planned_trials(session, result.problem, found, trials=3) == 3


def test_tuning_can_be_limited_to_variants(store: RecordStore) -> None:
    result = tune(store, variant("a"), variant("b"), variants=("b",))
    assert {r.variant for r in result.records} == {"b"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuner": "gird"}, "unknown tuner 'gird'"),
        ({"variants": ("c",)}, "unknown variant 'c' of transformer.matmul on target 'fake'"),
        ({"variants": ("no",)}, "variant 'no' cannot run .*: never"),
    ],
)
def test_requests_that_cannot_be_meant(store: RecordStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tune(store, variant("a"), variant("no", supports=lambda problem, device: Reject("never")), **options)


def test_a_problem_that_no_variant_accepts(store: RecordStore) -> None:
    with pytest.raises(UsageError, match="no kernel on target 'fake' can run") as raised:
        tune(store, variant("no", supports=lambda problem, device: Reject("only on Sundays")))
    assert raised.value.hint == "no: only on Sundays"


def test_dynamic_problems_and_unknown_ops_are_refused(store: RecordStore) -> None:
    dynamic = "transformer.silu(f32[?0,4]) -> (f32[?0,4]) {}"
    with pytest.raises(UsageError, match="sizes are missing"):
        tune(store, variant("a"), problem=parse_problem(dynamic))
    with pytest.raises(UsageError, match=r"unknown op 'transformer.nope'"):
        tune(store, variant("a"), problem=parse_problem("transformer.nope(f32[4]) -> (f32[4]) {}"))


def test_ops_that_write_in_place_are_tuned(store: RecordStore) -> None:
    name = "transformer.kv_cache_update"
    sampled = fake_target.registry().ops[name].samples(random.Random(0))
    problem = next(p for p in sampled if p.operand(1).size() > 30)
    result = tune(store, variant("only", op=name), problem=problem)
    assert result.records[0].ok, result.records[0].message

    def forgets(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
        cache = operands[0]
        assert cache is not None
        return (cache.copy(),)

    result = tune(store, variant("lazy", lambda c: Kernel(forgets), op=name), problem=problem)
    assert result.records[0].status == "wrong-result"
    assert "nan" in result.records[0].message
