"""`kernelforge llm-bench`: prefill and decode speed of a model, medians over repeats."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from kernelforge.cli import output
from kernelforge.errors import UsageError
from kernelforge_llm.verbs.explain import Explain, explained
from kernelforge_llm.verbs.options import KvDtype, Model, Random, Weights, at_least, chosen_source

if TYPE_CHECKING:
    from kernelforge_llm.decoder import Decoder


def llm_bench(
    model: Model = None,
    random: Random = None,
    weights: Weights = "native",
    kv_dtype: KvDtype = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the measured prefill.")] = 256,
    gen_tokens: Annotated[int, typer.Option(help="Tokens of the measured decode.")] = 64,
    depth: Annotated[int, typer.Option(help="Tokens in the cache before either is measured.")] = 0,
    repeat: Annotated[int, typer.Option(help="Measurements of each; the median counts.")] = 5,
    explain: Explain = False,
    peer: Annotated[list[str] | None, typer.Option(help="Time another decoder in turn: transformers.")] = None,
) -> dict[str, Any]:
    """Measure a model: prefill, and decode.

    Prefill is PROMPT_TOKENS tokens at once, decode is GEN_TOKENS greedy steps of one token; both start with DEPTH
    tokens in the cache. Compiling and one warm-up run come first and are not counted. A peer runs in the environment
    that KERNELFORGE_PEER_PYTHON names, alternating with ours, on the same threads, from an empty cache.
    """
    at_least(1, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repeat=repeat)
    at_least(0, depth=depth)

    from kernelforge.cli.options import open_session
    from kernelforge_llm.decoder import open_decoder
    from kernelforge_llm.memory import PeakMemory
    from kernelforge_llm.peers import DecoderPeer

    if peer and depth:
        raise UsageError("--peer measures from an empty cache", hint="leave --depth out")
    out = output.current()
    source = chosen_source(model, random)
    with PeakMemory() as peak, open_session() as session:
        decoder = open_decoder(source, session, weights=weights, kv_dtype=kv_dtype)
        needed = depth + max(prompt_tokens, gen_tokens)
        if needed > decoder.context:
            decoder = open_decoder(source, session, weights=weights, context=needed, kv_dtype=kv_dtype)
        threads = session.device.info.threads
        peers = {name: DecoderPeer(name, source, weights, threads) for name in peer or ()}
        prompt = _prompt(prompt_tokens, decoder.config.vocab_size)
        beside: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
        runs: list[_Run] = []
        with contextlib.ExitStack() as stack, out.progress("measuring", repeat + 1) as progress:
            for other in peers.values():
                stack.callback(other.close)
            for run in _measure(decoder, prompt_tokens, gen_tokens, depth, repeat + 1):
                runs.append(run)
                for name, other in peers.items():
                    beside[name].append(other.measure(prompt, gen_tokens))
                progress.advance()
        peak_bytes = peak.nbytes
        notes: list[str] = []
        traced = {}
        if explain:
            half = depth + gen_tokens // 2
            traced = explained(
                decoder, notes.append, prompt=prompt_tokens, depth=depth, decode_depth=half, measure=True
            )
    del runs[0]  # the warm-up: compiles, touches the memory
    beside = {name: measured[1:] for name, measured in beside.items()}
    figures = {
        "prefill_tok_s": _summary([prompt_tokens / run.prefill for run in runs]),
        "decode_tok_s": _summary([gen_tokens / run.decode for run in runs]),
        "time_to_first_token_s": _summary([run.first_token for run in runs]),
    }
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    cached = f"{depth} tokens in the {decoder.model.cache_dtype} cache"
    out.print(f"{source.name}, weights {weights}, {out.target}, {counted}, {cached}")
    scales = {f"prefill {prompt_tokens}, tokens/s": 1, f"decode {gen_tokens}, tokens/s": 1, "first token, ms": 1000}
    rows = [
        (title, *(_rounded(value * scale) for value in summary.values()))
        for (title, scale), summary in zip(scales.items(), figures.values(), strict=True)
    ]
    out.table(("", "median", "min", "max"), rows)
    compared = {}
    for name, other in peers.items():
        prefill = statistics.median(prompt_tokens / m["prefill_s"] for m in beside[name])
        decode = statistics.median(gen_tokens / m["decode_s"] for m in beside[name])
        compared[name] = {
            "version": other.version,
            "prefill_tok_s": prefill,
            "decode_tok_s": decode,
            "prefill_ratio": figures["prefill_tok_s"]["median"] / prefill,
            "decode_ratio": figures["decode_tok_s"]["median"] / decode,
        }
    if compared:
        out.table(
            ("beside", "prefill tok/s", "ours / it", "decode tok/s", "ours / it"),
            [
                (
                    f"{name} {c['version']}",
                    *(c[k] for k in ("prefill_tok_s", "prefill_ratio", "decode_tok_s", "decode_ratio")),
                )
                for name, c in compared.items()
            ],
        )
    out.print(f"peak memory {peak_bytes / 1e6:.0f} MB, compiled in {decoder.compile_s:.1f} s")
    for note in notes:
        out.print(note)
    return {
        "model": source.name,
        "target": out.target,
        "threads": threads,
        "weights": weights,
        "kv_dtype": decoder.model.cache_dtype,
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "depth": depth,
        "repeat": repeat,
        **figures,
        "peers": compared,
        "compile_s": decoder.compile_s,
        "peak_anonymous_bytes": peak_bytes,
        **({"explain": traced} if explain else {}),
    }


class _Run(NamedTuple):
    """Seconds of one measurement."""

    prefill: float
    first_token: float
    """From the prompt to the choice of the first token."""
    decode: float


def _measure(decoder: Decoder, prompt_tokens: int, gen_tokens: int, depth: int, count: int) -> Iterator[_Run]:
    from kernelforge_llm.sampling import greedy

    vocab = decoder.config.vocab_size
    cache = decoder.new_cache()
    prompt = _prompt(max(prompt_tokens, depth), vocab)
    if depth:
        decoder.feed(cache, prompt[:depth])
    for _ in range(count):
        start = time.perf_counter()
        scores = decoder.feed(cache, prompt[:prompt_tokens])
        fed = time.perf_counter()
        token = greedy(scores)
        chosen = time.perf_counter()
        cache.truncate(0, depth)
        begin = time.perf_counter()
        for _ in range(gen_tokens):
            token = greedy(decoder.feed(cache, [token]))
        end = time.perf_counter()
        cache.truncate(0, depth)
        yield _Run(fed - start, chosen - start, end - begin)


def _prompt(count: int, vocab: int) -> list[int]:
    """Fixed, varied token ids."""
    return [(i * 7919 + 13) % vocab for i in range(count)]


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _rounded(value: float) -> float:
    return round(value) if value >= 100 else value
