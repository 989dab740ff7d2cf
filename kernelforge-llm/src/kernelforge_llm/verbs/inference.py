"""`kernelforge llm-inference`: text from a prompt, streamed, then a line of figures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.errors import UsageError
from kernelforge_llm.files import decoded
from kernelforge_llm.verbs.explain import Explain, explained
from kernelforge_llm.verbs.options import Activations, KvDtype, Model, Random, Weights, at_least, chosen_source

if TYPE_CHECKING:
    from kernelforge_llm.cerebras import RemoteAnswer
    from kernelforge_llm.decoder import Decoder
    from kernelforge_llm.stream import Token

DEFAULT_PROMPT = 'import numpy as np\n\ndef softmax(x):\n    """Return'

MOST_SECONDS = 86_400
"""To wait for another server."""


def llm_inference(
    prompt: Annotated[str | None, typer.Option(help="Text to continue; '-' reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 1,15,290.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    model: Model = None,
    random: Random = None,
    weights: Weights = "native",
    activations: Activations = "auto",
    kv_dtype: KvDtype = "auto",
    context: Annotated[int | None, typer.Option(help="Positions that the KV cache holds.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling: equal seeds give equal text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text (may be repeated).")
    ] = None,
    stop_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="Stop at this token id (may be repeated).")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    explain: Explain = False,
    compare_with_cerebras: Annotated[
        bool, typer.Option("--compare-with-cerebras", help="Also ask Cerebras; needs CEREBRAS_API_KEY.")
    ] = False,
    api_base: Annotated[str | None, typer.Option(help="Another OpenAI-compatible endpoint to compare with.")] = None,
    api_model: Annotated[str | None, typer.Option(help="Model to ask for there.")] = None,
    api_timeout: Annotated[float, typer.Option(help="Seconds to wait for its answer.")] = 60.0,
) -> dict[str, Any]:
    """Generate text with a model.

    The text goes to standard output as it is made, the figures to standard error. Without a prompt: a demonstration.
    """
    started = time.perf_counter()
    at_least(1, max_tokens=max_tokens)
    if (api_base or api_model) and not compare_with_cerebras:
        raise UsageError("--api-base and --api-model need --compare-with-cerebras")
    if not 0 < api_timeout <= MOST_SECONDS:
        raise UsageError(f"--api-timeout {api_timeout:g} is not possible", hint=f"above 0, at most {MOST_SECONDS}")
    given = _prompt(prompt, prompt_file, prompt_ids)
    api_key = _api_key(given, api_base) if compare_with_cerebras else None

    from kernelforge.cli.options import open_session
    from kernelforge_llm.decoder import open_decoder
    from kernelforge_llm.memory import PeakMemory
    from kernelforge_llm.sampling import Sampling, make_sampler

    out = output.current()
    sampler = make_sampler(Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed))
    source = chosen_source(model, random)
    with PeakMemory() as peak, open_session() as session:
        decoder = open_decoder(
            source, session, weights=weights, context=context, kv_dtype=kv_dtype, activations=activations
        )
        ids = _chat(decoder, given) if chat else decoder.encode(given)
        tokens = decoder.generate(
            ids, max_tokens, sampler, stop=stop or (), stop_ids=stop_id or (), ignore_eos=ignore_eos
        )
        run = _Run(decoder, out, len(ids))
        out.data = run.data
        run.data |= {"model": source.name, "target": out.target, "threads": session.device.info.threads}
        try:
            for token in tokens:
                run.add(token)
        finally:  # also when interrupted: what was generated is kept
            out.print()
            run.finish(started, peak.nbytes)
        out.note(_line(run.data))
        if explain:
            half = min(len(ids) + len(run.data["ids"]) // 2, decoder.context - 1)
            run.data["explain"] = explained(
                decoder, out.note, prompt=len(ids), depth=0, decode_depth=half, sampler=sampler
            )
    if api_key is not None:
        from kernelforge_llm import cerebras

        answer = cerebras.complete(
            str(given),
            api_key=api_key,
            api_base=api_base or cerebras.DEFAULT_API_BASE,
            model=api_model or cerebras.DEFAULT_MODEL,
            max_tokens=max_tokens,
            timeout=api_timeout,
        )
        run.data["cerebras"] = _compare(out, run.data, answer)
    return run.data


class _Run:
    """The tokens so far, and when they came. Time spent compiling belongs to none of them."""

    def __init__(self, decoder: Decoder, out: output.Output, prompt_tokens: int) -> None:
        self._decoder, self._out = decoder, out
        self._start = self._clock()
        self._times: list[float] = []
        self.data: dict[str, Any] = {"prompt_tokens": prompt_tokens, "text": "", "ids": []}

    def _clock(self) -> float:
        return time.perf_counter() - self._decoder.compile_s

    def add(self, token: Token) -> None:
        text = token.text
        if token.id is not None:
            self._times.append(self._clock())
            if self._decoder.tokenizer is None:
                text = f",{token.id}" if self.data["ids"] else f"{token.id}"
            self.data["ids"].append(token.id)
        self.data["text"] += token.text
        self._out.stream(text)

    def finish(self, started: float, peak_bytes: int) -> None:
        """Add the figures to the data; `started` is when the command began."""
        times = self._times
        first = times[0] - self._start if times else None
        self.data |= {
            "generated_tokens": len(times),
            "load_s": self._start + self._decoder.compile_s - started,
            "time_to_first_token_s": first,
            "prefill_tok_s": self.data["prompt_tokens"] / first if first else None,
            "decode_tok_s": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
            "peak_anonymous_bytes": peak_bytes,
        }


def _line(data: dict[str, Any]) -> str:
    first, speed, threads = data["time_to_first_token_s"], data["decode_tok_s"], data["threads"]
    parts = [f"ready in {data['load_s']:.2f} s"]
    if first is None:
        parts.append(f"{data['prompt_tokens']} prompt tokens, nothing generated")
    else:
        parts.append(f"{data['prompt_tokens']} prompt tokens at {data['prefill_tok_s']:.0f}/s")
        parts.append(f"first token after {first * 1e3:.0f} ms")
        parts.append(f"{data['generated_tokens']} tokens" + (f" at {speed:.0f}/s" if speed else ""))
    parts.append(f"peak memory {data['peak_anonymous_bytes'] / 1e6:.0f} MB")
    parts.append(f"{data['target']}, {threads} thread{'s' if threads > 1 else ''}")
    return f"[{' | '.join(parts)}]"


def _prompt(prompt: str | None, file: Path | None, ids: str | None) -> str | Sequence[int]:
    options = {"--prompt": prompt, "--prompt-file": file, "--prompt-ids": ids}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
    if ids is not None:
        try:
            return [int(part) for part in ids.split(",")]
        except ValueError:
            raise UsageError(f"--prompt-ids '{ids}' is not a list of numbers", hint="such as 1,15,290") from None
    if file is None and prompt != "-":
        return DEFAULT_PROMPT if prompt is None else prompt
    return decoded(file.read_bytes if file else sys.stdin.buffer.read, f"the prompt from {file or 'standard input'}")


def _chat(decoder: Decoder, prompt: str | Sequence[int]) -> list[int]:
    if decoder.tokenizer is None or not isinstance(prompt, str):
        raise UsageError("--chat needs a text prompt and a model with a tokenizer")
    rendered = decoder.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return decoder.tokenizer.encode(rendered, add_special=False)


def _api_key(prompt: str | Sequence[int], api_base: str | None) -> str:
    """Asked for before anything is generated: a missing key or a bad address must not cost a generation."""
    from kernelforge_llm.cerebras import require_address, require_key

    if not isinstance(prompt, str):
        raise UsageError("--compare-with-cerebras needs a text prompt: others do not know this model's token ids")
    if api_base is not None:
        require_address(api_base)
    return require_key(os.environ)


def _compare(out: output.Output, ours: dict[str, Any], answer: RemoteAnswer) -> dict[str, Any]:
    out.print(f"\n--- {answer.model} ---\n{answer.text}\n")
    rows = [
        ("here", ours["model"], ours["generated_tokens"], ours["decode_tok_s"]),
        ("there", answer.model, answer.completion_tokens, answer.tokens_per_second),
    ]
    out.table(("", "model", "tokens", "tokens/s"), rows)
    return {
        "model": answer.model,
        "text": answer.text,
        "generated_tokens": answer.completion_tokens,
        "seconds": answer.seconds,
        "decode_tok_s": answer.tokens_per_second,
    }
