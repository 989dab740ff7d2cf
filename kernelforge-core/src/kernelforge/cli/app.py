"""The `kernelforge` command: read the global options, find the verb, import it, run it, report how it ended.

Verbs are found in the registry by name; only the one that runs is imported, and typer only when one runs. Verbs of core
are found before any other plugin is imported, so that `plugins check` works when a plugin breaks the process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kernelforge import __version__, registry
from kernelforge.cli.output import Output, describe, use
from kernelforge.cli.streams import collected_warnings, open_closed_streams, quiet_stdout, reserve_stdout
from kernelforge.errors import KernelForgeError, PluginError, UsageError
from kernelforge.home import env_flag
from kernelforge.interruption import ending

if TYPE_CHECKING:
    from kernelforge.descriptors import CommandSpec

GC_THRESHOLD = (100_000, 20, 50)
"""What a start makes, some 70,000 objects, lives to its end: looking through it for garbage once costs 30 ms."""

FIRST_PARTY_VERBS = {
    "llm-inference": "kernelforge-llm",
    "llm-bench": "kernelforge-llm",
    "llm-eval": "kernelforge-llm",
    "llm-quantize": "kernelforge-llm",
    "llm-export": "kernelforge-llm",
}
"""Verbs that a user may know from the documentation, and the distribution each comes with."""

GLOBAL_OPTIONS = """\
global options, before or after the verb:
  --target NAME        where to run: cpu, gpu, reference, or what a plugin adds (default: cpu)
  --device NAME        which of the target's devices: a name that doctor lists, or for GPUs a part of it
  --threads N          how many threads the target may use
  --kernel OP=VARIANT  run an op by this kernel where it can, and no fused op in its place (may be repeated)
  --without-pass NAME  leave this pass out, such as fuse-rope-attention (may be repeated)
  --json               print one JSON document on stdout, and nothing else
  --plugin NAME        load only this plugin besides core (may be repeated)
  --help               say what a verb does and takes
  --version            print the version"""


def split_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The verb and what is its own, and the values of the global options, taken from wherever they stand before a `--`.

    Raises UsageError for an option without its value. A value that looks like a global option belongs to its own option
    only when it is joined to it: `--prompt=--json`.
    """
    words: list[str] = []
    names = ("--target", "--device", "--threads", "--kernel", "--without-pass", "--plugin")
    values: dict[str, list[str]] = {name: [] for name in names}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, joined, value = word.partition("=")
        if word == "--":
            words += [word, *rest]
            break
        if name in values:
            if not joined and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if not value:
                raise UsageError(f"{name} needs a value")
            values[name].append(value)
        elif word != "--json":  # which is known already: an error in the rest must be reported as JSON too
            words.append(word)
    return words, values


def _thread_count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"--threads takes a number of at least 1, got '{text}'")
    return int(text)


def wants_json(arguments: Sequence[str]) -> bool:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = Output(json=wants_json(given))
    try:
        with use(out), collected_warnings(out), quiet_stdout(out):
            code, errors = _run_reported(given, out)
        if out.json:
            out.write_envelope(errors)
    except KernelForgeError as error:
        return _failed(error, out)[0]
    except BrokenPipeError:
        out.discard()  # its reader is gone (`| head`), also where a verb printed past `out`
        return 1
    return code


def console_script() -> None:
    """The entry point of the `kernelforge` script."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Generated text may hold characters that a console's code page lacks.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper in a started process
    json = wants_json(sys.argv[1:])
    if json:
        reserve_stdout()
    gc.set_threshold(*GC_THRESHOLD)
    code = main()
    if json:
        sys.stdout = sys.stderr  # the document is out: what code of plugins prints at exit is none of it
    gc.freeze()  # the interpreter would look through all of it for garbage on its way out, for a fifth of a start's time
    sys.exit(code)


def _run_reported(given: Sequence[str], out: Output) -> tuple[int, list[dict[str, Any]]]:
    """Run; turn whatever is raised into an exit code and the entries of the envelope's `errors`."""
    try:
        return _run(given, out), []
    except KernelForgeError as error:
        return _failed(error, out)
    except KeyboardInterrupt as error:
        told, code = ending()
        out.note(told)
        return code, [describe(error, code)]
    except BrokenPipeError:
        raise
    except MemoryError as error:
        return _failed(KernelForgeError(f"out of memory: {error}", hint="ask for smaller sizes"), out)
    except Exception as error:
        if env_flag("KERNELFORGE_DEBUG"):
            raise
        out.note(f"error: {type(error).__name__}: {error}\nhint: set KERNELFORGE_DEBUG=1 to see where it happened")
        return 1, [describe(error, 1)]


def _failed(error: KernelForgeError, out: Output) -> tuple[int, list[dict[str, Any]]]:
    out.note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
    return error.exit_code, [describe(error, error.exit_code)]


def _run(given: Sequence[str], out: Output) -> int:
    words, options = split_options(given)
    out.requested_target = options["--target"][-1] if options["--target"] else None
    out.device = options["--device"][-1] if options["--device"] else None
    out.threads = _thread_count(options["--threads"][-1]) if options["--threads"] else None
    out.kernels, out.without_passes = options["--kernel"], options["--without-pass"]
    with _only_plugins(options["--plugin"]):
        if options["--plugin"] and words[:1] != ["plugins"]:
            _ = out.registry  # one that was asked for by name must load, also where the verb needs none
        code = _dispatch(words, out)
        _tell_unused(out)
        return code


def _tell_unused(out: Output) -> None:
    """Warn of kernels and passes that were named in vain."""
    if out.session is not None:
        for op, name in out.session.unused_variants.items():
            hint = "--without-pass leaves out a pass that makes it part of another op"
            out.warn(f"--kernel {op}={name}: nothing ran {op}; {hint}")
    elif out.kernels or out.without_passes:
        option = "--kernel" if out.kernels else "--without-pass"
        out.warn(f"{option} has no effect on '{out.command}'")


def _dispatch(words: Sequence[str], out: Output) -> int:
    if words and words[0] == "--version":
        out.command = "--version"
        out.print(f"kernelforge {__version__}")
        out.data = {"version": __version__}
        return 0
    if not words or words[0] in ("--help", "-h"):
        out.command = "--help"
        _print_help(out, out.registry.commands.values())
        return 0
    if words[0].startswith("-"):
        raise UsageError(
            f"unknown option '{words[0]}'", hint="kernelforge --help lists the global options and the verbs"
        )
    found = _find(words, out)
    if isinstance(found, str):
        out.command = found
        subset = [spec for spec in out.registry.commands.values() if spec.group == found]
        if not any(word in ("--help", "-h") for word in words):
            names = ", ".join(sorted(spec.name for spec in subset))
            raise UsageError(f"'{found}' needs a verb", hint=f"one of: {names}")
        _print_help(out, subset)
        return 0
    out.command = f"{found.group} {found.name}".strip()
    return _run_verb(found, words[2 if found.group else 1 :], out)


def _find(words: Sequence[str], out: Output) -> CommandSpec | str:
    """The verb that `words` begin with, or the name of a group of verbs when they name only that."""
    from kernelforge.plugins import core_registry

    for loaded in (core_registry, registry.default_registry):
        commands = loaded().commands
        for key in (" ".join(words[:2]), words[0]):
            if key in commands:
                return commands[key]
        sub_verbs = [spec.name for spec in commands.values() if spec.group == words[0]]
        if sub_verbs and (len(words) == 1 or words[1] in ("--help", "-h")):
            return words[0]
    raise _unknown_verb(words, out)


def _unknown_verb(words: Sequence[str], out: Output) -> KernelForgeError:
    verb = words[0]
    commands, statuses = out.registry.commands.values(), out.registry.plugins.values()
    sub_verbs = [spec.name for spec in commands if spec.group == verb]
    if sub_verbs:
        return UsageError(f"'{verb}' has no verb '{words[1]}'", hint=f"one of: {', '.join(sorted(sub_verbs))}")
    distribution = FIRST_PARTY_VERBS.get(verb)
    if distribution is not None:
        for status in statuses:
            if status.distribution == distribution:
                return PluginError(f"'{verb}' is not there: {status.report}", hint=status.remedy or None)
        return UsageError(
            f"'{verb}' comes with {distribution}, which is not installed", hint=f"pip install {distribution}"
        )
    near = registry.did_you_mean(verb, {spec.group or spec.name for spec in commands})
    hint = near or "kernelforge --help lists the verbs"
    return UsageError(f"there is no verb '{verb}'", hint=hint + out.registry.perhaps_theirs)


def _print_help(out: Output, commands: Iterable[CommandSpec]) -> None:
    specs = sorted(commands, key=lambda spec: (spec.group or spec.name, spec.group and spec.name))
    names = [f"{spec.group} {spec.name}".strip() for spec in specs]
    width = max(map(len, names), default=0)
    out.print("usage: kernelforge [GLOBAL OPTIONS] VERB [OPTIONS]\n\nverbs:")
    for name, spec in zip(names, specs, strict=True):
        out.print(f"  {name:<{width}}   {spec.summary}".rstrip())
    out.print(f"\n{GLOBAL_OPTIONS}")
    out.data = {"verbs": dict(zip(names, (spec.summary for spec in specs), strict=True))}


def _run_verb(spec: CommandSpec, arguments: Sequence[str], out: Output) -> int:
    """Import the verb and let typer parse its arguments. Raises UsageError for arguments that it refuses."""
    import typer
    from typer.main import get_command

    from kernelforge.cli.plain_values import PlainCommand
    from kernelforge.lazy import resolve

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    epilog = "Global options (--target, --device, --threads, --kernel, --json, ...): see kernelforge --help"
    app.command(name=spec.name, cls=PlainCommand, epilog=epilog)(resolve(spec.load))
    command = get_command(app)
    try:
        # Not command.main: it turns interruptions and closed pipes into exit codes of its own.
        with command.make_context(f"kernelforge {out.command}", list(arguments)) as context:
            result = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        raise UsageError(error.format_message(), hint=f"kernelforge {out.command} --help") from None
    if result is not None:
        out.data = dict(result)
    return 0


@contextlib.contextmanager
def _only_plugins(names: Sequence[str]) -> Iterator[None]:
    """With names: whatever is loaded meanwhile, here or in a process started here, is only these plugins and core."""
    if not names:
        yield
        return
    variable = "KERNELFORGE_PLUGINS"
    before = os.environ.get(variable)
    os.environ[variable] = ",".join(names)
    registry.default_registry.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})
        registry.default_registry.cache_clear()
