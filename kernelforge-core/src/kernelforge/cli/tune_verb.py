"""`kernelforge tune`."""

from __future__ import annotations

import time
from contextlib import closing
from textwrap import shorten
from typing import Annotated, Any

import typer

from kernelforge.bench.harness import gigas
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
    Weights,
    open_session,
)
from kernelforge.cli.problems import Asked, Formats, Request
from kernelforge.errors import PartialResult
from kernelforge.session import Session
from kernelforge.tune.record import Record
from kernelforge.tune.records import RecordStore
from kernelforge.tune.run import TuneResult, planned_trials, tunable, tune_problem
from kernelforge.variant import config_key

BUDGET_S = 20.0
"""For each problem, when no budget is given."""


def tune(
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
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant (may be repeated).")] = None,
    tuner: Annotated[str, typer.Option(help="Search strategy.")] = "grid",
    budget_s: Annotated[
        float | None, typer.Option(min=0, help="Seconds in all; by default 20 for each problem.")
    ] = None,
) -> dict[str, Any]:
    """Find the fastest verified kernel and config, and record every trial; what is recorded is not run again."""
    out = output.current()
    formats = Formats(weights, activations, kv_dtype, context)
    request = Request(op, (m, n, k), dtype, constant, problem, model, formats, shape, attr or ())
    with closing(open_session()) as session:
        asked = list({each.static: each for each in request.resolve(session)}.values())
        store = RecordStore.default()
        end = time.monotonic() + (budget_s if budget_s is not None else BUDGET_S * len(asked))
        out.data = {"problems": [], "records": str(store.path)}
        names = {op: variant or _named(session, op) for op in {each.problem.op for each in asked}}
        planned = sum(planned_trials(session, a.static, tunable(session, a.static, names[a.problem.op])) for a in asked)
        with out.progress("tuning", planned) as bar:

            def advance(record: Record) -> None:
                bar.advance(say=f"{record.variant} {config_key(record.config)}")

            for i, each in enumerate(asked):
                result = tune_problem(
                    session,
                    each.static,
                    store=store,
                    tuner=tuner,
                    variants=names[each.problem.op],
                    budget_s=max(end - time.monotonic(), 0.0) / (len(asked) - i),
                    progress=advance,
                )
                _show(session, each, result)
                if result.interrupted:
                    _stop(len(out.data["problems"]), store)
    return out.data


def _named(session: Session, op: str) -> list[str]:
    name = session.named(op)
    return [] if name is None else [name]


def _show(session: Session, asked: Asked, result: TuneResult) -> None:
    out = output.current()
    failed = [r for r in result.records if not r.ok]
    best = result.best
    report: dict[str, Any] = {
        "problem": str(result.problem),
        "programs": asked.programs,
        "trials": len(result.records),
        "known": result.known,
        "complete": result.complete,
        "failed": [
            {"variant": r.variant, "config": dict(r.config), "status": r.status, "message": r.message} for r in failed
        ],
        "best": None,
    }
    out.print(str(result.problem))
    if best is not None:
        cost = session.registry.ops[result.problem.op].problem_cost(result.problem)
        report["best"] = {
            "variant": best.variant,
            "config": dict(best.config),
            "median_ms": float(f"{best.median_s * 1e3:.5g}"),
            "gflops": gigas(cost.flops, best.median_s),
            "rel_error": best.error,
            "timing_source": best.timing_source,
        }
        speed = f"{best.median_s * 1e6:.1f} us, {report['best']['gflops']:g} GFLOP/s"
        out.print(f"  best: {best.variant} {config_key(best.config)}  {speed}")
    ended = "" if result.complete else ", not all configs"
    out.print(f"  {len(result.records)} trials ({len(failed)} failed), {result.known} already known{ended}")
    for record in failed[:3]:
        out.note(f"  {record.variant} {config_key(record.config)}: {shorten(record.message, 300, placeholder=' ...')}")
    out.data["problems"].append(report)


def _stop(problems: int, store: RecordStore) -> None:
    """Raises PartialResult, or KeyboardInterrupt when nothing was measured."""
    trials = sum(p["trials"] for p in output.current().data["problems"])
    if not trials:
        raise KeyboardInterrupt
    raise PartialResult(
        f"interrupted: {trials} trials of {problems} problems are kept in {store.path}",
        hint="the same command goes on from there",
    )
