"""A loaded model: logits and text from tokens, through compiled steps and a KV cache."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kernelforge.backend import Buffer, Executable, Timing
from kernelforge.errors import AssetError, UsageError
from kernelforge.session import Session
from kernelforge_llm.cache import CacheFormat, KVCache
from kernelforge_llm.chain import Chain
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.generation import draws_on_device, generate
from kernelforge_llm.model import PREFILL_TOKENS, Model
from kernelforge_llm.sampling import RandomSampler, Sampler, greedy
from kernelforge_llm.source import Source, open_source
from kernelforge_llm.steps import Logits, Steps, step_inputs
from kernelforge_llm.stream import Token
from kernelforge_llm.weights import ActivationFormat, WeightFormat

if TYPE_CHECKING:
    from kernelforge.explanation import Explanation


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    weights: WeightFormat = "native",
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    kv_dtype: CacheFormat = "auto",
    activations: ActivationFormat = "auto",
    session: Session | None = None,
) -> Decoder:
    """Load a model for generation.

    `path` is a Hugging Face folder, a GGUF file, `org/name` on the Hub, or None for the built-in `tinypy`. `weights`
    converts matrices while compiling ("native" keeps the checkpoint's dtype; "q8" and "q4" quantise). `context` is the
    cache's capacity in positions, by default the model's own up to 4096; `sequences` how many it can hold side by side;
    `kv_dtype` what it keeps keys and values in ("auto": f16 beside f16 or quantised weights, else f32);
    `activations` what they are converted to before they meet quantised weights ("auto": q8 where the device says so).
    Raises AssetError for a missing or broken checkpoint, DeviceError when the target is not usable.
    """
    source = open_source(path)
    session = session or Session(target, threads=threads)
    return open_decoder(
        source,
        session,
        weights=weights,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        activations=activations,
    )


def open_decoder(
    source: Source,
    session: Session,
    *,
    weights: WeightFormat = "native",
    context: int | None = None,
    sequences: int = 1,
    kv_dtype: CacheFormat = "auto",
    activations: ActivationFormat = "auto",
) -> Decoder:
    """A decoder for any source (random weights, say) on an open session. Raises as `load` does."""
    model = Model.make(
        source,
        session.registry,
        weights=weights,
        context=context,
        sequences=sequences,
        kv_dtype=kv_dtype,
        activations=activations,
        device=session.device.info,
    )
    return Decoder(model, session)


class Decoder:
    """A model on a device. Threads that use one take turns, step by step; a cache is for one at a time."""

    def __init__(self, model: Model, session: Session) -> None:
        self.model, self.session = model, session
        self.config: ModelConfig = model.config
        self.context: int = model.context
        self.tokenizer = model.source.tokenizer
        self._steps = Steps(model, session)
        self._chains: WeakKeyDictionary[KVCache, Chain] = WeakKeyDictionary()

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far; each of the steps is compiled when it is first needed."""
        return self._steps.compile_s

    def prepare(self) -> None:
        """Compile both steps now, rather than when each is first needed."""
        _ = self._steps.one, self._steps.many

    def new_cache(self) -> KVCache:
        """An empty cache for this model's number of sequences."""
        model = self.model
        return KVCache(
            self.session.device, self.config, sequences=model.sequences, context=self.context, dtype=model.cache_dtype
        )

    def step(
        self,
        cache: KVCache,
        batch: Sequence[Sequence[int]],
        *,
        every_row: bool = False,
        pad_to: int | None = None,
    ) -> Logits:
        """Append `batch[i]` to sequence i of the cache, all in one pass of the model.

        Returns the logits [rows, vocab] after the last token of each sequence that got any, or after every token.
        `pad_to` lays every sequence out in that many tokens, the rest being padding (a fixed shape for any batch).
        Raises UsageError for a token id out of range or a sequence that would not fit the context, and leaves the
        cache as it was.
        """
        if len(batch) != len(cache.lengths):
            raise UsageError(f"got {len(batch)} sequences for a cache of {len(cache.lengths)}")
        counts = [len(ids) for ids in batch]
        for sequence, count in enumerate(counts):
            cache.require_room(sequence, count)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for slot, (ids, count, start) in enumerate(zip(batch, counts, cache.lengths, strict=True)):
            if count:
                self.check_ids(ids)
                first = len(tokens)
                rows += range(first, first + count) if every_row else (first + count - 1,)
                tokens.extend(ids)
                positions += range(start, start + count)
                slots += [slot] * count
            if pad_to is not None and count < pad_to:
                padding = pad_to - count
                tokens += [0] * padding
                positions += [-1] * padding
                slots += [slot] * padding
        if not rows:
            raise UsageError("there are no tokens to run", hint="give at least one")
        logits = self._steps.run(cache, tokens, positions, slots, rows)
        cache.lengths = list(map(operator.add, cache.lengths, counts))
        return logits

    def explain(self, tokens: int = 1, depth: int = 0, *, sampler: Sampler = greedy, repeats: int = 9) -> Explanation:
        """What runs a step of `tokens` tokens with `depth` positions in the cache, and its share of the step's time; for one
        token, the step of generating with `sampler`.

        The step is timed on a cache of its own. Raises UsageError when the context does not hold so many.
        """
        executable, inputs = self._alone(tokens, depth, sampler)
        return executable.explain(inputs, repeats=repeats)

    def measure(self, tokens: int = 1, depth: int = 0, *, repeats: int = 9) -> Timing:
        """How long the device takes for a step of `tokens` tokens with `depth` positions in the cache: without what the host
        does between steps. On a cache of its own; raises as `explain` does."""
        executable, inputs = self._alone(tokens, depth)
        return executable.measure(inputs, repeats=repeats)

    def _alone(
        self, tokens: int, depth: int, sampler: Sampler = greedy
    ) -> tuple[Executable, dict[str, NDArray[Any] | Buffer]]:
        """A step on a cache of its own, and its inputs."""
        if tokens < 1:
            raise UsageError(f"a step of {tokens} tokens", hint="at least one")
        cache = self.new_cache()
        cache.require_room(0, depth + tokens)
        ids = [i % self.config.vocab_size for i in range(tokens)]
        inputs = step_inputs(cache, ids, range(depth, depth + tokens), [0] * tokens, (tokens - 1,))
        if tokens == 1 and draws_on_device(sampler, self.session.device):
            choice = {**sampler.sampling.arrays(), "uniform": np.full(1, 0.5, np.float32)}
            return self._steps.sampled.executable, inputs | choice
        return (self._steps.one if tokens == 1 else self._steps.many).executable, inputs

    def feed(self, cache: KVCache, ids: Sequence[int], sequence: int = 0) -> Logits:
        """Append any number of tokens to one sequence; the logits [vocab] after the last. Raises as `step`."""
        count = len(ids)
        cache.require_room(sequence, count)
        length = cache.lengths[sequence]
        self.check_ids(ids)
        if not count:
            raise UsageError("there are no tokens to run", hint="give at least one")
        for start in range(0, count, PREFILL_TOKENS):
            part = ids[start : start + PREFILL_TOKENS]
            end = len(part)
            scores = self._steps.run(cache, part, range(length, length + end), [sequence] * end, (end - 1,))
            cache.lengths[sequence] = length = length + end
        last: Logits = scores[0]
        return last

    def continue_greedily(self, cache: KVCache, token: int, count: int, sequence: int = 0) -> Iterator[int]:
        """The `count` likeliest tokens after `token`, the next one of a sequence. What is fed stays on the device: each step
        reads the token that the one before it chose, and the host may see it later.

        When a token is given out, those before it, and not itself, are in the cache. Raises UsageError for an id out of range
        or when the context does not hold so many, KernelForgeError when a largest logit is no finite number.
        """
        self._check_next(cache, token, count, sequence)
        chain = self._chains.pop(cache, None)  # serves one at a time
        if chain is None:
            chain = Chain(self._steps.one.executable, self.session.device, cache.buffers, self.config.vocab_size)
        try:
            yield from self._run_chain(chain, cache, token, count, sequence)
        finally:
            self._chains[cache] = chain

    def continue_sampled(
        self, cache: KVCache, token: int, count: int, sampler: RandomSampler, sequence: int = 0
    ) -> Iterator[int]:
        """As `continue_greedily`, with tokens that the device draws with the sampler's numbers: those that the sampler would draw
        on the host. Raises UsageError, too, for a sampler that depends on the tokens before."""
        if sampler.needs_history:
            raise UsageError("a repetition penalty needs the tokens before, which are not on the device")
        self._check_next(cache, token, count, sequence)
        chain = Chain(
            self._steps.sampled.executable, self.session.device, cache.buffers, self.config.vocab_size, sampler
        )
        yield from self._run_chain(chain, cache, token, count, sequence)

    def _check_next(self, cache: KVCache, token: int, count: int, sequence: int) -> None:
        cache.require_room(sequence, count)
        self.check_ids([token])

    def _run_chain(self, chain: Chain, cache: KVCache, token: int, count: int, sequence: int) -> Iterator[int]:
        start = cache.lengths[sequence]
        with closing(chain.run(token, start, sequence, count)) as tokens:
            for number, found in enumerate(tokens, 1):
                cache.lengths[sequence] = start + number
                yield found

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises UsageError for an id that the model does not have."""
        for token in ids:
            if not 0 <= operator.index(token) < self.config.vocab_size:
                raise UsageError(
                    f"token id {token} is out of range", hint=f"ids are from 0 to {self.config.vocab_size - 1}"
                )

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids pass through, checked.

        Raises AssetError for text without a tokenizer, UsageError for an empty prompt or an id out of range.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise AssetError(
                    f"'{self.model.source.name}' has no tokenizer.json, so it cannot read text",
                    hint="give token ids (--prompt-ids 1,2,3)",
                )
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [operator.index(i) for i in prompt]
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        self.check_ids(ids)
        return ids

    def logits(self, ids: Sequence[int]) -> Logits:
        """float32 [len(ids), vocab]: the scores after each token of a sequence that starts with the first one."""
        return self.logits_batch([ids])[0]

    def logits_batch(self, batch: Sequence[Sequence[int]], *, pad_to: int | None = None) -> list[Logits]:
        """The logits of several sequences in one pass, each [len(ids), vocab]. At most `sequences` of them."""
        sequences = self.model.sequences
        if len(batch) > sequences:
            raise UsageError(f"{len(batch)} sequences, the model was loaded for {sequences}", hint="load(sequences=N)")
        filled = [self.encode(ids) for ids in batch] + [[]] * (sequences - len(batch))
        cache = self.new_cache()
        for sequence, ids in enumerate(filled):
            cache.require_room(sequence, len(ids))
        pieces: list[list[Logits]] = [[] for _ in filled]
        for start in range(0, max(map(len, filled)), PREFILL_TOKENS):
            chunk = [ids[start : start + PREFILL_TOKENS] for ids in filled]
            rows = self.step(cache, chunk, every_row=True, pad_to=pad_to)
            ends = np.cumsum([len(ids) for ids in chunk])
            for kept, part in zip(pieces, np.split(rows, ends[:-1]), strict=True):
                kept.append(part)
        return [np.concatenate(kept) for kept in pieces[: len(batch)]]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        sampler: Sampler = greedy,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        ignore_eos: bool = False,
    ) -> Iterator[Token]:
        """Generate up to `max_tokens` tokens after `prompt`, one at a time.

        Ends at a stop string (which is not part of the text), at one of `stop_ids`, at the model's end-of-sequence
        token unless `ignore_eos`, or, with a KernelForgeWarning, when the context is full. Raises UsageError for an id out
        of range, also among `stop_ids`, and when the prompt itself does not fit.
        """
        return generate(self, prompt, max_tokens, sampler, stop=stop, stop_ids=stop_ids, ignore_eos=ignore_eos)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as a standard safetensors folder, in the weight format it was loaded with."""
        self.model.save(path)
