"""Choosing the next token from its logits.

The order is that of most decoders: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Each filter
sees the probabilities that the one before it left, scaled to sum to 1. Among equal logits the lowest id wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kernelforge.errors import KernelForgeError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_LEAST_TEMPERATURE = 1e-30  # a float32 that divides without becoming 0; no two logits of one scale are that close
_COLUMNS = 512


class Sampler(Protocol):
    """Chooses a token id."""

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int], /) -> int:
        """The id after `history` (prompt and answer so far), whose logits are float32[vocabulary].

        Raises `KernelForgeError` if a logit is NaN or the largest one infinite.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How to sample. Raises `UsageError` with the name of a field whose value cannot be meant."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the largest one."""
    top_k: int = 0
    """Keeps the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keeps the most likely tokens whose probabilities first sum to this (Holtzman et al. 2019, nucleus sampling)."""
    min_p: float = 0.0
    """Keeps tokens at least this times as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the history (Keskar et al. 2019, CTRL)."""
    seed: int | None = None
    """Of the draws; None: different in each run."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "a number from 0")
        _check("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "an integer from 0 (0: off)")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.0 < penalty < math.inf, "a number above 0 (1: off)")
        if self.seed is not None:
            _check("seed", self.seed, isinstance(self.seed, int) and self.seed >= 0, "an integer from 0")


def greedy(logits: NDArray[np.float32], history: Sequence[int] = ()) -> int:
    """The sampler of temperature 0: the id of the largest logit, the lowest such id. Raises as `Sampler` says."""
    best = int(logits.argmax())  # the first NaN, if there is one
    check_choice(best, float(logits[best]))
    return best


def check_choice(token: int, logit: float) -> None:
    """Raises KernelForgeError when `logit`, the largest one, is no finite number."""
    if not math.isfinite(logit):
        raise KernelForgeError(
            f"the largest logit is {logit} (token {token}): the model's weights or activations overflowed",
            hint="try --weights f32",
        )


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler with its own random numbers: equal seeds and logits give equal tokens."""
    if sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0:
        return greedy
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(sampling.seed))
    temperature = np.float32(max(sampling.temperature, _LEAST_TEMPERATURE))

    def sample(logits: NDArray[np.float32], history: Sequence[int], /) -> int:
        if sampling.repetition_penalty != 1.0 and len(history):
            logits = _penalise(logits, history, sampling.repetition_penalty)
        best = greedy(logits)
        if sampling.temperature == 0.0:
            return best
        ids = _top_k(logits, sampling.top_k)
        kept = logits if ids is None else logits[ids]
        with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest -inf, as it should
            weights = np.exp((kept - logits[best]) / temperature)
        if sampling.top_p < 1.0:
            inside = _top_p(weights, sampling.top_p)
            ids, weights = inside if ids is None else ids[inside], weights[inside]
        if sampling.min_p > 0.0:
            weights = np.where(weights >= sampling.min_p, weights, 0.0)
        sums = weights.cumsum(dtype=np.float64)
        drawn = int(sums.searchsorted(generator.random() * sums[-1], side="right"))
        return drawn if ids is None else int(ids[drawn])

    return sample


def _penalise(logits: NDArray[np.float32], history: Sequence[int], penalty: float) -> NDArray[np.float32]:
    import numpy as np

    seen = np.asarray(history, dtype=np.int64)  # a token that is there twice gets the same value twice
    found = logits[seen]
    result = logits.copy()
    result[seen] = np.where(found > 0, found / penalty, found * penalty)
    return result


def _top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int64] | None:
    """Ids of the k largest logits, ascending; None for all."""
    import numpy as np

    if not 0 < k < logits.size:
        return None
    columns = max(_COLUMNS, 2 * k)
    whole = logits.size - logits.size % columns
    ids: NDArray[np.int64] | None = None
    if whole > 2 * columns:
        # Each column's maximum is a logit, so that the k-th largest of them is at most the k-th largest logit: what is
        # below it is out, and few are left for the slower selection.
        maxima = logits[:whole].reshape(-1, columns).max(axis=0)
        ids = np.flatnonzero(logits >= np.partition(maxima, columns - k)[columns - k])
        logits = logits[ids]
    least = np.partition(logits, logits.size - k)[logits.size - k]
    above = np.flatnonzero(logits > least)
    level = np.flatnonzero(logits == least)[: k - above.size]
    chosen = np.sort(np.concatenate([above, level]))
    return chosen if ids is None else ids[chosen]


def _top_p(weights: NDArray[np.float32], p: float) -> NDArray[np.int64]:
    """Places of the largest weights that together first reach the share `p`, ascending."""
    import numpy as np

    # Weights below the cut sum to less than 1 - p, so that all that is wanted lies above it: few are left to be sorted.
    total = float(weights.sum(dtype=np.float64))
    places = np.flatnonzero(weights >= (1.0 - p) * total / weights.size)
    order = places[np.argsort(-weights[places], kind="stable")]
    count = int(weights[order].cumsum(dtype=np.float64).searchsorted(p * total)) + 1
    return np.sort(order[:count])


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if isinstance(value, bool) or not good:
        raise UsageError(f"{name} must be {wanted}, not {value!r}")
