"""The command line itself: options, envelope, exit codes, help; verbs are tested where they live."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pytest
import typer
from plugin_dist import Site

from kernelforge import __version__, errors
from kernelforge.cli import app, output
from kernelforge.cli.output import Output, aligned
from kernelforge.descriptors import CommandSpec
from kernelforge.errors import KernelForgeWarning, PartialResult, RegressionError
from kernelforge.hookspecs import hookimpl
from kernelforge.plugins import load_registry
from kernelforge.registry import default_registry


def show(
    size: Annotated[int, typer.Option(min=1, help="How big.")] = 3,
    words: Annotated[list[str] | None, typer.Argument()] = None,
    prompt: str = "",
) -> dict[str, Any]:
    """Show what a verb is given."""
    out = output.current()
    out.table(["name", "value"], [["size", size], ["target", out.target]])
    out.note("a note")
    return {"size": size, "words": words, "target": out.target, "threads": out.threads, "prompt": prompt}


def fails() -> NoReturn:
    """Fail with something to show."""
    output.current().data = {"kept": [1, float("nan")]}
    raise RegressionError("slower", hint="look at the report")


def interrupted() -> NoReturn:
    """Stop as Ctrl-C does."""
    out = output.current()
    out.stream("text so far")
    out.data = {"text": "text so far"}
    raise KeyboardInterrupt


def partial() -> NoReturn:
    """Stop with the results saved."""
    raise PartialResult("interrupted after 3 of 5", hint="run it again to go on")


def broken() -> NoReturn:
    """Have a bug."""
    raise ZeroDivisionError("oops")


def warns() -> None:
    """Warn twice of the same."""
    print("chatter")  # noqa: T201  what a library might do
    for _ in range(2):
        warnings.warn(KernelForgeWarning("fell back to plain kernels"), stacklevel=1)


class Verbs:
    @hookimpl
    def kernelforge_commands(self) -> list[CommandSpec]:
        verbs = (show, fails, interrupted, partial, broken, warns)
        return [
            *(CommandSpec(f.__name__, f, f"Summary of {f.__name__}.") for f in verbs),
            CommandSpec("show", show, "Of a group.", group="things"),
            CommandSpec("never", "no_such_module:verb", "Never imported.", group="things"),
        ]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command line with the verbs above: exit code, stdout, stderr."""
    registry = load_registry(extra_plugins=[Verbs()])
    monkeypatch.setattr("kernelforge.registry.default_registry", lambda: registry)

    def run_line(*arguments: str) -> tuple[int, str, str]:
        code = app.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run_line
    assert output.current().command == ""


def run_json(run: Run, *arguments: str) -> tuple[int, dict[str, Any], str]:
    code, out, err = run(*arguments, "--json")
    assert out.count("\n") == 1
    return code, json.loads(out), err


def test_text_result_and_notes_go_their_own_ways(run: Run) -> None:
    assert run("show", "--size", "12") == (0, "name    value\nsize    12\ntarget  cpu\n", "a note\n")


def test_envelope(run: Run) -> None:
    code, envelope, err = run_json(run, "show", "a", "b")
    assert (code, err) == (0, "a note\n")
    assert envelope.pop("environment")["kernelforge"] == __version__
    assert envelope == {
        "schema": 1,
        "command": "show",
        "ok": True,
        "data": {"size": 3, "words": ["a", "b"], "target": "cpu", "threads": None, "prompt": ""},
        "warnings": [],
        "errors": [],
    }


@pytest.mark.parametrize(
    "line",
    [
        "--target gpu --threads 2 show --size 5",
        "show --target gpu --threads 2 --size 5",
        "show --size 5 --threads=2 --target=gpu",
        "--threads 2 show --size 5 --target gpu",
    ],
)
def test_global_options_stand_anywhere(run: Run, line: str) -> None:
    _, envelope, _ = run_json(run, *line.split())
    assert {k: envelope["data"][k] for k in ("size", "target", "threads")} == {"size": 5, "target": "gpu", "threads": 2}


def test_what_follows_two_dashes_is_the_verbs_own(run: Run) -> None:
    code, out, _ = run("show", "--", "--target", "--json")
    assert code == 0
    assert "target  cpu" in out


def test_value_that_looks_like_a_global_option(run: Run) -> None:
    _, envelope, _ = run_json(run, "show", "--prompt=--target")
    assert envelope["data"]["prompt"] == "--target"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--threads none show", "--threads takes a number of at least 1, got 'none'"),
        ("show --threads 0", "--threads takes a number of at least 1, got '0'"),
        ("show --target", "--target needs a value"),
        ("show --target=", "--target needs a value"),
        ("--nope show", "unknown option '--nope'"),
        ("show --nope", "No such option: --nope"),
        ("show --size zero", "Invalid value for '--size'"),
        ("show --size 0", "Invalid value for '--size'"),
        ("shwo", "there is no verb 'shwo'\nhint: did you mean show?"),
        ("things", "'things' needs a verb\nhint: one of: never, show"),
        ("things shwo", "'things' has no verb 'shwo'\nhint: one of: never, show"),
        ("qqq", "there is no verb 'qqq'\nhint: kernelforge --help lists the verbs"),
    ],
)
def test_usage_errors(run: Run, line: str, error: str) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert error in err
    code, envelope, _ = run_json(run, *line.split())
    assert (code, envelope["ok"], envelope["errors"][0]["exit_code"]) == (2, False, 2)


def test_usage_error_of_a_verb_points_at_its_help(run: Run) -> None:
    assert run("things", "show", "--nope")[2].endswith("hint: kernelforge things show --help\n")


def test_verb_of_a_package_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_registry(entry_points=[])
    monkeypatch.setattr("kernelforge.registry.default_registry", lambda: registry)
    code, _, err = run("llm-inference", "--prompt", "x")
    assert code == 2
    assert "error: 'llm-inference' comes with kernelforge-llm, which is not installed\n" in err
    assert err.endswith("hint: pip install kernelforge-llm\n")


def test_plugin_option_holds_for_this_command_only(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site.add("other", "")
    monkeypatch.syspath_prepend(str(site.folder))
    default_registry.cache_clear()
    assert app.main(["plugins", "info", "other", "--plugin", "core"]) == 0
    assert "state         disabled: only others were asked for" in capsys.readouterr().out
    assert app.main(["plugins", "info", "other"]) == 0
    assert "state         loaded" in capsys.readouterr().out
    default_registry.cache_clear()


def test_unknown_verb_names_the_plugins_that_failed(site: Site) -> None:
    site.add("bad", "import no_such_package")
    ran = site.run("frobnicate")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[0] == (
        "warning: plugin 'bad' (acme-bad 1.0) failed: ModuleNotFoundError: No module named 'no_such_package'; "
        "`kernelforge plugins disable bad` leaves it out"
    )
    assert "(plugins that are not loaded may have it: bad)" in ran.stderr


def test_failure_keeps_what_it_has_to_show(run: Run) -> None:
    code, envelope, err = run_json(run, "fails")
    assert code == 14
    assert envelope["data"] == {"kept": [1, None]}
    assert envelope["errors"] == [
        {"type": "RegressionError", "message": "slower", "hint": "look at the report", "exit_code": 14}
    ]
    assert err == "error: slower\nhint: look at the report\n"


def test_interruption_keeps_the_text(run: Run) -> None:
    assert run("interrupted") == (130, "text so far", "interrupted\n")
    code, envelope, _ = run_json(run, "interrupted")
    assert (code, envelope["ok"], envelope["data"]) == (130, False, {"text": "text so far"})


def test_partial_result(run: Run) -> None:
    assert run("partial")[0] == 15


def test_bug_is_short_unless_debugging(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("broken")
    assert (code, out) == (1, "")
    assert err == "error: ZeroDivisionError: oops\nhint: set KERNELFORGE_DEBUG=1 to see where it happened\n"
    monkeypatch.setenv("KERNELFORGE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("broken")


def test_warnings_are_said_once_and_kept(run: Run) -> None:
    code, envelope, err = run_json(run, "warns")
    assert code == 0
    assert envelope["warnings"] == ["fell back to plain kernels"]
    assert err == "chatter\nwarning: fell back to plain kernels\n"


def test_exit_codes_are_those_of_the_documentation() -> None:
    codes = {
        name: error.exit_code
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.KernelForgeError)
    }
    assert codes == {
        "KernelForgeError": 1,
        "UsageError": 2,
        "WrongResultError": 10,
        "DeviceError": 11,
        "PluginError": 12,
        "AssetError": 13,
        "RegressionError": 14,
        "PartialResult": 15,
    }


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"kernelforge {__version__}\n", "")


@pytest.mark.parametrize("line", ["", "--help", "-h"])
def test_help_lists_every_verb_from_its_summary(run: Run, line: str) -> None:
    code, out, _ = run(*line.split())
    assert code == 0
    assert re.search(r"^  show +Summary of show\.$", out, re.MULTILINE)
    assert re.search(r"^  things never +Never imported\.$", out, re.MULTILINE)
    assert "--target NAME" in out


def test_help_of_a_group(run: Run) -> None:
    code, out, _ = run("things", "--help")
    assert code == 0
    assert "things show" in out
    assert "plugins list" not in out


def test_help_of_a_verb(run: Run) -> None:
    code, out, _ = run("things", "show", "--help")
    assert code == 0
    assert "Usage: kernelforge things show [OPTIONS]" in out
    assert "How big." in out
    assert "Global options" in out


def test_every_verb_has_a_summary_and_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for key, spec in default_registry().commands.items():
        assert spec.summary.endswith("."), key
        assert app.main([*key.split(), "--help"]) == 0, key
        assert f"Usage: kernelforge {key}" in capsys.readouterr().out


def test_plugin_option_limits_what_is_loaded(site: Site) -> None:
    site.add("good", "")
    listed = site.run_json("--plugin", "good", "plugins", "list")["data"]["plugins"]
    assert sorted(p["name"] for p in listed if p["state"] == "loaded") == ["core", "good"]
    ran = site.run("plugins", "list", "--plugin", "godo")
    assert ran.returncode == 12
    assert ran.stderr == "error: no plugin named 'godo' is installed\nhint: did you mean good?\n"


def test_plugins_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["plugins", "info", "core"]) == 0
    out = capsys.readouterr().out
    assert "distribution  kernelforge-core" in out
    assert "  plugins info\n" in out
    assert app.main(["plugins", "info", "cores"]) == 2


def test_cache_is_cleared_and_records_stay(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_home / "cache" / "objects").mkdir(parents=True)
    (own_home / "cache" / "objects" / "a.o").write_bytes(b"x" * 2048)
    (own_home / "cache" / "note").write_bytes(b"y")
    (own_home / "autotune.jsonl").write_text("{}\n")
    assert app.main(["cache", "info"]) == 0
    assert "2 files, 2.001 KiB" in capsys.readouterr().out
    assert app.main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["bytes"] == 2049
    assert list((own_home / "cache").iterdir()) == []
    assert (own_home / "autotune.jsonl").exists()


def test_doctor(capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    assert app.main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["devices"]["reference"]
    assert data["machine"]["cores"] >= 1
    assert data["state"]["home"] == str(own_home)
    assert data["versions"]["kernelforge"] == __version__
    assert app.main(["doctor"]) == 0
    told = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    assert f"versions  {told}\n" in capsys.readouterr().out


def test_doctor_reports_a_failing_backend_and_goes_on(site: Site) -> None:
    site.add("sick", "@hookimpl\ndef kernelforge_backends(): return [BackendSpec('sick', 'no_such_package:B')]")
    ran = site.run("doctor")
    assert ran.returncode == 0
    assert "problem: target 'sick' of plugin sick (acme-sick 1.0) cannot be loaded: ModuleNotFoundError" in ran.stdout


def test_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "kernelforge", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ran:
        assert ran.stdout is not None
        assert ran.stderr is not None
        ran.stdout.close()
        assert ran.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("more", ["", "--json"])
def test_full_disk_is_told_once(more: str) -> None:
    with Path("/dev/full").open("w") as full:
        line = [sys.executable, "-m", "kernelforge", "--version", *more.split()]
        ran = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_null(closed: str) -> None:
    line = f"{sys.executable} -m kernelforge --version {closed}"
    ran = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_ctrl_c_while_the_command_is_imported_is_quiet() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "kernelforge.cli.output":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from kernelforge.__main__ import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


def test_no_garbage_is_looked_for_at_the_end() -> None:
    code = (
        "import atexit, gc, sys; from kernelforge.cli.app import console_script; sys.argv = ['kernelforge', '--version'];"
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000 > len(gc.get_objects()))); console_script()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["True"]


def test_verb_outside_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(size=4)["size"] == 4
    assert "size    4" in capsys.readouterr().out


def test_table_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(["kernel", "ms"], [["a", 1.0], ["longer", 12.34567], ["none", 100]])
    assert capsys.readouterr().out == "kernel     ms\na           1\nlonger  12.35\nnone      100\n"
    assert aligned(["a", "b"], [["x", None], ["long", 2]]) == "a     b\nx\nlong  2"
    Output().table(["nothing"], [])
    assert capsys.readouterr().out == "nothing\n"


def test_progress_is_drawn_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress("work", total=2) as bar:
        bar.advance(say="one")
    assert capsys.readouterr() == ("", "")


def test_envelope_takes_what_numpy_returns() -> None:
    import numpy as np

    out = Output("c", json=True)
    out.data = {"a": np.float32(1.5), "b": np.arange(2), "c": {Path("x")}, "d": (np.inf,), "e": {1: None}}
    data = json.loads(out.envelope([]))["data"]
    assert data == {"a": 1.5, "b": [0, 1], "c": ["x"], "d": [None], "e": {"1": None}}


def test_core_verbs_are_found_without_importing_plugins(site: Site) -> None:
    trace = site.folder / "ran"
    site.add("spy", f"open({str(trace)!r}, 'w')")
    assert site.run("cache", "info").returncode == 0
    assert not trace.exists()
    assert site.run("plugins", "list").returncode == 0
    assert trace.exists()


def test_unknown_plugin_for_check(run: Run) -> None:
    code, _, err = run("plugins", "check", "nothing")
    assert code == 2
    assert "unknown plugin 'nothing'" in err
