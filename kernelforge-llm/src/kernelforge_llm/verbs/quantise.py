"""`kernelforge llm-quantize`: a model's weights in 8 or 4 bits, as a folder that loads at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kernelforge.cli import output
from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.verbs.options import Model, Random, at_least, chosen_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.session import Session
    from kernelforge_llm.quantise import Quantised
    from kernelforge_llm.source import Source

WORST = 5
"""Matrices that the report names."""


def llm_quantize(
    folder: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    model: Model = None,
    random: Random = None,
    weights: Annotated[Literal["q8", "q4"], typer.Option(help="8 or 4 bits an element.")] = "q4",
    embeddings: Annotated[
        Literal["same", "q8", "q4", "none"], typer.Option(help="Format of the table of embeddings; none leaves it.")
    ] = "same",
    head: Annotated[
        Literal["same", "q8", "q4", "none"], typer.Option(help="Format of an output head of its own; none leaves it.")
    ] = "same",
    skip: Annotated[str, typer.Option(metavar="REGEX", help="Leave matrices in whose name this is found.")] = "",
    search: Annotated[
        bool,
        typer.Option("--search", help="Choose the scales of q4 by least squares: slower to write, nearer numbers."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="Also measure the perplexity on this text, before and after.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window of the text.")] = 512,
    windows: Annotated[int, typer.Option(help="Most windows to score, from the beginning.")] = 40,
) -> dict[str, Any]:
    """Write a model with quantised weights, packed for this device, so that it loads by mapping files.

    The report names the matrices that changed most, by the root mean square of the differences over that of the numbers. With
    --text it goes by what counts, the products of these matrices with the text's activations.
    """
    at_least(2, window=window)
    at_least(1, windows=windows)
    content = None if text is None else _read(text)

    from kernelforge.cli.options import open_session
    from kernelforge_llm import perplexity
    from kernelforge_llm.quantise import Recipe, with_product_errors, write_quantised
    from kernelforge_llm.source import open_source

    out = output.current()
    recipe = Recipe(weights, embeddings, head, skip, search)
    source = chosen_source(model, random)
    ids: Sequence[int] | None = None
    if content is not None:
        if source.tokenizer is None:
            raise UsageError(f"--text needs a tokenizer, and '{source.name}' has none")
        ids = perplexity.windows(source.tokenizer.encode(content, add_special=False), window, 1)[0]
    with open_session() as session:
        written = write_quantised(source, folder, recipe, session)
        out.print(
            f"wrote {source.name} to {folder}: {written.nbytes / 1e6:.1f} MB of weights, and {written.packed_bytes / 1e6:.1f} "
            f"MB of them packed for {session.device.info.name}"
        )
        tensors = written.tensors
        if ids is not None:
            tensors = with_product_errors(tensors, source, open_source(folder), session, ids)
        _show_worst(out, tensors)
        data: dict[str, Any] = {
            "bytes": written.nbytes,
            "packed_bytes": written.packed_bytes,
            "tensors": [t._asdict() for t in tensors],
        }
        if content is not None:
            before = _perplexity(source, session, content, window, windows)
            after = _perplexity(open_source(folder), session, content, window, windows)
            data["perplexity"] = {"before": before, "after": after, "text": text}
            out.print(f"perplexity on {text}: {before:.4f} before, {after:.4f} after ({after / before - 1:+.2%})")
    return {"model": source.name, "folder": folder, "weights": weights, "target": out.target, **data}


def _show_worst(out: output.Output, tensors: Sequence[Quantised]) -> None:
    """By the error of the products, where there is one."""
    changed = [t for t in tensors if t.error is not None]
    if any(t.product_error is not None for t in changed):
        worst = sorted(changed, key=lambda t: -(t.product_error or 0.0))[:WORST]
        rows = [(t.name, t.dtype, _percent(t.product_error), _percent(t.error)) for t in worst]
        out.table(("products changed most", "format", "of products", "of weights"), rows)
    elif changed:
        worst = sorted(changed, key=lambda t: -(t.error or 0.0))[:WORST]
        out.table(("changed most", "format", "error"), [(t.name, t.dtype, _percent(t.error)) for t in worst])


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def _read(text: Path) -> str:
    try:
        return text.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise AssetError(f"cannot read the text {text}: {error}") from None


def _perplexity(source: Source, session: Session, content: str, window: int, windows: int) -> float:
    from kernelforge_llm import perplexity
    from kernelforge_llm.decoder import open_decoder

    decoder = open_decoder(source, session)
    assert decoder.tokenizer is not None
    parts = perplexity.windows(
        decoder.tokenizer.encode(content, add_special=False), min(window, decoder.context), windows
    )
    found = list(perplexity.scores(decoder, parts))
    return perplexity.Score(sum(s.nats for s in found), sum(s.tokens for s in found)).perplexity
