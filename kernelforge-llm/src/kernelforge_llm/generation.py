"""An answer, token by token: chosen on the device where that can be, otherwise on the host."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard

from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.variant import ASYNCHRONOUS
from kernelforge_llm.sampling import RandomSampler, Sampler, greedy
from kernelforge_llm.stream import StopStrings, TextStream, Token, with_text

if TYPE_CHECKING:
    from kernelforge.backend import Device
    from kernelforge_llm.decoder import Decoder


def generate(
    decoder: Decoder,
    prompt: str | Sequence[int],
    max_tokens: int,
    sampler: Sampler,
    *,
    stop: Sequence[str],
    stop_ids: Sequence[int],
    ignore_eos: bool,
) -> Iterator[Token]:
    """See `Decoder.generate`."""
    ids = decoder.encode(prompt)
    if len(ids) > decoder.context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context holds {decoder.context}",
            hint="shorten the prompt, or load with a larger context (--context) if the model allows it",
        )
    decoder.check_ids(stop_ids)
    ends = {*stop_ids, *(() if ignore_eos else decoder.config.eos_token_ids)}
    chosen = _choose(decoder, ids, max_tokens, sampler)
    return with_text(chosen, ids, TextStream(decoder.tokenizer, ids), StopStrings(stop), ends)


def draws_on_device(sampler: Sampler, device: Device) -> TypeGuard[RandomSampler]:
    """Whether the step itself draws the tokens of a sampler: on a device that gains by not waiting for the host, unless they
    depend on the tokens before."""
    return ASYNCHRONOUS in device.info.features and isinstance(sampler, RandomSampler) and not sampler.needs_history


def _choose(decoder: Decoder, history: list[int], count: int, sampler: Sampler) -> Generator[int, None, None]:
    """Up to `count` tokens after `history`, to which the caller adds what it takes."""
    if count < 1:
        return
    cache = decoder.new_cache()
    token = sampler(decoder.feed(cache, history), history)
    room = min(count - 1, decoder.context - len(history))
    yield token
    if not room:  # no step is compiled in vain
        pass
    elif sampler is greedy:
        yield from decoder.continue_greedily(cache, token, room)
    elif draws_on_device(sampler, decoder.session.device):
        yield from decoder.continue_sampled(cache, token, room, sampler)
    else:
        for _ in range(room):
            token = sampler(decoder.feed(cache, [token]), history)
            yield token
    if room < count - 1:
        warnings.warn(f"the context of {decoder.context} tokens is full", KernelForgeWarning, stacklevel=3)
