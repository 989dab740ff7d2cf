"""The report as one HTML page that needs nothing else: tables and plots of what `run.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plots import Axis, Point, Series, bar_plot, xy_plot

Data = Mapping[str, Any]
Cell = str | tuple[str, str]
"""Of a table: text, or a class and HTML."""

OURS = {"f32": "#1f5fbf", "bf16": "#0b8f6a", "f16": "#8a4fbf"}
PEERS = {"numpy": "#d9822b", "torch": "#c0392b", "llama.cpp": "#d9822b", "transformers": "#c0392b"}
KINDS = {"suite": "#5b6770", "prefill": "#0b8f6a", "decode": "#1f5fbf"}
GOOD, FAIR = 1.15, 0.95
"""Ratios from which on a cell is green, and below which it is red."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2328; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dadd; }
table { border-collapse: collapse; font-size: 13px; margin: .8rem 0; font-variant-numeric: tabular-nums; }
td, th { border: 1px solid #d5dadd; padding: .15rem .5rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
th { background: #f3f5f6; font-weight: 600; } td.good { background: #d7f0df; } td.fair { background: #fdf3cf; }
td.poor { background: #f9d9d5; } td small { color: #5b6770; display: block; }
figure { display: inline-block; margin: .4rem .6rem .4rem 0; vertical-align: top; } svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #1c2328; } .grid { stroke: #e3e7e9; }
.legend span { font-size: 12px; margin-right: .9rem; white-space: nowrap; }
.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; border-radius: 2px; }
.missing { background: #fdf3cf; padding: .4rem .8rem; } .failed { background: #f9d9d5; padding: .4rem .8rem; }
"""


def page(report: Data) -> str:
    """The page of a report. Parts that were not measured are left out; that they failed or are missing stands at the top."""
    body = "\n".join((_head(report), *_gemm(report.get("matmul")), *_llm(report["llm"]), *_roofline(report)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>KernelForge benchmarks</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _head(report: Data) -> str:
    found = [f"{name} {version}" for name, version in report["peers"].items() if version]
    lines = [
        "<h1>KernelForge benchmarks</h1>",
        f"<p>{escape(report['machine'])}, {report['threads']} threads; {escape(report['date'])}; "
        f"kernelforge {escape(report['version'])}. Peers: {escape(', '.join(found) or 'none')}. All that is compared took "
        "turns in one run, on as many threads; figures are medians.</p>",
    ]
    for name, why in report["missing"].items():
        lines.append(f'<p class="missing">Not measured beside {escape(name)}: {escape(why)}</p>')
    for step, why in report["failed"].items():
        lines.append(f'<p class="failed">{escape(step)} failed: {escape(why)}</p>')
    if report["quick"]:
        lines.append('<p class="missing">A quick run: sizes so small that the figures say nothing.</p>')
    return "\n".join(lines)


# --- matrix products ---


def _gemm(matmul: Data | None) -> Iterable[str]:
    if not matmul:
        return
    cases: Sequence[Data] = matmul["cases"]
    yield "<h2>Matrix products with constant weights</h2>"
    for dtype, found in matmul["summary"].items():
        words = [f"{key.replace('_', ' ')} {value:.2f} x" for key, value in found.items()]
        yield f"<p><b>{escape(dtype)}</b>: {escape(', '.join(words) or 'nothing to compare with')}</p>"
    columns = sorted({c["m"] for c in cases})
    for dtype in dict.fromkeys(c["dtype"] for c in cases):
        table = {(c["n"], c["k"], c["m"]): c for c in cases if c["dtype"] == dtype}
        rows: list[list[Cell]] = [
            [f"{n} x {k}", *(_product(table.get((n, k, m))) for m in columns)]
            for n, k in dict.fromkeys((c["n"], c["k"]) for c in cases)
        ]
        title = f"{dtype} weights: GFLOP/s, and our speed over the quicker peer's"
        yield _table([f"{title} · N x K", *(f"M = {m}" for m in columns)], rows)
    for n, k in dict.fromkeys((c["n"], c["k"]) for c in cases):
        yield _product_plot(n, k, [c for c in cases if (c["n"], c["k"]) == (n, k)])


def _product(case: Data | None) -> tuple[str, str]:
    """A cell's class and HTML."""
    if case is None:
        return "", ""
    ratios = {name: peer["ratio"] for name, peer in case["peers"].items()}
    if not ratios:
        return "", f"{case['gflops']:.3g}"
    name, ratio = min(ratios.items(), key=lambda pair: pair[1])
    return _grade(ratio), f"{case['gflops']:.3g}<small>{ratio:.2f} x {escape(name)}</small>"


def _grade(ratio: float) -> str:
    return "good" if ratio >= GOOD else "fair" if ratio >= FAIR else "poor"


def _product_plot(n: int, k: int, cases: Sequence[Data]) -> str:
    series = []
    for dtype in dict.fromkeys(c["dtype"] for c in cases):
        points = [
            Point(c["m"], c["gflops"], f"{dtype}, M = {c['m']}: {c['gflops']:.4g}")
            for c in cases
            if c["dtype"] == dtype
        ]
        series.append(Series(f"ours {dtype}", OURS.get(dtype, "#1f5fbf"), tuple(points)))
    first = [c for c in cases if c["dtype"] == cases[0]["dtype"]]
    for name in first[0]["peers"]:
        points = [
            Point(c["m"], c["peers"][name]["gflops"], f"{name}, M = {c['m']}: {c['peers'][name]['gflops']:.4g}")
            for c in first
        ]
        series.append(Series(name, PEERS.get(name, "#5b6770"), tuple(points), dashed=True))
    speeds = [p.y for s in series for p in s.points]
    x, y = Axis.around("M", [c["m"] for c in cases], 2), Axis.around("GFLOP/s", speeds)
    return xy_plot(f"N = {n}, K = {k}", x, y, series)


# --- decoders ---


def _llm(cases: Sequence[Data]) -> Iterable[str]:
    if not cases:
        return
    yield "<h2>Decoders</h2>"
    rows = []
    for c in cases:
        for name, peer in c["peers"].items() or [("", None)]:
            cells: list[Cell] = [_called(c)]
            for kind in ("prefill", "decode"):
                ours = c[f"{kind}_tok_s"]["median"]
                cells.append(f"{ours:.4g}")
                cells.append("" if peer is None else f"{peer[f'{kind}_tok_s']:.4g}")
                ratio = None if peer is None else peer[f"{kind}_ratio"]
                cells.append("" if ratio is None else ("good" if ratio >= 1 else "poor", f"{ratio:.2f} x"))
            cells.append("" if peer is None else f"{name} {peer['version']}")
            cells.append("" if peer is None else f"{peer['logits_difference']:.1%}")
            rows.append(cells)
    heads = ["model", "prefill", "peer", "ratio", "decode", "peer", "ratio", "peer is", "logits differ by"]
    yield _table(heads, rows)
    for kind in ("prefill", "decode"):
        groups = []
        for c in cases:
            bars = [("KernelForge", OURS["f32"], c[f"{kind}_tok_s"]["median"])]
            bars += [(name, PEERS[name], peer[f"{kind}_tok_s"]) for name, peer in c["peers"].items()]
            groups.append((_called(c), bars))
        yield bar_plot(kind.capitalize(), "tokens/s", groups)


def _called(case: Data) -> str:
    depth = f", {case['depth']} before" if case["depth"] else ""
    return f"{case['model'].removeprefix('random ')} {case['weights']}{depth}"


# --- roofline ---


def _roofline(report: Data) -> Iterable[str]:
    limits = report["roofline"]
    if limits is None:
        return
    bandwidth, peak = limits["device"]["bytes_s"] / 1e9, limits["device"]["flops"] / 1e9
    int8 = (limits["device"]["int8_ops"] or 0) / 1e9
    points = {kind: _ops(report, kind) for kind in KINDS}
    placed = [p for found in points.values() for p in found]
    yield "<h2>Roofline</h2>"
    yield (
        f"<p>Measured with {report['threads']} threads: {bandwidth:.1f} GB/s of memory, {peak:.0f} GFLOP/s in f32"
        + (f", {int8:.0f} Gop/s of byte products" if int8 else "")
        + ". Points above the slope work on what is in a cache. Rest the pointer on one to read its op.</p>"
    )
    ridge = peak / bandwidth
    low, high = (f([ridge, *(p.x for p in placed)]) for f in (min, max))
    x = Axis.around("FLOP per byte", [low / 2, high * 2], 10)
    y = Axis.around("GFLOP/s", [*(p.y for p in placed), peak, int8 or peak, bandwidth * x.low], 10)
    start = max(x.low, y.low / bandwidth)
    roof = [Point(start, start * bandwidth), Point(ridge, peak), Point(x.high, peak)]
    series = [Series("limit: memory, f32 peak", "#1c2328", tuple(roof), marks=False)]
    if int8:
        upper = (Point(ridge, peak), Point(int8 / bandwidth, int8), Point(max(x.high, int8 / bandwidth), int8))
        shown = tuple(Point(min(p.x, x.high), min(p.y, bandwidth * x.high)) for p in upper)
        series.append(Series("byte products", "#1c2328", shown, marks=False, dashed=True))
    series += [
        Series({"suite": "ops of the suite"}.get(kind, kind), KINDS[kind], found, line=False)
        for kind, found in points.items()
        if found
    ]
    yield xy_plot("Ops beside the machine's limits", x, y, series, width=920, height=520)
    yield from _shares(report)


def _ops(report: Data, kind: str) -> tuple[Point, ...]:
    """The ops of the suite, or of the explained steps, by intensity and speed."""
    found = []
    for name, op in _explained(report, kind) if kind != "suite" else _suite(report):
        flops, nbytes = op["gflops"], op["gbytes_s"]
        if flops and nbytes:
            found.append(
                Point(flops / nbytes, flops, f"{name}: {flops:.4g} GFLOP/s, {nbytes:.4g} GB/s, {op['variant']}")
            )
    return tuple(found)


def _suite(report: Data) -> Iterable[tuple[str, Data]]:
    return [(c["name"], c) for c in (report.get("suite") or {"cases": ()})["cases"] if c["status"] == "ok"]


def _explained(report: Data, kind: str) -> Iterable[tuple[str, Data]]:
    for case in report["llm"]:
        for op in case.get("explain", {kind: {"kernels": ()}})[kind]["kernels"]:
            yield f"{_called(case)}, {kind}: {op['problem']}", op


def _shares(report: Data) -> Iterable[str]:
    """Where the time of explained steps goes."""
    for case in report["llm"]:
        for kind, step in case.get("explain", {}).items():
            heads = [f"{_called(case)}, {kind}: {step['seconds'] * 1e3:.3g} ms"]
            heads += ["variant", "steps", "share", "GFLOP/s", "GB/s", "of memory", "of peak", "limit"]
            rows: list[list[Cell]] = []
            for op in step["kernels"]:
                if (op["share"] or 0) < 0.005:
                    continue
                operands = op["problem"].partition("(")[2].partition(") ->")[0]
                cells = [
                    f"{op['op'].partition('.')[2]}({operands})",
                    op["variant"],
                    f"{op['steps']}",
                    f"{op['share']:.1%}",
                ]
                cells += [_maybe(op[key], "{:.3g}") for key in ("gflops", "gbytes_s")]
                cells += [_maybe(op[key], "{:.0%}") for key in ("of_bandwidth", "of_peak")]
                rows.append([*cells, op["limit"] or ""])
            yield _table(heads, rows)


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else form.format(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    def cell(value: Cell) -> str:
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        return f'<td class="{value[0]}">{value[1]}</td>' if value[0] else f"<td>{value[1]}</td>"

    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"
