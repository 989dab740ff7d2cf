"""The command; `kernelforge.cli.output` says how one is written."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.problem import parse_problem
from kernelforge.registry import lookup


def intensity(
    problem: Annotated[str, typer.Argument(help='Such as "transformer.silu(f32[4,8]) -> (f32[4,8]) {}".')],
) -> dict[str, Any]:
    """Tell how many operations a problem does for each byte it moves: few, and memory decides how fast it can be."""
    out = output.current()
    parsed = parse_problem(problem)
    cost = lookup("op", out.registry.ops, parsed.op).problem_cost(parsed)
    ratio = cost.flops / cost.bytes
    out.print(f"{cost.flops} operations, {cost.bytes} bytes: {ratio:.3g} operations for each byte")
    return {"flops": cost.flops, "bytes": cost.bytes, "intensity": ratio}
