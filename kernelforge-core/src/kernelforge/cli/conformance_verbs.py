"""`kernelforge conformance`: is what a plugin registers right?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.cli.options import write_file
from kernelforge.errors import UsageError, WrongResultError
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import DEFAULT_LEVEL, LEVELS, THREADS
from kernelforge.testing.collect import Scope, collect, plugin_status
from kernelforge.testing.report import as_data, html_text, json_text, junit_text, print_report
from kernelforge.testing.runner import TIMEOUT_S, Request, run_plugin

_LEVELS = ", ".join(f"{level} {name}" for level, name in LEVELS.items())

Name = Annotated[str, typer.Argument(help="A plugin, as `kernelforge plugins list` names it.")]
Level = Annotated[int, typer.Option(help=f"Cases up to this level: {_LEVELS}.")]


def run(
    name: Name,
    level: Level = DEFAULT_LEVEL,
    op: Annotated[str | None, typer.Option(help="Only cases of this op.")] = None,
    variant: Annotated[str | None, typer.Option(help="Only cases of this variant, pass, tuner ...")] = None,
    case: Annotated[str | None, typer.Option(help="Only the case of this name, or those of a pattern.")] = None,
    report_json: Annotated[Path | None, typer.Option(help="Write the whole report here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with the support matrix here.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that run cases at once.")] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a sign of life that end a case.")
    ] = TIMEOUT_S,
    in_process: Annotated[bool, typer.Option("--in-process", help="Run in this process, for debuggers.")] = False,
) -> dict[str, Any]:
    """Check everything that a plugin registers against the references; exit code 10 when something is wrong."""
    out = output.current()
    request = Request(
        plugin=name,
        level=level,
        target=out.requested_target,
        op=op,
        variant=variant,
        case=case,
        threads=out.threads or THREADS,
        jobs=jobs,
        isolate=not in_process,
        timeout_s=timeout,
    )
    with out.progress(f"conformance of {name}", total=0) as bar:
        failed = 0

        def done(outcome: Any) -> None:
            nonlocal failed
            failed += outcome.status == "failed"
            bar.advance(say=f"{failed} failed, {outcome.case}")

        report = run_plugin(out.registry, request, done)
    print_report(report, out)
    for path, text in ((report_json, json_text), (junit, junit_text), (html, html_text)):
        if path is not None:
            write_file(path, text(report))
    out.data = as_data(report)
    if report.failures:
        raise WrongResultError(f"{len(report.failures)} of {report.ran} cases of '{name}' failed")
    if not report.ran:
        refused = next((outcome.message for outcome in report.outcomes), "")
        raise WrongResultError(
            f"nothing of '{name}' was tested" + (f": {refused}" if refused else ""),
            hint="it registers nothing that has cases, or claims none of them",
        )
    return out.data


def list_cases(
    name: Annotated[str | None, typer.Argument(help="A plugin; without one, all plugins are counted.")] = None,
    level: Level = DEFAULT_LEVEL,
) -> dict[str, Any]:
    """List the conformance cases of a plugin, or how many each plugin has."""
    out = output.current()
    if level not in LEVELS:
        raise UsageError(f"there is no level {level}", hint=f"from {min(LEVELS)} to {max(LEVELS)}")
    with Bench(out.registry) as bench:
        if name is None:
            return _counts(bench, level)
        cases = collect(bench, Scope(name, level, out.requested_target))
    out.table(
        ["case", "level", "claimed"],
        [[c.id, c.level, f"no: {c.not_claimed}" if c.not_claimed else "yes"] for c in cases],
    )
    return {"plugin": name, "cases": [{"id": c.id, "level": c.level, "claimed": not c.not_claimed} for c in cases]}


def _counts(bench: Bench, level: int) -> dict[str, Any]:
    out = output.current()
    counted: list[dict[str, Any]] = []
    for name, status in bench.registry.plugins.items():
        if status.state == "loaded":
            claims = Counter(not case.not_claimed for case in collect(bench, Scope(name, level, out.requested_target)))
            version = plugin_status(bench.registry, name).version
            counted.append({"plugin": name, "version": version, "cases": claims[True], "not_claimed": claims[False]})
    out.table(["plugin", "version", "cases", "not claimed"], [list(row.values()) for row in counted])
    return {"plugins": counted}
