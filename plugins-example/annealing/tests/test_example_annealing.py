from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelforge.bench.matmul import matmul_problem
from kernelforge.lazy import resolve
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.tune.records import RecordStore
from kernelforge.tune.run import tune_problem
from kernelforge.tune.tuner import Tuner
from kernelforge.variant import Config, ConfigSpace, config_key

SPACE = ConfigSpace(
    (("x", tuple(range(16))), ("y", tuple(range(16)))), (("x and y are not equal", lambda c: c["x"] != c["y"]),)
)
DEFAULT = {"x": 0, "y": 15}


def make(trials: int, seed: int = 0, space: ConfigSpace = SPACE) -> Tuner:
    tuner: Tuner = resolve(default_registry().tuners["annealing"].load)(space, DEFAULT, trials=trials, seed=seed)
    return tuner


def run(tuner: Tuner, seconds: Callable[[Config], float | None]) -> list[Config]:
    asked = []
    while (config := tuner.ask()) is not None:
        asked.append(config)
        tuner.tell(config, seconds(config))
    return asked


def bowl(config: Config) -> float:
    """Fastest at (11, 4)."""
    return 1e-3 * (1 + (int(config["x"]) - 11) ** 2 + (int(config["y"]) - 4) ** 2)


def test_begins_with_the_default_and_repeats_nothing() -> None:
    asked = run(make(trials=60), bowl)
    assert asked[0] == DEFAULT
    assert len({config_key(c) for c in asked}) == len(asked) == 60
    assert all(c in SPACE for c in asked)


def test_with_enough_trials_it_tries_everything() -> None:
    assert len(run(make(trials=1000), bowl)) == 240


def test_it_walks_to_the_optimum() -> None:
    """A quarter of the space is enough on a bowl, where a random sample of that size finds it once in four."""
    found = [min(map(bowl, run(make(trials=60, seed=seed), bowl))) for seed in range(20)]
    assert sum(best == 1e-3 for best in found) >= 15


def test_it_leaves_configs_that_fail() -> None:
    assert len(run(make(trials=30), lambda config: None)) == 30


def test_several_may_be_asked_for_before_one_is_told() -> None:
    tuner = make(trials=20)
    asked = [config for config in itertools.islice(iter(tuner.ask, None), 6) if config is not None]
    for config in asked:
        tuner.tell(config, bowl(config))
    assert len({config_key(c) for c in asked}) == 6


def test_the_seed_decides() -> None:
    assert run(make(30, seed=1), bowl) == run(make(30, seed=1), bowl) != run(make(30, seed=2), bowl)


def test_tune_takes_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    with Session("cpu", threads=1) as session:
        problem = matmul_problem(session.registry, 8, 16, 8)
        store = RecordStore(tmp_path / "records.jsonl")
        result = tune_problem(session, problem, store=store, tuner="annealing", variants=["vectorized"], trials=3)
    assert 1 <= len({config_key(r.config) for r in result.records}) <= 3
    assert result.best is not None
