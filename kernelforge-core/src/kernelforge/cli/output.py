"""What a verb talks to. How to write a verb:

    # my_package/plugin.py
    @hookimpl
    def kernelforge_commands():
        return [CommandSpec("flops", load="my_package.verbs:flops", summary="Count the operations of a matmul.")]

    # my_package/verbs.py
    def flops(
        m: Annotated[int, typer.Option(help="Rows of the left operand.")] = 512,
        n: Annotated[int, typer.Option(help="Columns of the right operand.")] = 512,
    ) -> dict[str, object]:
        \"\"\"Count the operations of a matmul.\"\"\"
        out = output.current()
        flops = 2 * m * n
        out.print(f"{flops} flops on {out.target}")
        return {"flops": flops}

A verb is a function with typer annotations (so its module must not have `from __future__ import annotations` with names
that only exist under TYPE_CHECKING). It

- prints its result with `out.print`, `out.stream` (pieces, no newline) and `out.table`: stdout, nothing with --json;
- returns the same result as a dict of plain values: `data` of the JSON envelope (None: whatever is in `out.data`);
- says everything else with `out.note`, `out.warn` and `out.progress`: stderr;
- reads the global options from `out.target`, `out.device`, `out.threads`, and the plugins from `out.registry`;
  `kernelforge.cli.options.open_session` is a session of what they say;
- fails by raising a `KernelForgeError`: its class decides the exit code. A verb that fails with something to show (a
  regression, an interruption) puts that into `out.data` before it raises; KeyboardInterrupt likewise keeps `out.data`.

`warnings.warn(KernelForgeWarning(...))` anywhere below a verb ends up on stderr once, and in the envelope.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kernelforge import __version__
from kernelforge.errors import KernelForgeError

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.session import Session

SCHEMA = 1
"""Version of the JSON envelope; it changes when a field is removed or changes its meaning."""

DEFAULT_TARGET = "cpu"
"""Where verbs run that are not told otherwise."""


class Progress(Protocol):
    """A running progress bar."""

    def advance(self, steps: float = 1, *, say: str | None = None) -> None:
        """Move on by `steps`; `say` replaces the text behind the bar."""
        ...


class Output:
    """One run of a verb: its global options, its streams, its warnings, its data."""

    def __init__(
        self,
        command: str = "",
        *,
        json: bool = False,
        target: str | None = None,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        self.command = command
        self.json = json
        self.requested_target = target
        """What `--target` was given; None when it was not."""
        self.threads = threads
        """What `--threads` was given; None lets the backend decide."""
        self.device = device
        """What `--device` was given; None: the target's first."""
        self.kernels: list[str] = []
        """What `--kernel` was given, each "op=variant"."""
        self.without_passes: list[str] = []
        """What `--without-pass` was given."""
        self.session: Session | None = None
        """The one that `open_session` opened."""
        self.data: dict[str, Any] = {}
        """`data` of the envelope; what the verb returns replaces it."""
        self.warnings: list[str] = []
        self._stdout = sys.stdout

    @property
    def target(self) -> str:
        return self.requested_target or DEFAULT_TARGET

    @property
    def registry(self) -> Registry:
        """What the installed plugins bring. Raises PluginError when one that was asked for by name fails."""
        from kernelforge.registry import default_registry

        return default_registry()

    # The result: stdout, only in text mode.

    def print(self, text: str = "") -> None:
        """Print a line of the result."""
        self.stream(text + "\n")

    def stream(self, piece: str) -> None:
        """Print a piece of the result at once, without a newline."""
        if not self.json:
            self._write(piece)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print aligned columns; columns of numbers are right-aligned."""
        if not self.json:
            self.print(aligned(headers, rows))

    # Everything else: stderr.

    def note(self, message: str) -> None:
        """Say something that is not part of the result."""
        sys.stderr.write(message + "\n")
        sys.stderr.flush()

    def warn(self, message: str) -> None:
        """Say what the user should know, once; it is kept for the envelope."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.note(f"warning: {message}")

    @contextmanager
    def progress(self, label: str, total: float) -> Iterator[Progress]:
        """A progress bar of `total` steps while the block runs: drawn only when stderr is a terminal."""
        if not sys.stderr.isatty():
            yield _NoProgress()
            return
        from rich.console import Console
        from rich.progress import Progress as RichProgress

        with RichProgress(console=Console(stderr=True), transient=True) as bar:
            yield _RichProgress(bar, bar.add_task(label, total=total), label)

    def envelope(self, errors: Sequence[Mapping[str, Any]]) -> str:
        """The JSON envelope. Numbers that JSON cannot write (nan, inf) become null."""
        document = {
            "schema": SCHEMA,
            "command": self.command,
            "ok": not errors,
            "data": self.data,
            "warnings": self.warnings,
            "errors": list(errors),
            "environment": environment(),
        }
        return json.dumps(_plain(document), ensure_ascii=True, allow_nan=False)

    def write_envelope(self, errors: Sequence[Mapping[str, Any]]) -> None:
        self._write(self.envelope(errors) + "\n")

    def discard(self) -> None:
        """Send stdout, which takes no more, to the null device: what is left in its buffer cannot be written either, not even
        by the interpreter's exit."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())

    def _write(self, text: str) -> None:
        """Raises BrokenPipeError where the reader is gone, KernelForgeError where stdout takes no more, as on a full disk."""
        try:
            self._stdout.write(text)
            self._stdout.flush()
        except OSError as error:
            self.discard()
            if isinstance(error, BrokenPipeError):
                raise
            raise KernelForgeError(f"standard output cannot be written: {error.strerror}") from None


def aligned(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text: `Output.table` prints it, `Output.note` takes it to stderr."""
    body = [list(row) for row in rows]
    cells = [list(headers), *([_cell(value) for value in row] for row in body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [bool(body) and all(isinstance(v, (int, float)) for v in column) for column in zip(*body, strict=True)]
    numeric = numeric or [False] * len(headers)
    lines = []
    for row in cells:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def describe(error: BaseException, exit_code: int) -> dict[str, Any]:
    """An entry of the envelope's `errors`."""
    hint = error.hint if isinstance(error, KernelForgeError) else None
    kind = type(error).__name__
    return {"type": kind, "message": str(error) or kind, "hint": hint, "exit_code": exit_code}


def environment() -> dict[str, Any]:
    """Where this ran, as far as it can be told without loading anything heavy."""
    import platform

    return {
        "kernelforge": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


_current: Output | None = None


def current() -> Output:
    """The output of the running verb; outside of the command line, one that prints text."""
    return _current or Output()


@contextmanager
def use(output: Output) -> Iterator[Output]:
    """Make `output` the current one."""
    global _current
    previous, _current = _current, output
    try:
        yield output
    finally:
        _current = previous


class _NoProgress:
    def advance(self, steps: float = 1, *, say: str | None = None) -> None:
        """Nothing is drawn."""


class _RichProgress:
    def __init__(self, bar: Any, task: Any, label: str) -> None:
        self._bar, self._task, self._label = bar, task, label

    def advance(self, steps: float = 1, *, say: str | None = None) -> None:
        description = None if say is None else f"{self._label} {say}"
        self._bar.update(self._task, advance=steps, description=description)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    """`value` in the types that JSON has: numpy scalars and arrays, paths, sets and tuples included."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [_plain(item) for item in sorted(value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
