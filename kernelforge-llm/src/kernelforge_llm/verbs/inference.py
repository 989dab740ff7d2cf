"""`kernelforge llm-inference`: text from a prompt, streamed, then a line of figures."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from kernelforge.cli import output
from kernelforge.errors import AssetError, UsageError

DEFAULT_PROMPT = 'import numpy as np\n\ndef softmax(x):\n    """Return'


def llm_inference(
    prompt: Annotated[Optional[str], typer.Option(help="Text to continue; '-' reads standard input.")] = None,
    prompt_file: Annotated[Optional[Path], typer.Option(help="Read the prompt from this file.")] = None,
    prompt_ids: Annotated[Optional[str], typer.Option(help="Token ids instead of text, separated by commas.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    model: Annotated[Optional[str], typer.Option(help="Folder, or org/name on the Hub; default: built-in tinypy.")] = None,
    random: Annotated[Optional[str], typer.Option(help="Random weights at a named shape instead of a model.")] = None,
    weights: Annotated[str, typer.Option(help="Weight format: native, f32, bf16 or f16.")] = "native",
    context: Annotated[Optional[int], typer.Option(help="Positions the KV cache holds.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens up to this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="Of the sampling: equal seeds give equal text.")] = None,
    stop: Annotated[Optional[list[str]], typer.Option(help="Stop before this text (may be repeated).")] = None,
    stop_id: Annotated[Optional[list[int]], typer.Option(help="Stop at this token id (may be repeated).")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    compare_with_cerebras: Annotated[
        bool, typer.Option("--compare-with-cerebras", help="Also ask Cerebras (needs CEREBRAS_API_KEY) and compare.")
    ] = False,
    api_base: Annotated[Optional[str], typer.Option(help="OpenAI-compatible endpoint to compare with.")] = None,
    api_model: Annotated[Optional[str], typer.Option(help="Model to ask for there.")] = None,
) -> dict[str, Any]:
    """Generate text with a model.

    The text goes to standard output as it is made, the figures to standard error. Without a prompt, a demonstration.
    """
    started = time.perf_counter()
    out = output.current()
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}", hint="at least 1")
    if model is not None and random is not None:
        raise UsageError("--model and --random exclude each other", hint="give one of them")
    text = _prompt(prompt, prompt_file, prompt_ids)
    api_key = _api_key(compare_with_cerebras)

    from kernelforge.session import Session

    from kernelforge_llm.decoder import open_decoder
    from kernelforge_llm.memory import PeakMemory
    from kernelforge_llm.sampling import Sampling, make_sampler
    from kernelforge_llm.source import any_source, open_source, random_source

    sampler = make_sampler(Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed))
    source = random_source(random) if random is not None else any_source(model) if model else open_source()
    with PeakMemory() as peak, Session(out.target, threads=out.threads) as session:
        decoder = open_decoder(source, session, weights=weights, context=context)  # type: ignore[arg-type]  # checked there
        if chat:
            text = _chat(decoder.tokenizer, text)
        ids = decoder.encode(text)
        run = _Run(out, len(ids), time.perf_counter())
        data = out.data
        data.update(model=source.name, target=out.target, threads=session.device.info.threads, prompt_tokens=len(ids))
        data.update(text="", ids=[])
        tokens = decoder.generate(
            ids, max_tokens, sampler, stop=stop or (), stop_ids=stop_id or (), ignore_eos=ignore_eos
        )
        for token in tokens:
            run.add(token.id)
            out.stream(token.text)
            data["text"] += token.text
            if token.id is not None:
                data["ids"].append(token.id)
        out.print()
    data.update(run.figures(), load_s=run.started - started, peak_anonymous_bytes=peak.nbytes)
    out.note(_line(data))
    if decoder.tokenizer is None and not out.json:
        out.print(",".join(map(str, data["ids"])))
    if compare_with_cerebras:
        data["cerebras"] = _compare(out, str(text), max_tokens, api_key, api_base, api_model, data)
    return data


class _Run:
    """Times of the tokens."""

    def __init__(self, out: output.Output, prompt_tokens: int, started: float) -> None:
        self.out, self.prompt_tokens, self.started = out, prompt_tokens, started
        self.times: list[float] = []

    def add(self, token: int | None) -> None:
        if token is not None:
            self.times.append(time.perf_counter())

    def figures(self) -> dict[str, Any]:
        """The first token's time includes compiling, if anything had to be compiled."""
        if not self.times:
            return {"generated_tokens": 0, "time_to_first_token_s": None, "prefill_tok_s": None, "decode_tok_s": None}
        first = self.times[0] - self.started
        rest = self.times[-1] - self.times[0]
        return {
            "generated_tokens": len(self.times),
            "time_to_first_token_s": first,
            "prefill_tok_s": self.prompt_tokens / first,
            "decode_tok_s": (len(self.times) - 1) / rest if rest > 0 else None,
        }


def _line(data: dict[str, Any]) -> str:
    first, speed = data["time_to_first_token_s"], data["decode_tok_s"]
    parts = [
        f"{data['prompt_tokens']} prompt tokens",
        f"first token after {first * 1e3:.0f} ms" if first else "no token",
        f"prefill {data['prefill_tok_s']:.0f} tok/s" if first else "",
        f"{data['generated_tokens']} tokens at {speed:.0f} tok/s" if speed else f"{data['generated_tokens']} tokens",
        f"peak memory {data['peak_anonymous_bytes'] / 1e6:.0f} MB",
        f"{data['target']}, {data['threads']} threads",
    ]
    return "[" + " | ".join(p for p in parts if p) + "]"


def _prompt(prompt: str | None, file: Path | None, ids: str | None) -> str | Sequence[int]:
    given = [name for name, value in (("--prompt", prompt), ("--prompt-file", file), ("--prompt-ids", ids)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
    if ids is not None:
        try:
            return [int(part) for part in ids.split(",")]
        except ValueError:
            raise UsageError(f"--prompt-ids '{ids}' is not a list of numbers", hint="such as 1,15,290") from None
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AssetError(f"cannot read the prompt from {file}: {error}") from None
    return sys.stdin.read() if prompt == "-" else DEFAULT_PROMPT if prompt is None else prompt


def _chat(tokenizer: Any, text: str | Sequence[int]) -> str:
    if tokenizer is None or not isinstance(text, str):
        raise UsageError("--chat needs a text prompt and a model with a tokenizer")
    rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return rendered


def _api_key(wanted: bool) -> str | None:
    """Asked for before anything is generated: a missing key must not cost a generation."""
    if not wanted:
        return None
    from kernelforge_llm.cerebras import require_key

    return require_key(os.environ)


def _compare(
    out: output.Output,
    prompt: str,
    max_tokens: int,
    key: str | None,
    base: str | None,
    model: str | None,
    ours: dict[str, Any],
) -> dict[str, Any]:
    from kernelforge_llm import cerebras

    answer = cerebras.complete(
        prompt,
        api_key=key or "",
        api_base=base or cerebras.DEFAULT_API_BASE,
        model=model or cerebras.DEFAULT_MODEL,
        max_tokens=max_tokens,
    )
    out.print(f"--- {answer.model}\n{answer.text}\n---")
    rows = [
        ("kernelforge", ours["model"], ours["generated_tokens"], ours["decode_tok_s"]),
        ("cerebras", answer.model, answer.completion_tokens, answer.tokens_per_second),
    ]
    out.table(("where", "model", "tokens", "tokens/s"), rows)
    return {
        "model": answer.model,
        "text": answer.text,
        "generated_tokens": answer.completion_tokens,
        "seconds": answer.seconds,
        "decode_tok_s": answer.tokens_per_second,
    }
