"""`kernelforge llm-bench`: prefill and decode speed of a model, medians over repeats."""

import statistics
import time
from collections.abc import Sequence
from typing import Annotated, Any, Optional

import typer
from kernelforge.cli import output
from kernelforge.errors import UsageError


def llm_bench(
    model: Annotated[Optional[str], typer.Option(help="Folder, or org/name on the Hub; default: built-in tinypy.")] = None,
    random: Annotated[Optional[str], typer.Option(help="Random weights at a named shape instead of a model.")] = None,
    weights: Annotated[str, typer.Option(help="Weight format: native, f32, bf16 or f16.")] = "native",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the measured prefill.")] = 256,
    gen_tokens: Annotated[int, typer.Option(help="Tokens of the measured decode.")] = 64,
    depth: Annotated[int, typer.Option(help="Tokens in the cache before either is measured.")] = 0,
    repeat: Annotated[int, typer.Option(help="Measurements of each; the median counts.")] = 5,
) -> dict[str, Any]:
    """Measure a model.

    Prefill: PROMPT_TOKENS tokens in one go. Decode: GEN_TOKENS greedy steps of one token. Both start at DEPTH tokens of
    context. Compiling and a warm-up run come first and are not counted.
    """
    out = output.current()
    for name, value, least in (("prompt-tokens", prompt_tokens, 1), ("gen-tokens", gen_tokens, 1), ("depth", depth, 0), ("repeat", repeat, 1)):
        if value < least:
            raise UsageError(f"--{name} {value}", hint=f"at least {least}")
    if model is not None and random is not None:
        raise UsageError("--model and --random exclude each other", hint="give one of them")

    from kernelforge.session import Session

    from kernelforge_llm.decoder import open_decoder
    from kernelforge_llm.memory import PeakMemory
    from kernelforge_llm.source import any_source, open_source, random_source

    source = random_source(random) if random is not None else any_source(model) if model else open_source()
    with PeakMemory() as peak, Session(out.target, threads=out.threads) as session:
        began = time.perf_counter()
        decoder = open_decoder(source, session, weights=weights)  # type: ignore[arg-type]  # checked there
        needed = depth + max(prompt_tokens, gen_tokens + 1)
        if needed > decoder.context:
            decoder = open_decoder(source, session, weights=weights, context=needed)  # type: ignore[arg-type]
        vocab = decoder.config.vocab_size
        cache = decoder.new_cache()
        _feed(decoder, cache, _tokens(depth, vocab))
        prefills: list[float] = []
        firsts: list[float] = []
        decodes: list[float] = []
        prompt = _tokens(prompt_tokens, vocab)
        with out.progress("measuring", repeat + 1) as progress:
            for round_ in range(repeat + 1):
                cache.truncate(0, depth)
                start = time.perf_counter()
                scores = _feed(decoder, cache, prompt)
                end = time.perf_counter()
                token = int(scores[-1].argmax())
                first = time.perf_counter() - start
                cache.truncate(0, depth)
                begin = time.perf_counter()
                for _ in range(gen_tokens):
                    token = int(decoder.step(cache, [[token]])[0].argmax())
                decoded = time.perf_counter() - begin
                progress.advance()
                if round_ == 0:  # the warm-up: compiles, touches the memory
                    ready = time.perf_counter() - began
                    continue
                prefills.append(prompt_tokens / (end - start))
                firsts.append(first)
                decodes.append(gen_tokens / decoded)
    data = {
        "model": source.name,
        "target": out.target,
        "threads": session.device.info.threads,
        "weights": weights,
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "depth": depth,
        "repeat": repeat,
        "prefill_tok_s": _summary(prefills),
        "decode_tok_s": _summary(decodes),
        "time_to_first_token_s": _summary(firsts),
        "ready_s": ready,
        "peak_anonymous_bytes": peak.nbytes,
    }
    out.print(f"{source.name}, weights {weights}, {out.target}, {data['threads']} threads, depth {depth}")
    rows = [
        (f"prefill {prompt_tokens}", "tok/s", *data["prefill_tok_s"].values()),
        (f"decode {gen_tokens}", "tok/s", *data["decode_tok_s"].values()),
        ("first token", "s", *data["time_to_first_token_s"].values()),
    ]
    out.table(("what", "unit", "median", "min", "max"), rows)
    out.print(f"peak anonymous memory {peak.nbytes / 1e6:.0f} MB")
    return data


def _tokens(count: int, vocab: int) -> list[int]:
    """Fixed, varied token ids."""
    return [(i * 7919 + 13) % vocab for i in range(count)]


def _feed(decoder: Any, cache: Any, ids: Sequence[int]) -> Any:
    from kernelforge_llm.model import PREFILL_TOKENS

    scores = None
    for start in range(0, len(ids), PREFILL_TOKENS):
        scores = decoder.step(cache, [ids[start : start + PREFILL_TOKENS]])
    return scores


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
