"""Grid search: the variant's default config first, then all others, or as many of them as there are trials."""

from __future__ import annotations

import random

from kernelforge.variant import Config, ConfigSpace


class GridTuner:
    """Tries the whole grid in its own order; when trials do not suffice, a sample of it that `seed` decides."""

    def __init__(self, space: ConfigSpace, default: Config, *, trials: int, seed: int = 0) -> None:
        configs = [dict(config) for config in space if config != default]
        if len(configs) >= trials:
            configs = random.Random(seed).sample(configs, max(trials - 1, 0))
        self._pending = [dict(default), *configs][::-1]

    def ask(self) -> Config | None:
        return self._pending.pop() if self._pending else None

    def tell(self, config: Config, median_s: float | None) -> None:
        """A grid does not learn."""
