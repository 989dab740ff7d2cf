"""Choosing the next token from its logits.

First the repetition penalty, then the rule of the op `transformer.sample` and one draw. Equal seeds draw the same tokens on every
device, but for a number within 1e-5 of where the probabilities of two tokens meet: rounding decides there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kernelforge.dialects.transformer.sampling import choose
from kernelforge.errors import KernelForgeError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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

    def arrays(self) -> dict[str, NDArray[np.float32] | NDArray[np.int32]]:
        """The operands of `transformer.sample` that are the same for every token, of one row."""
        import numpy as np

        numbers = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        floats = {name: np.array([x], np.float32) for name, x in numbers.items()}
        return {**floats, "top_k": np.array([min(self.top_k, 2**31 - 1)], np.int32)}


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


class Draws:
    """Numbers in [0, 1) as float32, which can be seen before they are taken."""

    def __init__(self, seed: int | None) -> None:
        """`seed`: None for others in each run."""
        import numpy as np

        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._seen: deque[np.float32] = deque()
        self._largest = np.nextafter(np.float32(1), np.float32(0))

    def ahead(self, count: int) -> np.float32:
        """The number that comes after `count` others."""
        while len(self._seen) <= count:
            self._seen.append(min(self._largest.dtype.type(self._generator.random()), self._largest))
        return self._seen[count]

    def take(self) -> np.float32:
        """The next one."""
        found = self.ahead(0)
        self._seen.popleft()
        return found


@dataclass(frozen=True)
class RandomSampler:
    """Draws as `transformer.sample` does (`kernelforge.dialects.transformer.sampling.choose`), on the host."""

    sampling: Sampling
    draws: Draws

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int], /) -> int:
        sampling = self.sampling
        if self.needs_history and len(history):
            logits = _penalise(logits, history, sampling.repetition_penalty)
        best = greedy(logits)
        if sampling.temperature == 0.0:
            return best
        uniform = float(self.draws.take())
        return choose(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, uniform)

    @property
    def needs_history(self) -> bool:
        """Whether what is drawn depends on more than the logits and the numbers."""
        return self.sampling.repetition_penalty != 1.0


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler with its own random numbers: equal seeds and logits give equal tokens."""
    if sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0:
        return greedy
    return RandomSampler(sampling, Draws(sampling.seed))


def _penalise(logits: NDArray[np.float32], history: Sequence[int], penalty: float) -> NDArray[np.float32]:
    import numpy as np

    seen = np.asarray(history, dtype=np.int64)  # a token that is there twice gets the same value twice
    found = logits[seen]
    result = logits.copy()
    result[seen] = np.where(found > 0, found / penalty, found * penalty)
    return result


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if isinstance(value, bool) or not good:
        raise UsageError(f"{name} must be {wanted}, not {value!r}")
