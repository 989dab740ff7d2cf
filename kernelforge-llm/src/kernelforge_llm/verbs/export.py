"""`kernelforge llm-export`: a model as a standard safetensors folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge_llm.verbs.options import Model, Random, Weights, chosen_source


def llm_export(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    model: Model = None,
    random: Random = None,
    weights: Weights = "native",
) -> dict[str, Any]:
    """Write a model as a standard safetensors folder, which any reader of such folders loads."""
    from kernelforge_llm.model import Model as LoadedModel

    out = output.current()
    source = chosen_source(model, random)
    LoadedModel.make(source, out.registry, weights=weights).save(folder)
    nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    out.print(f"wrote {source.name} to {folder} ({nbytes / 1e6:.1f} MB)")
    return {"folder": folder, "model": source.name, "weights": weights, "bytes": nbytes}
