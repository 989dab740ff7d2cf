"""Reports of a conformance run: text, JSON, JUnit XML, and one HTML page with the support matrix."""

from __future__ import annotations

import html
import json
from collections import Counter
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from kernelforge.testing.case import LEVELS, Case, Outcome, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kernelforge.cli.output import Output
    from kernelforge.testing.runner import Report

SCHEMA = "kernelforge.conformance/1"
COLUMNS: tuple[Status, ...] = ("passed", "failed", "expected-failure", "not-claimed")


def print_report(report: Report, out: Output) -> None:
    """The summary, and every failure with the command that repeats it."""
    rows = [
        [subject, name, *(counts[status] for status in COLUMNS)]
        for (subject, name), counts in _by_subject(report).items()
    ]
    out.table(["subject", "name", *COLUMNS], rows)
    for tolerance in report.expectations.tolerances:
        out.print(f"tolerance of {tolerance.variant}: {tolerance.factor:g} times the usual: {tolerance.reason}")
    for outcome in report.outcomes:
        if outcome.status == "expected-failure":
            out.print(f"expected: {outcome.case}: {outcome.kind}: {outcome.message}")
    for outcome in report.failures:
        out.print(f"\n{failure_text(report, outcome)}")
    for pattern in report.unused:
        out.warn(f"no case is named '{pattern}', which is announced to fail")
    out.print(f"\n{summary(report)}")


def failure_text(report: Report, outcome: Outcome) -> str:
    """What failed, how, and the command that repeats it."""
    return f"FAILED {outcome.case}\n  {outcome.kind}: {outcome.message}\n  {report.reproduce(outcome.case)}"


def summary(report: Report) -> str:
    counts = ", ".join(f"{count} {status.replace('-', ' ')}" for status, count in report.totals.items())
    about = f"{report.plugin} ({report.distribution} {report.version}), level {report.level}"
    number = len(report.outcomes)
    return f"{about}: {number} case{'' if number == 1 else 's'}: {counts}, in {report.seconds:.1f} s"


def _by_subject(report: Report) -> dict[tuple[str, str], Counter[str]]:
    found: dict[tuple[str, str], Counter[str]] = {}
    for case, outcome in zip(report.cases, report.outcomes, strict=True):
        found.setdefault((case.subject, case.name), Counter())[outcome.status] += 1
    return found


def as_data(report: Report) -> dict[str, Any]:
    """The report as plain data: what `--report-json` writes."""
    return {
        "schema": SCHEMA,
        "plugin": report.plugin,
        "distribution": report.distribution,
        "version": report.version,
        "level": report.level,
        "ok": report.ok,
        "total": len(report.outcomes),
        "totals": report.totals,
        "seconds": round(report.seconds, 3),
        "tolerances": [
            {"variant": t.variant, "factor": t.factor, "reason": t.reason} for t in report.expectations.tolerances
        ],
        "unused": list(report.unused),
        "cases": [
            {
                "id": case.id,
                "level": case.level,
                "subject": case.subject,
                "name": case.name,
                "dtype": case.dtype,
                "status": outcome.status,
                "kind": outcome.kind,
                "message": outcome.message,
                "seconds": round(outcome.seconds, 4),
                "reproduce": report.reproduce(case.id),
            }
            for case, outcome in zip(report.cases, report.outcomes, strict=True)
        ],
    }


def json_text(report: Report) -> str:
    return json.dumps(as_data(report), indent=1) + "\n"


def junit_text(report: Report) -> str:
    """One test suite; not claimed and expected failures are skipped tests."""
    totals = report.totals
    suite = ElementTree.Element(
        "testsuite",
        name=f"kernelforge.{report.plugin}",
        tests=str(len(report.outcomes)),
        failures=str(totals["failed"]),
        skipped=str(totals["not-claimed"] + totals["expected-failure"]),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    for case, outcome in zip(report.cases, report.outcomes, strict=True):
        test = ElementTree.SubElement(
            suite, "testcase", classname=f"{case.subject}.{case.name}", name=case.id, time=f"{outcome.seconds:.3f}"
        )
        message = _printable(outcome.message)
        if outcome.status == "failed":
            failure = ElementTree.SubElement(test, "failure", type=outcome.kind or "error", message=message)
            failure.text = report.reproduce(case.id)
        elif outcome.status != "passed":
            ElementTree.SubElement(test, "skipped", message=f"{outcome.status}: {message}")
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(c if c >= " " or c in "\t\n\r" else "?" for c in text)


# --- HTML ---

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; }
th { background: #f4f4f4; } code, pre { font: 13px ui-monospace, monospace; } pre { background: #f4f4f4; padding: .5rem;
white-space: pre-wrap; } summary, p, pre { overflow-wrap: anywhere; }
.passed { background: #d9f2d9; } .failed { background: #f8d0d0; } .expected-failure {
background: #fdf0c0; } .not-claimed { color: #888; } details { margin: .4rem 0; }
"""


def html_text(report: Report) -> str:
    """One page that needs nothing else: totals, the support matrix, what failed and what was announced."""
    verdict = "conformant" if report.ok else "not conformant"
    parts = [
        f"<h1>{_esc(report.plugin)}: {verdict}</h1><p>{_esc(summary(report))}</p>",
        _totals_table(report),
        *_matrix(report),
        *_failures(report),
    ]
    title = f"Conformance of {report.plugin}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_esc(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _esc(text: object) -> str:
    return html.escape(str(text))


def _totals_table(report: Report) -> str:
    rows = []
    for level, name in LEVELS.items():
        counts = Counter(o.status for c, o in zip(report.cases, report.outcomes, strict=True) if c.level == level)
        cells = "".join(f"<td>{counts[status]}</td>" for status in COLUMNS)
        rows.append(f"<tr><th>{level} {_esc(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{_esc(status)}</th>" for status in COLUMNS)
    return f"<table><tr><th>level</th>{head}</tr>{''.join(rows)}</table>"


def _matrix(report: Report) -> Iterator[str]:
    """Ops and dtypes down, variants across. A cell counts what passed of what was run."""
    cells: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    variants: dict[str, None] = {}
    for case, outcome in zip(report.cases, report.outcomes, strict=True):
        if case.dtype:
            column = f"{case.id.partition('/')[0]}/{case.name}"
            variants[column] = None
            row = cells.setdefault((case.subject, case.dtype), {})
            row.setdefault(column, Counter())[outcome.status] += 1
    if not cells:
        return
    head = "".join(f"<th>{_esc(variant)}</th>" for variant in variants)
    yield "<h2>Support</h2><p>Cases that passed, of those that were run.</p>"
    yield f"<table><tr><th>op</th><th>types</th>{head}</tr>"
    for (op, dtype), row in sorted(cells.items()):
        found = "".join(_cell(row.get(variant)) for variant in variants)
        yield f"<tr><th>{_esc(op)}</th><td>{_esc(dtype)}</td>{found}</tr>"
    yield "</table>"


def _cell(counts: Counter[str] | None) -> str:
    if counts is None:
        return "<td></td>"
    ran = sum(counts.values()) - counts["not-claimed"]
    if not ran:
        return '<td class="not-claimed">not claimed</td>'
    status = next(s for s in ("failed", "expected-failure", "passed") if counts[s])
    return f'<td class="{status}">{counts["passed"]} of {ran}</td>'


def _failures(report: Report) -> Iterator[str]:
    for title, status in (("Failures", "failed"), ("Expected failures", "expected-failure")):
        found = [(c, o) for c, o in zip(report.cases, report.outcomes, strict=True) if o.status == status]
        if found:
            yield f"<h2>{title}</h2>"
            yield from (_failure(report, case, outcome) for case, outcome in found)
    if report.expectations.tolerances:
        yield "<h2>Looser tolerances</h2><ul>"
        for t in report.expectations.tolerances:
            yield f"<li>{_esc(t.variant)}: {t.factor:g} times the usual: {_esc(t.reason)}</li>"
        yield "</ul>"


def _failure(report: Report, case: Case, outcome: Outcome) -> str:
    return (
        f"<details><summary><b>{_esc(outcome.kind)}</b> {_esc(case.id)}</summary><p>{_esc(outcome.message)}</p>"
        f"<pre>{_esc(report.reproduce(case.id))}</pre></details>"
    )
