"""Options that the verbs share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kernelforge.errors import UsageError
from kernelforge_llm.cache import CacheFormat
from kernelforge_llm.weights import ActivationFormat, WeightFormat

if TYPE_CHECKING:
    from kernelforge_llm.source import Source

Model = Annotated[
    str | None, typer.Option(help="Folder, GGUF file, or org/name on the Hub; default: the built-in tinypy.")
]
Random = Annotated[str | None, typer.Option(metavar="SHAPE", help="Random weights at a named shape, not a model.")]
Weights = Annotated[
    WeightFormat, typer.Option(help="Convert matrices, to 8 or 4 bits with q8 or q4; native leaves them.")
]

Activations = Annotated[
    ActivationFormat,
    typer.Option(help="What activations are in beside q8 and q4 weights; auto: q8 where the target is fastest so."),
]

KvDtype = Annotated[
    CacheFormat, typer.Option(help="What the cache keeps; auto: f16 beside f16, q8 and q4 weights, else f32.")
]


def at_least(least: int, **values: int) -> None:
    """Raises UsageError for a value below `least`, naming its option."""
    for name, value in values.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not possible", hint=f"at least {least}")


def chosen_source(model: str | None, random: str | None) -> Source:
    """What `--model` or `--random` names. Raises UsageError when both are given, and as `open_source`."""
    from kernelforge_llm.source import any_source, open_source, random_source

    if model is not None and random is not None:
        raise UsageError("--model and --random exclude each other", hint="give one of them")
    if random is not None:
        return random_source(random)
    return open_source() if model is None else any_source(model)
