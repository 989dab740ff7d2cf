"""Decoding on the device gives what the host would choose, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge import reference
from kernelforge.backend import Buffer
from kernelforge.errors import KernelForgeError, KernelForgeWarning, UsageError
from kernelforge.reference import INFO, HostBuffer, ReferenceDevice
from kernelforge.session import Session
from kernelforge.variant import ASYNCHRONOUS
from kernelforge_llm.chain import Chain
from kernelforge_llm.decoder import Decoder, load
from kernelforge_llm.sampling import RandomSampler, Sampler, Sampling, greedy, make_sampler
from kernelforge_llm.stream import Token

LLAMA = Path(__file__).parent / "data" / "oracles" / "llama-gqa"
CONTEXT = 24
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module", params=["cpu", "reference", "ahead"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    """Two sequences; "ahead" is numpy that says it works while the host goes on."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ahead":
            patch.setattr(reference, "INFO", replace(INFO, features=frozenset({ASYNCHRONOUS})))
        with Session(request.param.replace("ahead", "reference"), threads=2) as session:
            yield load(LLAMA, session=session, context=CONTEXT, sequences=2)


def drawing(**options: Any) -> RandomSampler:
    sampler = make_sampler(Sampling(**options))
    assert isinstance(sampler, RandomSampler)
    return sampler


def on_the_host(decoder: Decoder, prompt: list[int], count: int, sampler: Sampler = greedy) -> list[int]:
    cache = decoder.new_cache()
    tokens = [sampler(decoder.feed(cache, prompt), prompt)]
    while len(tokens) < count:
        tokens.append(sampler(decoder.feed(cache, tokens[-1:]), prompt + tokens))
    return tokens


def test_tokens_are_those_that_the_host_would_choose(decoder: Decoder) -> None:
    want = on_the_host(decoder, [5, 6, 7], 12)
    cache = decoder.new_cache()
    decoder.feed(cache, [5, 6, 7])
    lengths = []
    found = []
    for token in decoder.continue_greedily(cache, want[0], 11):
        found.append(token)
        lengths.append(cache.lengths[0])
    assert found == want[1:]
    assert lengths == list(range(4, 15))
    assert [t.id for t in decoder.generate([5, 6, 7], 12, ignore_eos=True)] == want
    (scores,) = decoder.step(cache, [[found[-1]], []])  # what follows is as if the host had fed them
    np.testing.assert_allclose(scores, decoder.logits([5, 6, 7, *want])[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"temperature": 2.5, "min_p": 0.2, "top_k": 1 << 40}],
)
def test_a_seed_draws_the_same_tokens_on_the_device(decoder: Decoder, options: dict[str, Any]) -> None:
    want = on_the_host(decoder, [5, 6, 7], 12, drawing(seed=3, **options))
    cache, sampler = decoder.new_cache(), drawing(seed=3, **options)
    assert sampler(decoder.feed(cache, [5, 6, 7]), []) == want[0]
    answer = decoder.continue_sampled(cache, want[0], 8, sampler)
    assert list(itertools.islice(answer, 5)) == want[1:6]
    del answer  # with a step under way, whose number is for the next token
    assert sampler(decoder.feed(cache, [want[5]]), []) == want[6]
    assert list(decoder.continue_sampled(cache, want[6], 5, sampler)) == want[7:]
    generated = decoder.generate([5, 6, 7], 12, drawing(seed=3, **options), ignore_eos=True)
    assert [t.id for t in generated] == want


def test_no_step_is_compiled_for_one_token(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "continue_greedily", None)
    monkeypatch.setattr(decoder, "continue_sampled", None)
    for sampler in (greedy, drawing(seed=1)):
        assert len(list(decoder.generate([5, 6], 1, sampler, ignore_eos=True))) == 1


def test_generation_samples_on_devices_that_run_ahead(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    continued: list[RandomSampler] = []

    def continue_sampled(cache: Any, token: int, count: int, sampler: RandomSampler) -> Iterator[int]:
        continued.append(sampler)
        return iter([1] * count)

    monkeypatch.setattr(decoder, "continue_sampled", continue_sampled)
    ahead = ASYNCHRONOUS in decoder.session.device.info.features
    for sampling in (Sampling(seed=1), Sampling(repetition_penalty=1.1), Sampling(temperature=0.0)):
        sampler = make_sampler(sampling)
        assert len(list(decoder.generate([5, 6], 3, sampler, ignore_eos=True))) == 3
    assert len(continued) == ahead
    monkeypatch.undo()
    with pytest.raises(UsageError, match="a repetition penalty needs the tokens before"):
        next(decoder.continue_sampled(decoder.new_cache(), 1, 1, drawing(repetition_penalty=1.1)))


def test_a_chain_that_is_left_early_leaves_the_cache_at_the_last_token(decoder: Decoder) -> None:
    want = on_the_host(decoder, [9, 8], 8)
    cache = decoder.new_cache()
    decoder.feed(cache, [9, 8])
    answer = decoder.continue_greedily(cache, want[0], 7)
    assert isinstance(answer, Generator)
    assert list(itertools.islice(answer, 3)) == want[1:4]
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert cache.lengths == [5, 0]
    assert list(decoder.continue_greedily(cache, want[3], 4)) == want[4:]


def test_two_sequences_of_a_cache_take_turns(decoder: Decoder) -> None:
    prompts = [[1, 2, 3], [30, 20]]
    wants = [on_the_host(decoder, prompt, 6) for prompt in prompts]
    cache = decoder.new_cache()
    chains = []
    for sequence, (prompt, want) in enumerate(zip(prompts, wants, strict=True)):
        decoder.feed(cache, prompt, sequence)
        chains.append(decoder.continue_greedily(cache, want[0], 5, sequence))
    assert list(zip(*chains, strict=True)) == list(zip(*(want[1:] for want in wants), strict=True))


def test_where_generation_ends(decoder: Decoder) -> None:
    want = on_the_host(decoder, [5, 6, 7], 8)
    last = next(i for i in itertools.count(3) if want[i] not in want[:i])
    assert [t.id for t in decoder.generate([5, 6, 7], 8, stop_ids=[want[last]])] == want[:last]
    with pytest.warns(KernelForgeWarning, match=f"the context of {CONTEXT} tokens is full"):
        assert len(list(decoder.generate([5, 6, 7], 99, ignore_eos=True))) == CONTEXT - 3 + 1
    answer = decoder.generate([5, 6, 7], 8, ignore_eos=True)
    assert next(answer) == Token(want[0], "")
    del answer
    assert [t.id for t in decoder.generate([5, 6, 7], 8, ignore_eos=True)] == want


def test_what_cannot_be_continued(decoder: Decoder) -> None:
    cache = decoder.new_cache()
    decoder.feed(cache, [1, 2, 3])
    with pytest.raises(UsageError, match="do not fit the context"):
        next(decoder.continue_greedily(cache, 4, CONTEXT - 2))
    with pytest.raises(UsageError, match="token id 320 is out of range"):
        next(decoder.continue_greedily(cache, 320, 1))
    assert list(decoder.continue_greedily(cache, 4, 0)) == []
    assert cache.lengths == [3, 0]


class Counting:
    """A step whose token is one more than the last, and whose logits overflow at one of them."""

    def __init__(self, overflow: int) -> None:
        self.overflow = overflow
        self.started: list[int] = []

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Callable[[], tuple[Buffer, ...]]:
        def call() -> tuple[Buffer, ...]:
            token = int(inputs["tokens"].array[0]) + 1
            self.started.append(int(inputs["positions"][0]))
            out["token"].write(np.array([token], np.int32))
            logits = np.zeros((1, 50), np.float32)
            logits[0, token] = np.inf if token == self.overflow else 1.0
            out["logits"].write(logits)
            return ()

        return call


@pytest.mark.parametrize(("features", "ahead"), [(frozenset(), 1), (frozenset({ASYNCHRONOUS}), 2)])
def test_one_step_is_started_ahead_where_the_device_works_meanwhile(features: frozenset[str], ahead: int) -> None:
    class Device(ReferenceDevice):
        info = replace(INFO, features=features)

        def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
            return super().allocate(shape, dtype)

    step = Counting(overflow=14)
    chain = Chain(step, Device(), {}, 50)  # type: ignore[arg-type]  # all that a chain asks of an executable
    tokens = chain.run(10, 100, 0, 3)
    assert next(tokens) == 11
    assert step.started == list(range(100, 100 + ahead))
    assert list(tokens) == [12, 13]
    assert step.started == [100, 101, 102], "no step whose token nobody wants"
    tokens = chain.run(11, 0, 0, 9)
    assert list(itertools.islice(tokens, 2 * ahead)) == [12, 13, 14, 15][: 2 * ahead]
    with pytest.raises(KernelForgeError, match=r"the largest logit is inf \(token 14\)"):
        next(tokens)
    tokens = chain.run(11, 0, 0, 9)
    assert list(itertools.islice(tokens, 1)) == [12]
    tokens.close()
    tokens = chain.run(12, 0, 0, 9)
    if ahead == 2:  # as an answer ends where the token is one that ends it
        assert list(itertools.islice(tokens, 2)) == [13, 14]
        with pytest.raises(KernelForgeError, match=r"the largest logit is inf \(token 14\)"):
            tokens.close()
