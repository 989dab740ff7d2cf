"""Conformance: what a plugin must do to be right, as generated cases.

`kernelforge conformance run NAME`, `pytest --kernelforge-plugin NAME` and, in a plugin's own tests, `assert_conformant` run the
same ones; see docs/conformance.md.

- `case`: what a case is, and how it ends
- `kernel_cases`, `edges`, `property`, `stress`: cases of kernel variants, made from the `families` of an op's problems
- `kernels`: one kernel on poisoned, guarded memory (`memory`), in all `layouts`, against the float64 oracle
- `dialect_cases`, `pass_cases`, `tuner_cases`, `backend_cases`, `descriptor_cases`: of everything else
- `collect`, `expectations`, `runner`, `worker`, `report`: all cases of a plugin, run in processes of their own
"""

from __future__ import annotations

_MOST_NAMED = 5


def assert_conformant(
    plugin: str, *, level: int | None = None, op: str | None = None, variant: str | None = None
) -> None:
    """Run the conformance cases of an installed plugin, as `kernelforge conformance run` does with these options.

    Raises AssertionError, which names what failed with the command that repeats it, also when nothing is tested;
    UsageError for an unknown plugin or level and for an op or variant that it has no case of; PluginError for a plugin that is
    not loaded.
    """
    __tracebackhide__ = True
    from kernelforge.registry import default_registry
    from kernelforge.testing.case import DEFAULT_LEVEL
    from kernelforge.testing.report import failure_text, summary
    from kernelforge.testing.runner import Request, run_plugin

    request = Request(plugin, DEFAULT_LEVEL if level is None else level, op=op, variant=variant)
    report = run_plugin(default_registry(), request)
    if not report.ok:
        failed = [failure_text(report, outcome) for outcome in report.failures[:_MOST_NAMED]]
        raise AssertionError("\n\n".join([summary(report), *failed]))
