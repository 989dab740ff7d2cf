"""`kernelforge benchmark-matmul` and `kernelforge benchmark-suite`."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.bench.baseline import THRESHOLD, Change, compare_reports, load_report, lost_cases
from kernelforge.bench.dispatch import measure_dispatch
from kernelforge.bench.matmul import benchmark_matmul, matmul_problem, open_peers, summary
from kernelforge.bench.suite import CASES, chosen_cases, run_case, run_suite
from kernelforge.cli import output
from kernelforge.cli.options import Constant, Variant, open_session, write_file
from kernelforge.dtype import WEIGHT_FORMATS
from kernelforge.errors import KernelForgeError, RegressionError, UsageError, WrongResultError
from kernelforge.roofline import STANDING_HEADERS, Roofline
from kernelforge.session import Session
from kernelforge.variant import config_key


def matmul(
    m: Annotated[
        list[int] | None, typer.Option(help="Rows of the left operand (may be repeated; default: 512).")
    ] = None,
    n: Annotated[int, typer.Option(help="Columns of the right operand.")] = 512,
    k: Annotated[int, typer.Option(help="Columns of the left operand: the length of the sums.")] = 1024,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Columns and length of sums in one (may be repeated).")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="Type of the right operand (the weights): f32 (default), bf16, f16, q8, q4. May be repeated."
        ),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(help="What q8 and q4 weights are multiplied by: f32, q8, or auto: as the device does best."),
    ] = "auto",
    constant: Constant = True,
    variant: Variant = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Measure beside numpy or torch on the CPU, or torch-cuda (may be repeated)."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds in which all take turns.")] = 7,
    copies: Annotated[
        int,
        typer.Option(min=1, help="Also time so many in a row, each with weights of its own, as a model runs them."),
    ] = 1,
) -> dict[str, Any]:
    """Verify a matrix product, then time it: latency, GFLOP/s, and the same of peers measured in turn.

    Several sizes or types make a table. Types take turns, too; peers multiply weights of the first, f32 in place of q8 and q4.
    """
    out = output.current()
    sizes = [(rows, *columns) for columns in map(_columns, shape or [f"{n}x{k}"]) for rows in m or [512]]
    dtypes = dtype or ["f32"]
    if activations != "auto" and not set(dtypes) & set(WEIGHT_FORMATS):
        raise UsageError("--activations is for quantised weights", hint="add --dtype q8 or --dtype q4")
    with closing(open_session()) as session:
        lhs: dict[str, Any] = {"activations": activations, "device": session.device.info}
        cases = [
            [matmul_problem(session.registry, *size, weights, constant=constant, **lhs) for weights in dtypes]
            for size in sizes
        ]
        reports: list[dict[str, Any]] = []
        with open_peers(peer or (), session.device.info.threads) as peers, out.progress("benchmark", len(cases)) as bar:
            for size, problems in zip(sizes, cases, strict=True):
                reports += benchmark_matmul(
                    session, problems, variant=variant, peers=peers, repeat=repeat, copies=copies
                )
                bar.advance(say="x".join(map(str, size)))
    if len(reports) == 1:
        _print_product(reports[0])
        return reports[0]
    found = summary(reports)
    _print_products(reports, found)
    return {"cases": reports, "summary": found}


def _columns(text: str) -> tuple[int, int]:
    """ "576x1536" as N and K."""
    match = re.fullmatch(r"(\d+)[x,](\d+)", text.strip())
    if match is None:
        raise UsageError(f"--shape {text}: not a shape of weights", hint="written as NxK: --shape 1536x576")
    return int(match[1]), int(match[2])


def _print_product(report: dict[str, Any]) -> None:
    out = output.current()
    out.print(report["problem"])
    out.print(f"correct: relative error {report['rel_error']:.1e} (tolerated {report['tolerance']:.1e})")
    out.print(f"variant: {report['variant']} {config_key(report['config'])} ({report['config_source']})\n")
    rows = [["kernelforge", report["latency_ms"], report["latency"]["mad"], report["gflops"], None, report["threads"]]]
    if "in_sequence" in report:
        each = report["in_sequence"]
        name = f"one of {each['copies']} in a row"
        rows.append([name, each["latency_ms"], None, each["gflops"], None, report["threads"]])
    for name, p in report["peers"].items():
        title = f"{name} {p['version']} ({p['device']})"
        rows.append([title, p["latency_ms"], p["latency"]["mad"], p["gflops"], p["ratio"], report["threads"]])
    out.table(["", "median ms", "mad ms", "GFLOP/s", "ours / it", "threads"], rows)


def _print_products(reports: list[dict[str, Any]], summaries: dict[str, dict[str, float]]) -> None:
    """All of them were verified: a wrong one ends the run."""
    out = output.current()
    names = list(reports[0]["peers"])
    several = len(summaries) > 1
    first: dict[str, Any] = {}
    rows = []
    for r in reports:
        if r["dtype"] == reports[0]["dtype"]:
            first = r
        row = [f"{r['m']}x{r['k']} @ {r['k']}x{r['n']}", r["activations"], r["dtype"]]
        row += [r["latency_ms"], r["gflops"], r["gbytes_s"]]
        row += [r["in_sequence"]["latency_ms"]] if "in_sequence" in r else []
        row += [r["peers"][name]["latency_ms"] for name in names]
        row += [min(p["ratio"] for p in r["peers"].values())] if names else []
        rows.append([*row, first["latency_ms"] / r["latency_ms"]] if several else row)
    head = ["product", "activations", "weights", "median ms", "GFLOP/s", "GB/s"]
    head += [f"each of {reports[0]['in_sequence']['copies']} ms"] if "in_sequence" in reports[0] else []
    head += [f"{name} ms" for name in names]
    head += ["ours / best"] if names else []
    out.table([*head, f"ours / {reports[0]['dtype']}"] if several else head, rows)
    out.print(f"\nall correct; {reports[0]['threads']} threads")
    for dtype, found in summaries.items():
        for name, what in (("best_peer", "the better peer"), ("first_dtype", f"{reports[0]['dtype']} weights")):
            if f"{name}_min" in found:
                mean, least = found[f"{name}_geomean"], found[f"{name}_min"]
                out.print(f"{dtype}: speed over {what}: geometric mean {mean:.3f}, least {least:.3f}")


def dispatch() -> dict[str, Any]:
    """Time what a call of a compiled op costs above its kernel's own time: bound once, and with plain arrays."""
    out = output.current()
    with closing(open_session()) as session:
        found = measure_dispatch(session)
        threads = session.device.info.threads
    report = {
        "problem": str(found.problem),
        "threads": threads,
        "kernel_us": float(f"{found.kernel * 1e6:.4g}"),
        "bound_us": float(f"{(found.bound - found.kernel) * 1e6:.4g}"),
        "plain_us": float(f"{(found.plain - found.kernel) * 1e6:.4g}"),
    }
    out.print(f"{found.problem} on {out.target}, {threads} thread{'s' if threads > 1 else ''}")
    rows = [
        ["kernel", report["kernel_us"]],
        ["+ bound call", report["bound_us"]],
        ["+ plain arrays", report["plain_us"]],
    ]
    out.table(["", "us"], rows)
    return report


def suite(
    file: Annotated[Path | None, typer.Option("--output", help="Write the report to this file.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="An earlier report; a regression exits with 14.")] = None,
    threshold: Annotated[float, typer.Option(min=0, help="Share by which a median must be slower.")] = THRESHOLD,
    substring: Annotated[str, typer.Option("--filter", help="Only the cases whose name contains this.")] = "",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 5,
) -> dict[str, Any]:
    """Verify and time representative problems of transformers; compare with an earlier report."""
    out = output.current()
    cases = chosen_cases(substring)
    before = load_report(baseline) if baseline is not None else None
    with closing(open_session()) as session, out.progress("benchmark", len(cases)) as bar:
        environment = output.environment()
        report = run_suite(session, cases, environment, repeat=repeat, progress=lambda name: bar.advance(say=name))
        changes = [] if before is None else _confirmed(session, before, report, threshold, repeat)
    lost = [] if before is None else lost_cases(before, report)
    out.data = report
    if report["roofline"] is not None:
        out.print(f"{Roofline.from_data(report['roofline'])}\n")
    _print_cases(report["cases"])
    if before is not None:
        report["comparison"] = [_as_data(change, threshold) for change in changes]
        report["comparison"] += [{"name": name, "verdict": "unsupported"} for name in lost]
        _print_changes(changes, threshold)
    if file is not None:
        write_file(file, json.dumps(report, indent=1) + "\n")
        out.print(f"\nreport: {file}")
    _raise_for(report["cases"], [c for c in changes if c.verdict(threshold) == "slower"], lost)
    return report


def _confirmed(
    session: Session, before: dict[str, Any], report: dict[str, Any], threshold: float, repeat: int
) -> list[Change]:
    """The changes; cases that seem slower are measured once more and keep the better of the two."""
    suspects = {c.name for c in compare_reports(before, report) if c.verdict(threshold) == "slower"}
    for i, measured in enumerate(report["cases"]):
        if measured["name"] in suspects:
            case = next(c for c in CASES if c.name == measured["name"])
            again = run_case(session, case, repeat=repeat)
            if again["status"] == "ok" and again["latency_ms"] < measured["latency_ms"]:
                report["cases"][i] = again
    return compare_reports(before, report)


def _print_cases(cases: list[dict[str, Any]]) -> None:
    rows = []
    for case in cases:
        if case["status"] == "ok":
            latency = case["latency"]
            times = [latency["median"], latency["p95"], case["gflops"], case["gbytes_s"]]
            shares = [_percent(case["of_bandwidth"]), _percent(case["of_peak"]), case["limit"] or ""]
            rows.append([case["name"], case["variant"], *times, *shares, case["rel_error"], ""])
        else:
            rows.append([case["name"], case["status"], *[None] * 8, case["message"]])
    out = output.current()
    headers = ["case", "variant", "median ms", "p95 ms", "GFLOP/s", "GB/s", *STANDING_HEADERS, "rel. error", ""]
    out.table(headers, rows)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _print_changes(changes: list[Change], threshold: float) -> None:
    out = output.current()
    out.print()
    out.table(
        ["case", "before ms", "now ms", "ratio", ""],
        [[c.name, c.before_ms, c.now_ms, c.ratio, c.verdict(threshold)] for c in changes],
    )


def _as_data(change: Change, threshold: float) -> dict[str, Any]:
    return {
        "name": change.name,
        "before_ms": change.before_ms,
        "now_ms": change.now_ms,
        "ratio": float(f"{change.ratio:.4g}"),
        "verdict": change.verdict(threshold),
    }


def _raise_for(cases: list[dict[str, Any]], slower: list[Change], lost: list[str]) -> None:
    """Raises WrongResultError, KernelForgeError or RegressionError, naming the cases."""
    wrong = [c for c in cases if c["status"] == "wrong-result"]
    if wrong:
        names = ", ".join(c["name"] for c in wrong)
        raise WrongResultError(f"wrong results in {names}: {wrong[0]['message']}")
    broken = [c for c in cases if c["status"] == "error"]
    if broken:
        raise KernelForgeError(f"failed: {', '.join(c['name'] for c in broken)}: {broken[0]['message']}")
    regressions = []
    if slower:
        named = ", ".join(f"{c.name} ({c.before_ms:.4g} -> {c.now_ms:.4g} ms, {c.ratio:.2f} x)" for c in slower)
        regressions.append(f"slower than the baseline: {named}")
    if lost:
        regressions.append(f"no kernel takes what ran in the baseline: {', '.join(lost)}")
    if regressions:
        raise RegressionError("; ".join(regressions))
