"""Cases of tuners: what is proposed is legal and new, the budget holds, and the best of a planted landscape is found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from kernelforge.lazy import resolve
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure
from kernelforge.variant import Config, ConfigSpace, config_key

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.tune.tuner import Tuner

Landscape = Callable[[Config], float | None]
"""Seconds of a config; None: it fails."""

TRIALS = (1, 2, 7, 1000)
SHARE = 0.4
"""Of a space, that is enough to come near the best of a smooth landscape."""


def _number(config: Config, name: str) -> int:
    value = config[name]
    assert isinstance(value, int)
    return value


SPACES: dict[str, ConfigSpace] = {
    "single": ConfigSpace((("tile", (8,)),)),
    "empty": ConfigSpace(),
    "line": ConfigSpace((("tile", (1, 2, 4, 8, 16, 32, 64)),)),
    "grid": ConfigSpace((("rows", (1, 2, 4, 6, 8)), ("columns", (8, 16, 32)), ("order", ("row", "column")))),
    "constrained": ConfigSpace(
        (("rows", (1, 2, 3, 4, 6, 8)), ("columns", (1, 2, 3, 4, 6, 8)), ("unroll", (1, 2, 4))),
        (("too many registers", lambda c: _number(c, "rows") * _number(c, "columns") <= 12),),
    ),
}


def bowl(config: Config) -> float:
    """Smooth: each number has a best value, near the middle of its range."""
    goals = {"tile": 16, "rows": 4, "columns": 3, "unroll": 2}
    distances = (abs(v - goals[n]) / goals[n] for n, v in config.items() if isinstance(v, int))
    return 1e-3 * (1.0 + sum(distances) + (0.5 if config.get("order") == "row" else 0.0))


def needle(space: ConfigSpace, seed: int) -> Landscape:
    """Random, with one config that is far better than all others."""
    rng = random.Random(seed)
    seconds = {config_key(c): 1e-3 * (1.0 + rng.random()) for c in space}
    seconds[rng.choice(sorted(seconds))] = 1e-4
    return lambda config: seconds[config_key(config)]


def hill(config: Config) -> float:
    """The other way round than `bowl`: its best is where that has its worst."""
    return 1e-5 / bowl(config)


def failing(config: Config) -> float | None:
    """Every other number fails."""
    first = next((v for v in config.values() if isinstance(v, int)), 1)
    return None if first in (2, 8) else bowl(config)


def tuner_cases(registry: Registry, plugin: str) -> list[Case]:
    cases: list[Case] = []
    for spec in registry.tuners.values():
        if spec.provenance.plugin != plugin:
            continue

        def add(level: int, label: str, check: Any, name: str = spec.name, **arguments: Any) -> None:
            case = partial(check, name=name, **arguments)
            cases.append(Case(f"tuner/{name}/{level}/{label}", level, "tuner", name, case))

        for space in SPACES:
            for trials in TRIALS:
                add(1, f"{space}-{trials}", check_proposals, space=space, trials=trials)
            add(2, f"{space}-optimum", check_optimum, space=space)
            add(2, f"{space}-failures", check_failures, space=space)
        for space in ("grid", "constrained"):
            add(2, f"{space}-near", check_near, space=space)
            add(2, f"{space}-together", check_proposals, space=space, trials=1000, batch=6)
        add(2, "seed", check_seed)
        add(2, "fresh", check_fresh)
        add(2, "side-by-side", check_side_by_side)
    return cases


def search(
    bench: Bench, name: str, space: str, landscape: Landscape, *, trials: int, seed: int = 0, batch: int = 1
) -> Iterator[tuple[Config, float | None]]:
    """What a tuner tries, with `batch` configs asked for before the first is told. Raises Failure for a config that is
    illegal, was tried before or is changed when it is told, and for more than `trials` of them."""
    from kernelforge.tune.tuner import Tuner as Protocol

    there = SPACES[space]
    default = dict(next(iter(there)))
    make = resolve(bench.registry.tuners[name].load)
    bench.note(f"tuner '{name}' on space '{space}', {trials} trials")
    tuner: Tuner = make(there, default, trials=trials, seed=seed)
    if not isinstance(tuner, Protocol):
        raise Failure("error", f"tuner '{name}' has no ask and tell")
    tried: set[str] = set()
    over = False
    while not over:
        asked: list[Config] = []
        while len(asked) < batch and not over:
            config = tuner.ask()
            if config is None:
                over = True
                break
            _check_proposal(name, there, config, tried, trials)
            tried.add(config_key(config))
            asked.append(dict(config))
        for config in asked:
            seconds = landscape(config)
            told = dict(config)
            tuner.tell(told, seconds)
            if told != config:
                raise Failure("input-mutated", f"tuner '{name}' changes the config that it is told of: {config}")
            yield config, seconds


def _check_proposal(name: str, space: ConfigSpace, config: Any, tried: set[str], trials: int) -> None:
    if (reason := space.violation(config)) is not None:
        raise Failure("illegal-config", f"tuner '{name}' proposes {dict(config)}: {reason}")
    if config_key(config) in tried:
        raise Failure("repeated-config", f"tuner '{name}' proposes {config_key(config)} a second time")
    if len(tried) >= trials:
        raise Failure("over-budget", f"tuner '{name}' proposes more than {trials} configs")


def _best(tried: list[tuple[Config, float | None]]) -> float:
    return min((s for _, s in tried if s is not None), default=float("inf"))


def check_proposals(bench: Bench, name: str, space: str, trials: int, batch: int = 1) -> None:
    """Legal, new, and no more than there are trials; something is tried. Raises Failure."""
    tried = list(search(bench, name, space, bowl, trials=trials, batch=batch))
    if not tried:
        raise Failure("optimum-missed", f"tuner '{name}' tries nothing of space '{space}' in {trials} trials")


def check_optimum(bench: Bench, name: str, space: str) -> None:
    """With trials for the whole space, its best config is tried, wherever it lies. Raises Failure."""
    size = len(list(SPACES[space]))
    for seed, landscape in enumerate((bowl, needle(SPACES[space], 1), needle(SPACES[space], 2))):
        best = min(s for c in SPACES[space] if (s := landscape(c)) is not None)
        found = _best(list(search(bench, name, space, landscape, trials=size, seed=seed)))
        if found > best:
            message = f"tuner '{name}' finds {found:.3g} s in all {size} configs of space '{space}', the best takes {best:.3g}"
            raise Failure("optimum-missed", message)


def check_near(bench: Bench, name: str, space: str) -> None:
    """With fewer trials, one of the best quarter of a smooth landscape is found. Raises Failure."""
    ranked = sorted(bowl(c) for c in SPACES[space])
    trials = int(SHARE * len(ranked))
    found = _best(list(search(bench, name, space, bowl, trials=trials)))
    if found > ranked[len(ranked) // 4]:
        raise Failure(
            "optimum-missed",
            f"tuner '{name}' finds {found:.3g} s in {trials} of {len(ranked)} configs of space '{space}', "
            f"a quarter of them takes at most {ranked[len(ranked) // 4]:.3g}",
        )


def check_failures(bench: Bench, name: str, space: str) -> None:
    """Configs that fail, some or all, end nothing. Raises Failure."""
    size = len(list(SPACES[space]))
    found = _best(list(search(bench, name, space, failing, trials=size)))
    working = [s for c in SPACES[space] if (s := failing(c)) is not None]
    if working and found > min(working):
        raise Failure("optimum-missed", f"tuner '{name}' misses the best of space '{space}' where some configs fail")
    list(search(bench, name, space, lambda config: None, trials=size))


def check_seed(bench: Bench, name: str) -> None:
    """Equal seeds and measurements give equal searches. Raises Failure."""
    one, two = ([c for c, _ in search(bench, name, "constrained", bowl, trials=9, seed=3)] for _ in range(2))
    if one != two:
        raise Failure("not-deterministic", f"tuner '{name}' tries {two} after {one} with the same seed")


def check_fresh(bench: Bench, name: str) -> None:
    """What an earlier search was told is nothing to the next one. Raises Failure."""
    found = []
    for earlier in (bowl, hill):
        list(search(bench, name, "constrained", earlier, trials=1000))
        found.append([c for c, _ in search(bench, name, "constrained", needle(SPACES["constrained"], 1), trials=9)])
    if found[0] != found[1]:
        message = (
            f"tuner '{name}' tries {found[1]} after one search, {found[0]} after another: what it learns belongs to one"
        )
        raise Failure("not-deterministic", message)


def check_side_by_side(bench: Bench, name: str) -> None:
    """Searches that run at the same time do not see each other. Raises Failure."""
    one, two = (partial(search, bench, name, "constrained", landscape, trials=9) for landscape in (bowl, hill))
    alone = [c for c, _ in one()]
    beside = [c for (c, _), _ in zip_longest(one(), two(), fillvalue=({}, None))][: len(alone)]
    if alone != beside:
        raise Failure("not-deterministic", f"tuner '{name}' tries {beside} beside another search, {alone} without")
