"""`kernelforge why`: which kernel runs a problem, and why no other does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.cli.options import (
    Activations,
    Attribute,
    Constant,
    Context,
    Dtypes,
    K,
    KvDtype,
    M,
    Model,
    N,
    ProblemKey,
    Shape,
    Variant,
    Weights,
    open_session,
)
from kernelforge.cli.problems import Asked, Formats, Request
from kernelforge.plan import Fusion
from kernelforge.selection import Decision, Selection, select
from kernelforge.session import Session
from kernelforge.variant import Accept, config_key

_SOURCES = {
    "record": "measured on this problem",
    "nearest-record": "measured on a similar problem",
    "default": "the variant's own choice",
    "given": "given",
    "shared-layout": "shares a constant's layout with another step",
}


def why(
    op: Annotated[
        str | None, typer.Argument(help="An op, with --shape or --model; matmul also with --m, --n and --k.")
    ] = None,
    shape: Shape = None,
    m: M = None,
    n: N = None,
    k: K = None,
    dtype: Dtypes = "f32",
    constant: Constant = True,
    attr: Attribute = None,
    problem: ProblemKey = None,
    model: Model = None,
    weights: Weights = "native",
    activations: Activations = "auto",
    kv_dtype: KvDtype = "auto",
    context: Context = None,
    variant: Variant = None,
) -> dict[str, Any]:
    """Show every kernel that could run a problem: chosen or not, the reason, its config and where that comes from."""
    out = output.current()
    formats = Formats(weights, activations, kv_dtype, context)
    request = Request(op, (m, n, k), dtype, constant, problem, model, formats, shape, attr or ())
    with closing(open_session()) as session:
        asked = request.resolve(session)
        selections = [_select(session, each, variant) for each in asked]
        if model is None:
            given = asked[0].problem
            fusions = [session.fusion(given)] if session.registry.ops[given.op].parts_of(given) else []
            _explain(selections[0])
        else:
            ops = {each.problem.op for each in asked}
            fusions = [
                f for f in session.fusions.values() if not ops.isdisjoint((f.problem.op, *(p.op for p in f.parts)))
            ]
            out.table(
                ["steps", "programs", "problem", "variant", "plugin", "config", "source", "reason"],
                [
                    [each.steps, ",".join(each.programs), str(each.problem), *_row(selection.chosen)]
                    for each, selection in zip(asked, selections, strict=True)
                ],
            )
        _explain_fusions(fusions)
    return {
        "target": out.target,
        "problems": [as_data(a, s) for a, s in zip(asked, selections, strict=True)],
        "fusions": [asdict(fusion) | {"problem": str(fusion.problem)} for fusion in fusions],
    }


def _select(session: Session, asked: Asked, variant: str | None) -> Selection:
    if variant is None:
        found = session.select(asked.problem)
    else:
        candidates = session.registry.variants(asked.problem.op, session.target)
        found = select(asked.problem, candidates, session.device.info, session.records, variant=variant)
    if asked.shared is None or variant is not None:
        return found
    chosen = replace(found.chosen, config=asked.shared, config_source="shared-layout")
    return replace(found, chosen=chosen, decisions=(chosen, *found.decisions[1:]))


def _row(decision: Decision) -> list[str]:
    config = "" if decision.config is None else config_key(decision.config)
    variant, source = decision.variant, decision.config_source if config else ""
    return [variant.name, str(variant.provenance), config, source, decision.reason]


def _explain(selection: Selection) -> None:
    out = output.current()
    chosen = selection.chosen
    out.print(str(selection.problem))
    out.print(f"chosen: {chosen.variant.name} of {chosen.variant.provenance}: {chosen.reason}")
    source = _SOURCES[chosen.config_source]
    if chosen.config_source == "nearest-record" and chosen.measured is not None:
        source += f", {chosen.measured.problem}"
    out.print(f"config: {config_key(selection.config)} ({source})\n")
    out.table(
        ["variant", "plugin", "verdict", "config", "source", "reason"],
        [
            [name, plugin, _verdict(d, selection), config, source, reason]
            for d in selection.decisions
            for name, plugin, config, source, reason in [_row(d)]
        ],
    )


def _explain_fusions(fusions: Sequence[Fusion]) -> None:
    """Which ops the passes made of several, whether they run so, and what runs or would run those."""
    if not fusions:
        return
    out = output.current()
    out.print()
    rows = []
    for fusion in fusions:
        parts = "; ".join(f"{part.op}: {part.variant} of {part.plugin}" for part in fusion.parts)
        rows.append(["in parts" if fusion.apart else "whole", fusion.reason, parts, str(fusion.problem)])
    out.table(["runs", "reason", "kernels of its parts", "fused problem"], rows)


def _verdict(decision: Decision, selection: Selection) -> str:
    if decision is selection.chosen:
        return "chosen"
    return "accepts" if isinstance(decision.verdict, Accept) else "rejects"


def as_data(asked: Asked, selection: Selection) -> dict[str, Any]:
    """A selection as plain data."""
    return {
        "problem": str(selection.problem),
        "programs": asked.programs,
        "steps": asked.steps,
        "variant": selection.variant.name,
        "config": dict(selection.config),
        "config_source": selection.chosen.config_source,
        "reason": selection.chosen.reason,
        "candidates": [
            {
                "variant": d.variant.name,
                "plugin": d.variant.provenance.plugin,
                "distribution": d.variant.provenance.distribution,
                "version": d.variant.provenance.version,
                "verdict": _verdict(d, selection),
                "reason": d.reason,
                "config": None if d.config is None else dict(d.config),
                "config_source": None if d.config is None else d.config_source,
                "measured_us": None if d.measured is None else float(f"{d.measured.median_s * 1e6:.5g}"),
                "measured_on": None if d.measured is None else d.measured.problem,
            }
            for d in selection.decisions
        ],
    }
