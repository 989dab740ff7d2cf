"""Options that several verbs have, and what they all begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelforge import home
from kernelforge.cli import output
from kernelforge.errors import AssetError, UsageError
from kernelforge.session import Session

M = Annotated[int | None, typer.Option(help="Rows of the left operand.")]
N = Annotated[int | None, typer.Option(help="Columns of the right operand.")]
K = Annotated[int | None, typer.Option(help="Columns of the left operand: the length of the sums.")]
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
KvDtype = Annotated[
    str, typer.Option(help="Of a model: what its cache keeps: f32, f16, bf16 or q8; auto: as it suits the weights.")
]
Context = Annotated[int | None, typer.Option(help="Of a model: positions that its cache holds.")]
Variant = Annotated[str | None, typer.Option(help="Use this kernel variant.")]


def open_session(pipeline: str | None = None) -> Session:
    """A session of what the global options say, with the default pipeline of passes or another one; to be closed. Raises
    UsageError for a kernel or a pass that is not there."""
    out = output.current()
    variants: dict[str, str] = {}
    for text in out.kernels:
        op, name = _named_kernel(text, out)
        if variants.setdefault(op, name) != name:
            raise UsageError(
                f"two kernels to run {op} by: '{variants[op]}' and '{name}'", hint="give one --kernel for an op"
            )
    out.session = Session(
        out.target,
        device=out.device,
        threads=out.threads,
        registry=out.registry,
        variants=variants,
        pipeline=_without_passes(pipeline, out) if out.without_passes else pipeline,
    )
    return out.session


def _named_kernel(text: str, out: output.Output) -> tuple[str, str]:
    """Op and variant of what `--kernel` was given."""
    from kernelforge.cli.problems import find_op

    op, equals, name = text.partition("=")
    if not (op and equals and name):
        raise UsageError(f"--kernel {text}: not an op and a variant", hint="written as --kernel attention=vectorized")
    full_name = find_op(out.registry, op).full_name
    return full_name, out.registry.variant(out.target, full_name, name).name


def _without_passes(pipeline: str | None, out: output.Output) -> str:
    from kernelforge.passes import DEFAULT, Pipeline
    from kernelforge.registry import lookup

    unwanted = {lookup("pass", out.registry.passes, name).name for name in out.without_passes}
    given = Pipeline.parse(DEFAULT if pipeline is None else pipeline, out.registry)
    if absent := unwanted - {step.name for step in given.passes}:
        raise UsageError(f"the pipeline has no pass '{min(absent)}'", hint=f"it is {given}")
    return str(Pipeline(tuple(step for step in given.passes if step.name not in unwanted)))


def write_file(path: Path, text: str) -> None:
    """Write what the user asked for, whole or not at all. Raises AssetError."""
    try:
        home.write_atomic(path, text)
    except OSError as error:
        raise AssetError(f"cannot write {path}: {error.strerror or error}") from None
