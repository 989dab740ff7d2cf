"""`kernelforge llm-export`: a model as a standard safetensors folder."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from kernelforge.cli import output
from kernelforge.errors import UsageError


def llm_export(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    model: Annotated[Optional[str], typer.Option(help="Folder, or org/name on the Hub; default: built-in tinypy.")] = None,
    random: Annotated[Optional[str], typer.Option(help="Random weights at a named shape instead of a model.")] = None,
    weights: Annotated[str, typer.Option(help="Weight format: native, f32, bf16 or f16.")] = "native",
) -> dict[str, Any]:
    """Write a model as a standard safetensors folder, which any reader of such folders loads."""
    out = output.current()
    if model is not None and random is not None:
        raise UsageError("--model and --random exclude each other", hint="give one of them")

    from kernelforge_llm.model import Model
    from kernelforge_llm.source import any_source, open_source, random_source

    source = random_source(random) if random is not None else any_source(model) if model else open_source()
    Model.make(source, out.registry, weights=weights).save(folder)  # type: ignore[arg-type]  # checked there
    nbytes = sum(f.stat().st_size for f in folder.iterdir())
    out.print(f"wrote {source.name} to {folder} ({nbytes / 1e6:.1f} MB)")
    return {"folder": str(folder), "model": source.name, "weights": weights, "bytes": nbytes}
