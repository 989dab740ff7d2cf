"""`kernelforge llm-eval`: the perplexity of a model on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.files import decoded
from kernelforge_llm.verbs.options import Activations, KvDtype, Model, Weights, at_least, chosen_source


def llm_eval(
    text: Annotated[Path, typer.Option(help="A UTF-8 text that the model was not trained on.")],
    model: Model = None,
    weights: Weights = "native",
    activations: Activations = "auto",
    kv_dtype: KvDtype = "auto",
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(help="Most windows to score, from the beginning.")] = 120,
) -> dict[str, Any]:
    """Measure how well a model predicts a text: its perplexity, the lower the better.

    The text is cut into windows without overlap. Every token but the first of a window is predicted from those before it
    in the window; no begin-of-sequence token is put before them.
    """
    at_least(2, window=window)
    at_least(1, windows=windows)
    content = decoded(text.read_bytes, f"the text {text}")

    from kernelforge.cli.options import open_session
    from kernelforge_llm import perplexity
    from kernelforge_llm.decoder import open_decoder

    out = output.current()
    source = chosen_source(model, None)
    with open_session() as session:
        decoder = open_decoder(source, session, weights=weights, kv_dtype=kv_dtype, activations=activations)
        if decoder.tokenizer is None:
            raise AssetError(f"'{source.name}' has no tokenizer.json, so it cannot read text")
        if window > decoder.context:
            raise UsageError(f"--window {window} is more than the {decoder.context} tokens that the model can see")
        parts = perplexity.windows(decoder.tokenizer.encode(content, add_special=False), window, windows)
        total = perplexity.Score(0.0, 0)
        with out.progress("scoring", len(parts)) as progress:
            for score in perplexity.scores(decoder, parts):
                total = perplexity.Score(total.nats + score.nats, total.tokens + score.tokens)
                progress.advance()
    out.print(f"{source.name}, weights {weights}: perplexity {total.perplexity:.4f} on {total.tokens} tokens of {text}")
    return {
        "model": source.name,
        "weights": weights,
        "activations": decoder.model.activation_dtype,
        "kv_dtype": decoder.model.cache_dtype,
        "target": out.target,
        "text": text,
        "window": window,
        "windows": len(parts),
        "tokens": total.tokens,
        "nats": total.nats,
        "perplexity": total.perplexity,
    }
