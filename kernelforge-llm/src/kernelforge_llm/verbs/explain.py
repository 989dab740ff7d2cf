"""`--explain`: which kernel runs each op of a model, who brought it, and its share of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelforge.cli.output import aligned
from kernelforge_llm.sampling import Sampler, greedy

if TYPE_CHECKING:
    from kernelforge_llm.decoder import Decoder

Explain = Annotated[bool, typer.Option("--explain", help="Also show the kernel of each op and its share of the time.")]

SECONDS = 1.0
"""About how long each step is timed."""
REPEATS = 30
"""At most how often."""


def explained(
    decoder: Decoder,
    say: Callable[[str], None],
    *,
    prompt: int,
    depth: int,
    decode_depth: int,
    sampler: Sampler = greedy,
    measure: bool = False,
) -> dict[str, Any]:
    """Explain a prefill of `prompt` tokens after `depth`, and a decode step with `sampler` after `decode_depth`, by name. `say`
    gets what there is to read. `measure` measures the device's limits in this run, too, instead of taking what is known."""
    from kernelforge_llm.model import PREFILL_TOKENS

    found: dict[str, Any] = {}
    roofline = decoder.session.roofline(again=measure)
    if roofline is not None:
        say(f"\nthe device's limits: {roofline}")
    for name, tokens, before in (("prefill", min(prompt, PREFILL_TOKENS), depth), ("decode", 1, decode_depth)):
        explanation = decoder.explain(tokens, before, sampler=sampler, repeats=1)
        repeats = min(int(SECONDS / (explanation.seconds or SECONDS)), REPEATS)
        if repeats > 1:
            explanation = decoder.explain(tokens, before, sampler=sampler, repeats=repeats)
        explanation = explanation.beside(roofline)
        data = {"tokens": tokens, "depth": before, **explanation.as_data()}
        counted = f"{tokens} token{'s' if tokens > 1 else ''} after {before}"
        say(f"\n{name}, {counted}: {data['seconds'] * 1e3:.3g} ms in {data['steps']} steps")
        say(aligned(*explanation.table()))
        if verdict := explanation.verdict():
            say(verdict)
        found[name] = data
    return found
