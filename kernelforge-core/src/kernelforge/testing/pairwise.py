"""Few choices that cover every pair of values of any two factors."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Choice = Mapping[str, Any]
Value = tuple[str, int]
"""A factor and the index of one of its values."""

CANDIDATES = 40
GIVE_UP = 3
"""Pairs of a value for which nothing allowed is found before all its pairs are given up."""


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    *,
    allowed: Callable[[dict[str, Any]], bool] = lambda choice: True,
    start: Sequence[Choice] = (),
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Allowed choices of one value for each factor such that any two values of two factors that are allowed together occur
    together in one of them or of `start`.

    Greedy: each choice is, of some that hold a pair which is still missing, the one with most such pairs. They are random,
    or earlier choices with the pair put in. The same for equal arguments.
    """
    rng = random.Random(seed)
    names = list(factors)
    missing = dict.fromkeys(_pairs({name: range(len(factors[name])) for name in names}))
    pool = [{name: list(factors[name]).index(choice[name]) for name in names} for choice in start]
    chosen: list[dict[str, int]] = []
    failures: Counter[Value] = Counter()
    found: set[Value] = set()

    def named(choice: Mapping[str, int]) -> dict[str, Any]:
        return {name: factors[name][i] for name, i in choice.items()}

    def pairs_of(choice: Mapping[str, int]) -> Iterator[tuple[Value, Value]]:
        return _pairs({name: [i] for name, i in choice.items()})

    def take(choice: Mapping[str, int]) -> None:
        for pair in pairs_of(choice):
            missing.pop(pair, None)
            found.update(pair)

    for choice in pool:
        take(choice)
    while missing:
        wanted = next(iter(missing))
        tried = []
        for n in range(CANDIDATES):
            base = rng.choice(pool) if pool and n % 2 else {name: rng.randrange(len(factors[name])) for name in names}
            tried.append({**base, **dict(wanted)})
        tried.sort(key=lambda choice: -sum(pair in missing for pair in pairs_of(choice)))
        best = next((choice for choice in tried if allowed(named(choice))), None)
        if best is not None:
            take(best)
            pool.append(best)
            chosen.append(best)
            continue
        failures.update(set(wanted))
        hopeless = {v for v in wanted if failures[v] >= GIVE_UP and v not in found}
        for pair in [wanted, *(p for p in missing if hopeless.intersection(p))]:
            missing.pop(pair, None)
    return [named(choice) for choice in chosen]


def _pairs(values: Mapping[str, Sequence[int]]) -> Iterator[tuple[Value, Value]]:
    """Every two values of different factors; of a single factor, each with itself."""
    if len(values) == 1:
        ((name, indices),) = values.items()
        yield from (((name, i), (name, i)) for i in indices)
    for a, b in combinations(values, 2):
        yield from (((a, i), (b, j)) for i, j in product(values[a], values[b]))
