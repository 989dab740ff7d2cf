"""A loaded model: logits and text from tokens, through compiled steps and a KV cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from kernelforge.errors import AssetError, UsageError
from kernelforge.session import Session

from kernelforge_llm.cache import KVCache
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.model import PREFILL_TOKENS, Model, WeightFormat
from kernelforge_llm.sampling import Sampler, greedy
from kernelforge_llm.source import Source, open_source
from kernelforge_llm.stream import StopStrings, TextStream

if TYPE_CHECKING:
    import numpy as np
    from kernelforge.backend import Executable
    from kernelforge.importer import Program

    Ids = np.ndarray[Any, np.dtype[np.int32]]
    Logits = np.ndarray[Any, np.dtype[np.float32]]

class Token(NamedTuple):
    """One generated token."""

    id: int | None
    """None for the text that was held back when generation ended."""
    text: str
    """The text that became complete with it; may be empty, may end before a character that is not complete yet."""


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    weights: WeightFormat = "native",
    threads: int | None = None,
    context: int | None = None,
    sequences: int = 1,
    session: Session | None = None,
) -> Decoder:
    """Load a model for generation.

    `path` is a Hugging Face folder, `org/name` on the Hub, or None for the built-in `tinypy`. `weights` converts matrices
    while compiling ("native" keeps the checkpoint's dtype). `context` is the cache's capacity in positions, by default the
    model's own up to 4096; `sequences` how many it can hold side by side. Raises AssetError for a missing or broken
    checkpoint, DeviceError when the target is not usable.
    """
    return open_decoder(
        open_source(path), session or Session(target, threads=threads), weights=weights, context=context, sequences=sequences
    )


def open_decoder(
    source: Source,
    session: Session,
    *,
    weights: WeightFormat = "native",
    context: int | None = None,
    sequences: int = 1,
) -> Decoder:
    """A decoder for any source (random weights, say) on an open session. Raises as `load` does."""
    model = Model.make(source, session.registry, weights=weights, context=context, sequences=sequences)
    return Decoder(model, session)


class Decoder:
    """A model on a device. Not for concurrent use by several threads."""

    def __init__(self, model: Model, session: Session) -> None:
        self.model, self.session = model, session
        self.config: ModelConfig = model.config
        self.context: int = model.context
        self.tokenizer = model.source.tokenizer

    @cached_property
    def prefill(self) -> Executable:
        """The step for any number of tokens and rows."""
        return self._compile(self.model.programs[1])

    @cached_property
    def decode(self) -> Executable:
        """The step for one token of one sequence."""
        return self._compile(self.model.programs[0])

    def _compile(self, program: Program) -> Executable:
        tensors = self.model.source.tensors
        return self.session.compile(program.module, constants=tensors, dims=program.dims, max_dims=program.max_dims)

    def new_cache(self) -> KVCache:
        return KVCache(self.session.device, self.config, sequences=self.model.sequences, context=self.context)

    def step(
        self,
        cache: KVCache,
        batch: Sequence[Sequence[int]],
        *,
        every_row: bool = False,
        pad_to: int | None = None,
    ) -> Logits:
        """Append `batch[i]` to sequence i of the cache; the logits [rows, vocab] of the last token of each sequence that
        got any, or of every token.

        `pad_to` lays every sequence out in that many tokens, the rest being padding (a fixed shape for any batch). Raises
        UsageError for a token id out of range or a sequence that would not fit the context.
        """
        import numpy as np

        if len(batch) != len(cache.lengths):
            raise UsageError(f"got {len(batch)} sequences for a cache of {len(cache.lengths)}")
        starts = list(cache.lengths)
        for ids in batch:
            self._check_ids(ids)
        cache.extend([len(ids) for ids in batch])
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for slot, (ids, start) in enumerate(zip(batch, starts, strict=True)):
            padding = max(0, (pad_to or 0) - len(ids))
            first = len(tokens)
            tokens.extend([*ids, *[0] * padding])
            positions.extend([*range(start, start + len(ids)), *[-1] * padding])
            slots.extend([slot] * (len(ids) + padding))
            if ids:
                rows.extend(range(first, first + len(ids)) if every_row else [first + len(ids) - 1])
        arrays = [np.array(values, np.int32) for values in (tokens, positions, slots, rows)]
        return self._run(cache, *arrays)

    def _run(self, cache: KVCache, tokens: Ids, positions: Ids, slots: Ids, rows: Ids) -> Logits:
        single = tokens.size == 1 and rows.size == 1
        executable = self.decode if single else self.prefill
        inputs = {"tokens": tokens, "positions": positions, "slots": slots, "rows": rows, **cache.buffers}
        outputs = executable.run(inputs)
        for value, output in zip(executable.plan.outputs, outputs, strict=True):
            if executable.plan.values[value].name == "logits":
                return output  # type: ignore[return-value]
        raise AssertionError("the step has no output 'logits'")

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(f"token id {token} is out of range", hint=f"the vocabulary has {self.config.vocab_size}")

    # --- the public face ---

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids pass through, checked. Raises AssetError for text without a tokenizer, UsageError for
        an empty prompt or an id out of range."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise AssetError(
                    f"'{self.model.source.name}' has no tokenizer.json, so it cannot read text", hint="pass token ids (--prompt-ids)"
                )
            ids = self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        self._check_ids(ids)
        return ids

    def logits(self, ids: Sequence[int]) -> Logits:
        """float32 [len(ids), vocab]: the scores after each token of a sequence that starts with the first one."""
        return self.logits_batch([ids])[0]

    def logits_batch(self, batch: Sequence[Sequence[int]], *, pad_to: int | None = None) -> list[Logits]:
        """The logits of several sequences in one pass, each [len(ids), vocab]. At most `sequences` of them."""
        import numpy as np

        if len(batch) > self.model.sequences:
            raise UsageError(f"{len(batch)} sequences, the model was loaded for {self.model.sequences}", hint="load(sequences=N)")
        filled = [list(ids) for ids in batch] + [[]] * (self.model.sequences - len(batch))
        cache = self.new_cache()
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

        Ends at a stop string (which is not part of the text), at one of `stop_ids`, at the model's end-of-sequence token
        unless `ignore_eos`, or when the context is full. Raises UsageError when the prompt itself does not fit.
        """
        ids = self.encode(prompt)
        if len(ids) > self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context}",
                hint="shorten the prompt, or load with a larger context (--context) if the model allows it",
            )
        ends = {*stop_ids, *(() if ignore_eos else self.config.eos_token_ids)}
        return self._generate(ids, max_tokens, sampler, StopStrings(stop), ends)

    def _generate(
        self, ids: list[int], max_tokens: int, sampler: Sampler, stop: StopStrings, ends: set[int]
    ) -> Iterator[Token]:
        cache = self.new_cache()
        history = list(ids)
        stream = TextStream(self.tokenizer, ids)
        for start in range(0, len(ids), PREFILL_TOKENS):
            scores = self.step(cache, [ids[start : start + PREFILL_TOKENS], *[[]] * (self.model.sequences - 1)])
        for count in range(max_tokens):
            token = sampler(scores[0], history)
            if token in ends:
                break
            history.append(token)
            text = stop.push(stream.push(token))
            yield Token(token, text)
            if stop.hit or cache.lengths[0] >= self.context:
                break
            if count + 1 < max_tokens:
                scores = self.step(cache, [[token], *[[]] * (self.model.sequences - 1)])
        rest = stop.push(stream.flush()) + stop.flush()
        if rest:
            yield Token(None, rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as a standard safetensors folder, in the weight format it was loaded with."""
        self.model.save(path)
