"""The speed of a decoder, prefill and decode, beside peers that take turns with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kernelforge.errors import WrongResultError
from kernelforge_llm.sampling import greedy

if TYPE_CHECKING:
    from kernelforge_llm.decoder import Decoder
    from kernelforge_llm.peers import DecoderPeer
    from kernelforge_llm.steps import Logits

DIFFERENT = 0.25
"""Logits of two implementations that differ by more than this (norm of the difference over the norm) are not of one model: f16
sums and 8-bit activations make some hundredths."""

_PAUSE_S = 0.1
"""Thread pools spin for a while after their last run and would slow down who comes next."""


class Run(NamedTuple):
    """Seconds of one measurement."""

    prefill: float
    first_token: float
    """From the prompt to the choice of the first token."""
    decode: float


@dataclass(frozen=True)
class Task:
    """What is measured: a prefill, and a decode of so many greedy steps of one token, both behind `depth` tokens."""

    prompt_tokens: int
    gen_tokens: int
    depth: int
    repeat: int

    @property
    def room(self) -> int:
        """Positions that the cache must hold."""
        return self.depth + max(self.prompt_tokens, self.gen_tokens)


@dataclass
class Measured:
    """The runs that count; of peers by name."""

    task: Task
    runs: list[Run] = field(default_factory=list)
    peers: dict[str, list[Run]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    """Of a peer's logits after the prompt from ours, relative."""

    def speeds(self, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
        """Tokens per second of prefill and decode, seconds to the first token: median, min, max."""
        return {
            "prefill_tok_s": _summary([self.task.prompt_tokens / run.prefill for run in runs]),
            "decode_tok_s": _summary([self.task.gen_tokens / run.decode for run in runs]),
            "time_to_first_token_s": _summary([run.first_token for run in runs]),
        }

    def beside(self, name: str) -> dict[str, Any]:
        """A peer's speeds, ours over its by medians, and how far its logits are from ours."""
        ours, theirs = self.speeds(self.runs), self.speeds(self.peers[name])
        kinds = ("prefill", "decode")
        return {
            **{f"{kind}_tok_s": theirs[f"{kind}_tok_s"]["median"] for kind in kinds},
            **{f"{kind}_samples": theirs[f"{kind}_tok_s"] for kind in kinds},
            **{f"{kind}_ratio": ours[f"{kind}_tok_s"]["median"] / theirs[f"{kind}_tok_s"]["median"] for kind in kinds},
            "logits_difference": self.differences[name],
        }


def prompt_ids(count: int, vocab: int) -> list[int]:
    """Fixed, varied token ids."""
    return [(i * 7919 + 13) % vocab for i in range(count)]


def benchmark(
    decoder: Decoder,
    task: Task,
    peers: Mapping[str, DecoderPeer],
    *,
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Compare logits with the peers', warm up, then measure all in turn, `task.repeat` times.

    Raises WrongResultError before anything is timed when a peer's logits are those of another model.
    """
    vocab = decoder.config.vocab_size
    cache = decoder.new_cache()
    before, prompt = prompt_ids(task.depth, vocab), prompt_ids(task.prompt_tokens, vocab)
    if before:
        decoder.feed(cache, before)
    found = Measured(task, peers={name: [] for name in peers})
    logits = decoder.feed(cache, prompt).copy()
    cache.truncate(0, task.depth)
    for name, peer in peers.items():
        found.differences[name] = _difference(logits, peer, prompt)
    for number in range(task.repeat + 1):
        time.sleep(_PAUSE_S if peers else 0.0)
        start = time.perf_counter()
        scores = decoder.feed(cache, prompt)
        fed = time.perf_counter()
        token = greedy(scores)
        chosen = time.perf_counter()
        cache.truncate(0, task.depth)
        begin = time.perf_counter()
        for _ in decoder.continue_greedily(cache, token, task.gen_tokens):
            pass
        end = time.perf_counter()
        cache.truncate(0, task.depth)
        runs = {"": Run(fed - start, chosen - start, end - begin)}
        for name, peer in peers.items():
            time.sleep(_PAUSE_S)
            answer = peer.measure(prompt, task.gen_tokens)
            runs[name] = Run(answer["prefill_s"], answer["prefill_s"], answer["decode_s"])
        progress()
        if number:  # the first round compiles and touches the memory
            found.runs.append(runs.pop(""))
            for name, run in runs.items():
                found.peers[name].append(run)
    return found


def _difference(ours: Logits, peer: DecoderPeer, prompt: Sequence[int]) -> float:
    import numpy as np

    theirs = peer.logits(prompt)
    if theirs.shape != ours.shape:
        raise WrongResultError(f"{peer.name} has {theirs.size} logits, ours are {ours.size}: they run different models")
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not difference < DIFFERENT:
        raise WrongResultError(
            f"the logits of {peer.name} differ from ours by {difference:.0%}: "
            "one of the two is wrong, or they run different models"
        )
    return difference


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
