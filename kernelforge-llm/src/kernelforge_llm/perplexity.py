"""How well a model predicts a text: the perplexity, by which weight formats are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernelforge.errors import UsageError

if TYPE_CHECKING:
    from kernelforge_llm.decoder import Decoder


class Score(NamedTuple):
    """The sum of the negative log likelihoods, in nats, of a number of tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def windows(ids: Sequence[int], size: int, count: int) -> list[Sequence[int]]:
    """The first `count` whole windows of `size` tokens; a text shorter than one window is one.

    Raises UsageError when there is no token to predict.
    """
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, of which none can be predicted", hint="give a longer text")
    whole = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    return whole[:count] or [ids]


def scores(decoder: Decoder, parts: Sequence[Sequence[int]]) -> Iterator[Score]:
    """Of each window: every token but the first, given those before it in the window."""
    for part in parts:
        logits = decoder.logits(part)[:-1]
        yield Score(negative_log_likelihood(logits, np.array(part[1:])), len(part) - 1)


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """The sum over rows of logits [T, vocab] for targets [T], in float64."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=1)
    total = np.log(np.exp(wide - largest[:, None]).sum(axis=1)) + largest
    return float((total - wide[np.arange(len(targets)), targets]).sum())
