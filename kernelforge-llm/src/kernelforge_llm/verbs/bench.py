"""`kernelforge llm-bench`: prefill and decode speed of a model, medians over repeats."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge_llm.verbs.explain import Explain, explained
from kernelforge_llm.verbs.options import Activations, KvDtype, Model, Random, Weights, at_least, chosen_source

if TYPE_CHECKING:
    from kernelforge.backend import Timing
    from kernelforge_llm.benchmark import Task
    from kernelforge_llm.decoder import Decoder
    from kernelforge_llm.peers import DecoderPeer


def llm_bench(
    model: Model = None,
    random: Random = None,
    weights: Weights = "native",
    activations: Activations = "auto",
    kv_dtype: KvDtype = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the measured prefill.")] = 256,
    gen_tokens: Annotated[int, typer.Option(help="Tokens of the measured decode.")] = 64,
    depth: Annotated[int, typer.Option(help="Tokens in the cache before either is measured.")] = 0,
    repeat: Annotated[int, typer.Option(help="Measurements of each; the median counts.")] = 5,
    explain: Explain = False,
    peer: Annotated[
        list[str] | None, typer.Option(help="Time transformers or llama.cpp in turn (may be repeated).")
    ] = None,
) -> dict[str, Any]:
    """Measure a model: prefill, and decode.

    Prefill is PROMPT_TOKENS tokens at once, decode is GEN_TOKENS greedy steps of one token; both start with DEPTH
    tokens in the cache. Compiling and one warm-up run come first and are not counted. A peer runs in the environment
    that KERNELFORGE_PEER_PYTHON names, alternating with ours, on the same weights and threads; llama.cpp gets them as a
    GGUF file, which is written for it. Its logits are compared with ours before anything is timed.
    """
    at_least(1, prompt_tokens=prompt_tokens, gen_tokens=gen_tokens, repeat=repeat)
    at_least(0, depth=depth)

    from kernelforge.cli.options import open_session
    from kernelforge_llm.benchmark import Task, benchmark
    from kernelforge_llm.decoder import open_decoder
    from kernelforge_llm.memory import PeakMemory
    from kernelforge_llm.peers import check_peers

    names = tuple(dict.fromkeys(peer or ()))
    check_peers(names, depth)
    out = output.current()
    task = Task(prompt_tokens, gen_tokens, depth, repeat)
    source = chosen_source(model, random)
    with PeakMemory() as peak, open_session() as session:
        decoder = open_decoder(source, session, weights=weights, kv_dtype=kv_dtype, activations=activations)
        if task.room > decoder.context:
            decoder = open_decoder(
                source, session, weights=weights, context=task.room, kv_dtype=kv_dtype, activations=activations
            )
        threads = session.device.info.threads
        with contextlib.ExitStack() as stack, out.progress("measuring", repeat + 1) as progress:
            peers = {name: _opened(stack, name, decoder, task, threads) for name in names}
            found = benchmark(decoder, task, peers, progress=progress.advance)
        peak_bytes = peak.nbytes
        notes: list[str] = []
        traced = {}
        half = depth + gen_tokens // 2
        alone = decoder.measure(1, half, repeats=repeat)
        if explain:
            traced = explained(
                decoder, notes.append, prompt=prompt_tokens, depth=depth, decode_depth=half, measure=True
            )
    figures = found.speeds(found.runs)
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    formats = f"weights {weights}, activations {decoder.model.activation_dtype}"
    out.print(f"{source.name}, {formats}, {out.target}, {counted}, {depth} tokens in the cache")
    scales = {f"prefill {prompt_tokens}, tokens/s": 1, f"decode {gen_tokens}, tokens/s": 1, "first token, ms": 1000}
    rows = [
        (title, *(_rounded(value * scale) for value in summary.values()))
        for (title, scale), summary in zip(scales.items(), figures.values(), strict=True)
    ]
    out.table(("", "median", "min", "max"), rows)
    compared = {
        name: {"version": other.version, "build": other.build, **found.beside(name)} for name, other in peers.items()
    }
    _print_compared(compared)
    step = _decode_step(figures["decode_tok_s"]["median"], alone)
    out.print(
        f"a decode step takes {step['wall_s'] * 1e3:.3g} ms, the device {step['device_s'] * 1e3:.3g} ms of it alone "
        f"({step['timing_source']}): ratio {step['wall_over_device']:.2f}"
    )
    out.print(f"peak memory {peak_bytes / 1e6:.0f} MB, compiled in {decoder.compile_s:.1f} s")
    for note in notes:
        out.print(note)
    return {
        "model": source.name,
        "target": out.target,
        "threads": threads,
        "weights": weights,
        "activations": decoder.model.activation_dtype,
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "depth": depth,
        "repeat": repeat,
        **figures,
        "decode_step": step,
        "peers": compared,
        "compile_s": decoder.compile_s,
        "peak_anonymous_bytes": peak_bytes,
        **({"explain": traced} if explain else {}),
    }


def _decode_step(tokens_s: float, alone: Timing) -> dict[str, Any]:
    """Seconds of a step as a user has it, and on the device alone: what is more is the host's."""
    wall, device = 1.0 / tokens_s, statistics.median(alone.samples)
    ratio = wall / device
    return {"wall_s": wall, "device_s": device, "timing_source": alone.source, "wall_over_device": ratio}


def _opened(stack: contextlib.ExitStack, name: str, decoder: Decoder, task: Task, threads: int) -> DecoderPeer:
    """A peer with our weights and the task's tokens in its cache, until the stack ends."""
    from kernelforge_llm.benchmark import prompt_ids
    from kernelforge_llm.peers import DecoderPeer, readable

    model = decoder.model
    note = output.current().note
    path = stack.enter_context(readable(name, model.source, decoder.config, model.weights, note))
    before = prompt_ids(task.depth, decoder.config.vocab_size)
    room = max(task.prompt_tokens, task.gen_tokens)
    opened = DecoderPeer(name, path, model.weights, threads, room=room, before=before)
    stack.callback(opened.close)
    return opened


def _print_compared(compared: dict[str, dict[str, Any]]) -> None:
    if compared:
        keys = ("prefill_tok_s", "prefill_ratio", "decode_tok_s", "decode_ratio")
        output.current().table(
            ("beside", "prefill tok/s", "ours / it", "decode tok/s", "ours / it", "logits differ by"),
            [
                (f"{name} {c['version']}", *(c[k] for k in keys), f"{c['logits_difference']:.1%}")
                for name, c in compared.items()
            ],
        )


def _rounded(value: float) -> float:
    return round(value) if value >= 100 else value
