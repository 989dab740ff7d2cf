"""Simulated annealing (Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing", Science, 1983)."""

from __future__ import annotations

import math
import random

from kernelforge.variant import Config, ConfigSpace, config_key

HOT, COLD = 0.5, 0.01
"""Temperatures at the start and at the end: how much slower, as a share, a config may be and still be moved to."""


class Annealing:
    """Tries neighbours of where it stands: configs that differ in one parameter. It moves to those that are faster, and to
    slower ones with probability exp(-slowdown / temperature). Where all neighbours were tried it goes on from anywhere, so
    that with enough trials the whole space is searched."""

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._untried = {config_key(config): dict(config) for config in space}
        self._trials = trials
        self._temperature, self._cooling = HOT, (COLD / HOT) ** (1 / max(trials, 1))
        self._here: Config = default
        self._here_s: float | None = None

    def ask(self) -> Config | None:
        if not self._trials or not self._untried:
            return None
        self._trials -= 1
        first = self._untried.get(config_key(self._here))
        near = [config for config in self._untried.values() if _changes(config, self._here) == 1]
        config = first or self._rng.choice(near or list(self._untried.values()))
        return self._untried.pop(config_key(config))

    def tell(self, config: Config, median_s: float | None) -> None:
        self._temperature *= self._cooling
        if median_s is not None and self._accepts(median_s):
            self._here, self._here_s = config, median_s

    def _accepts(self, median_s: float) -> bool:
        if self._here_s is None or median_s <= self._here_s:
            return True
        slowdown = median_s / self._here_s - 1
        return self._rng.random() < math.exp(-slowdown / self._temperature)


def _changes(a: Config, b: Config) -> int:
    return sum(a[name] != value for name, value in b.items())
