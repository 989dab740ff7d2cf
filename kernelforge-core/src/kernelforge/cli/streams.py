"""The standard streams of a command: stdout is for its result, stderr for all else, whatever plugins, native code and child
processes print."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from kernelforge.errors import KernelForgeWarning

if TYPE_CHECKING:
    from kernelforge.cli.output import Output


def open_closed_streams() -> None:
    """A process may be started without standard streams (`>&-`, services): the null device takes their places, so that
    no file of ours does."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def reserve_stdout() -> None:
    """Keep standard output for the envelope: what native code and child processes write there goes to stderr."""
    with contextlib.suppress(OSError):  # one of them is closed
        kept = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: PTH123, SIM115


@contextlib.contextmanager
def collected_warnings(out: Output) -> Iterator[None]:
    """Send KernelForgeWarnings to `out`; others take their usual way."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", KernelForgeWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, KernelForgeWarning):
                out.warn(str(message))
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def quiet_stdout(out: Output) -> contextlib.AbstractContextManager[Any]:
    """In --json mode, what anything prints on stdout goes to stderr: stdout is for the envelope alone."""
    return contextlib.redirect_stdout(sys.stderr) if out.json else contextlib.nullcontext()
