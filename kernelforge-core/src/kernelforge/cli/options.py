"""Options that several verbs have, and what they all begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelforge import home
from kernelforge.cli import output
from kernelforge.errors import AssetError
from kernelforge.session import Session

M = Annotated[int | None, typer.Option(help="Rows of the left operand.")]
N = Annotated[int | None, typer.Option(help="Columns of the right operand.")]
K = Annotated[int | None, typer.Option(help="Columns of the left operand: the length of the sums.")]
Dtype = Annotated[str, typer.Option(help="Type of the right operand (the weights): f32, bf16 or f16.")]
Constant = Annotated[bool, typer.Option(help="The right operand is a weight, known when compiling, or an activation.")]
Dtypes = Annotated[
    str,
    typer.Option(help="Type of the weights, or of all float operands where there are none; or one a shape: f32,bf16."),
]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Shapes of the op's operands, in order: 64x576,576x1536. ? is a dynamic size, always the same; _ an absent operand."
    ),
]
Attribute = Annotated[
    list[str] | None, typer.Option("--attr", metavar="NAME=VALUE", help="Attribute of the op (may be repeated).")
]
ProblemKey = Annotated[str | None, typer.Option("--problem", help="A problem, as `records list` and `why` write it.")]
Model = Annotated[str | None, typer.Option(help="A model: every problem in it, or those of the op.")]
Weights = Annotated[str, typer.Option(help="Of a model: native, or the dtype to convert its weights to.")]
Activations = Annotated[
    str,
    typer.Option(help="Of a model: what activations are in beside quantised weights; auto: as the device does best."),
]
Variant = Annotated[str | None, typer.Option(help="Use this kernel variant.")]


def open_session(pipeline: str | None = None) -> Session:
    """A session of what the global options say, with the default pipeline of passes or another one; to be closed."""
    out = output.current()
    return Session(out.target, device=out.device, threads=out.threads, registry=out.registry, pipeline=pipeline)


def write_file(path: Path, text: str) -> None:
    """Write what the user asked for, whole or not at all. Raises AssetError."""
    try:
        home.write_atomic(path, text)
    except OSError as error:
        raise AssetError(f"cannot write {path}: {error.strerror or error}") from None
