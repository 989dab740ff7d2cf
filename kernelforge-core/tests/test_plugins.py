"""The loader against real distributions, one way to be broken each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plugin_dist import IN_RANGE, Site

import kernelforge
from kernelforge.descriptors import CommandSpec, PassSpec, TunerSpec
from kernelforge.errors import KernelForgeWarning, PluginError
from kernelforge.hookspecs import hookimpl, hookspec
from kernelforge.plugins import core_registry, load_registry
from kernelforge.provenance import BUILTIN, Provenance
from kernelforge.quarantine import Quarantine
from kernelforge.registry import PluginStatus, Registry, State

TUNER = """
@hookimpl
def kernelforge_tuners():
    return [TunerSpec("{name}", "nowhere:Tuner")]
"""


@pytest.fixture
def load(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Registry]]:
    """Load the plugins of the site, and only them."""
    monkeypatch.syspath_prepend(str(site.folder))

    def load_site(**options: Any) -> Registry:
        return load_registry(entry_points=site.entry_points(), **options)

    yield load_site
    for module in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[module]


def broken(load: Callable[..., Registry], name: str, state: State, error: str) -> Registry:
    """Load, expecting plugin `name` to be left out with this state and error, said in one warning."""
    with pytest.warns(KernelForgeWarning) as caught:
        registry = load()
    assert registry.plugins[name].state == state
    assert error in registry.plugins[name].error
    assert registry.plugins[name].contributions == {}
    status = registry.plugins[name]
    assert [str(w.message) for w in caught] == [f"{status.report}; {status.remedy}"]
    return registry


def test_good_plugin_is_loaded_with_provenance(site: Site, load: Callable[..., Registry]) -> None:
    site.add("good", TUNER.format(name="mine"), version="2.1")
    registry = load()
    assert registry.tuners["mine"].provenance == Provenance("good", "acme-good", "2.1")
    status = registry.plugins["good"]
    assert (status.state, status.error, status.requires) == ("loaded", "", IN_RANGE)
    assert status.contributions == {"kernelforge_tuners": ("mine",)}
    assert status.seconds > 0


def test_plugins_are_loaded_core_first_and_then_by_name(site: Site, load: Callable[..., Registry]) -> None:
    for name in ("zeta", "core", "alpha"):
        site.add(name, TUNER.format(name=f"{name}-tuner"))
    assert list(load().plugins) == ["core", "alpha", "zeta"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys\nsys.exit(3)", "it called sys.exit(3)"),
        ("x = = 1", "SyntaxError: invalid syntax"),
        ("@hookimpl\ndef kernelforge_tuner(): return []", "no hook kernelforge_tuner: did you mean kernelforge_tuners"),
        (
            "@hookimpl\ndef kernelforge_flavours(): return []",
            "no hook kernelforge_flavours: the plugin that defines it",
        ),
        ("def kernelforge_tuners(): return []", "function kernelforge_tuners lacks the decorator @hookimpl"),
        ("@hookimpl\ndef kernelforge_tuners(device): return []", "Argument(s) {'device'} are declared in the hookimpl"),
        ("@hookimpl\ndef kernelforge_tuners(): return None", "kernelforge_tuners returned None, wants an iterable"),
        ("@hookimpl\ndef kernelforge_tuners(): return 'grid'", "kernelforge_tuners returned 'grid', wants an iterable"),
        ("@hookimpl\ndef kernelforge_tuners(): return [7]", "returned 7 among its descriptors, wants TunerSpec"),
        ("@hookimpl\ndef kernelforge_tuners(): yield PassSpec('a', 'b:c')", "among its descriptors, wants TunerSpec"),
        ("@hookimpl\ndef kernelforge_tuners(): raise ValueError('no')", "ValueError: no"),
        ("@hookimpl\ndef kernelforge_tuners(): return [TunerSpec('Bad Name', 'a:b')]", "must be kebab-case"),
        ("@hookimpl\ndef kernelforge_tuners(): return [TunerSpec('a', 7)]", "load of 'a' is 7, wants Ref"),
        (
            "@hookimpl\ndef kernelforge_tuners(): return [TunerSpec('a', 'b:c', None)]",
            "summary of 'a' is None, wants str",
        ),
        ("class Odd(BaseException): pass\nraise Odd", "Odd"),
        (TUNER.format(name="one") + TUNER.format(name="one").replace("]", "] * 2"), "'one' is already registered by"),
        ("kernelforge_hookspecs = 'no_such_specs'", "No module named 'no_such_specs'"),
        ("kernelforge_hookspecs = 'json'", "did not find any 'kernelforge' hooks in"),
    ],
)
def test_broken_plugin_is_left_out_and_others_work(
    site: Site, load: Callable[..., Registry], code: str, error: str
) -> None:
    site.add("bad", code)
    site.add("good", TUNER.format(name="mine"))
    registry = broken(load, "bad", "failed", error)
    assert list(registry.tuners) == ["mine"]


def test_failure_takes_back_the_hooks_that_were_right(site: Site, load: Callable[..., Registry]) -> None:
    site.add("bad", TUNER.format(name="mine") + "@hookimpl\ndef kernelforge_passes(): return [1]")
    registry = broken(load, "bad", "failed", "wants PassSpec")
    assert not registry.tuners
    assert not registry.passes


@pytest.mark.parametrize(
    "requires", ["kernelforge-core>=0.2", "kernelforge_core<0.1", "KernelForge.Core[testing]==9.*"]
)
def test_incompatible_plugin_is_never_run(site: Site, load: Callable[..., Registry], requires: str) -> None:
    trace = site.folder / "ran"
    site.add("future", f"open({str(trace)!r}, 'w')", requires=requires)
    broken(load, "future", "incompatible", f"this is {kernelforge.__version__}")
    assert not trace.exists()


@pytest.mark.parametrize("requires", ["", "kernelforge-core-extras>9", "kernelforge-core>9; extra == 'fast'"])
def test_plugin_without_a_range_is_loaded(site: Site, load: Callable[..., Registry], requires: str) -> None:
    site.add("free", TUNER.format(name="mine"), requires=requires)
    assert load().plugins["free"].requires == ""
    assert load().plugins["free"].state == "loaded"


def test_range_is_checked_again_when_the_requirement_changes(site: Site, load: Callable[..., Registry]) -> None:
    site.add("moving", TUNER.format(name="mine"))
    assert load().plugins["moving"].state == "loaded"
    metadata = site.folder / "acme_moving-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(IN_RANGE, "kernelforge-core>=7"))
    broken(load, "moving", "incompatible", "it wants kernelforge-core>=7")


def test_distribution_without_metadata(site: Site, load: Callable[..., Registry]) -> None:
    site.add("bare", TUNER.format(name="mine"))
    (site.folder / "acme_bare-1.0.dist-info" / "METADATA").unlink()
    assert load().plugins["bare"].distribution == "unknown distribution"
    assert load().plugins["bare"].state == "loaded"


def test_entry_points_that_cannot_be_read(site: Site) -> None:
    site.add("good", TUNER.format(name="mine"))
    site.add("torn", "")
    (site.folder / "acme_torn-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe")
    ran = site.run("plugins", "list")
    assert ran.returncode == 0
    assert "the entry points of acme-torn cannot be read: UnicodeDecodeError" in ran.stderr
    assert "good" in ran.stdout


def test_unreadable_requirement_is_incompatible(site: Site, load: Callable[..., Registry]) -> None:
    site.add("odd", "", requires="kernelforge-core >>= 1")
    broken(load, "odd", "incompatible", "its requirement 'kernelforge-core >>= 1' cannot be read")


def test_second_owner_of_a_name_is_refused_and_both_are_named(site: Site, load: Callable[..., Registry]) -> None:
    site.add("first", TUNER.format(name="mine"))
    site.add("second", TUNER.format(name="mine") + "@hookimpl\ndef kernelforge_passes(): return [PassSpec('p', 'a:b')]")
    registry = broken(load, "second", "failed", "'mine' is already registered by first (acme-first 1.0)")
    assert registry.tuners["mine"].provenance.plugin == "first"
    assert not registry.passes


def test_second_plugin_of_a_name_is_refused(site: Site, load: Callable[..., Registry]) -> None:
    site.add("twin", TUNER.format(name="a"), distribution="acme-a")
    site.add("twin", TUNER.format(name="b"), distribution="acme-b")
    registry = broken(load, "twin (acme-b)", "failed", "the name 'twin' is taken by plugin 'twin' (acme-a 1.0)")
    assert list(registry.tuners) == ["a"]


def test_allow_list(site: Site, load: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("core", "one", "two"):
        site.add(name, TUNER.format(name=name), distribution=f"acme-list-{name}")
    assert list(load(allow=["one"]).tuners) == ["core", "one"]
    monkeypatch.setenv("KERNELFORGE_PLUGINS", " two ,")
    registry = load()
    assert list(registry.tuners) == ["core", "two"]
    assert registry.plugins["one"].report == (
        "plugin 'one' (acme-list-one 1.0) is disabled: only others were asked for (--plugin, KERNELFORGE_PLUGINS)"
    )


def test_plugins_that_are_left_out(site: Site, load: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("core", TUNER.format(name="core"))
    site.add("crash", "import os\nos._exit(1)")
    assert list(load(disable=["crash", "core"]).tuners) == ["core"]
    monkeypatch.setenv("KERNELFORGE_PLUGINS_DISABLE", "other, crash")
    with pytest.warns(KernelForgeWarning, match="no plugin named 'other' is installed"):
        assert load().plugins["crash"].state == "disabled"
    with pytest.raises(PluginError, match=r"'crash' \(acme-crash 1.0\) is disabled: by KERNELFORGE_PLUGINS_DISABLE"):
        load(allow=["crash"])


def test_plugin_asked_for_by_name_must_load(site: Site, load: Callable[..., Registry]) -> None:
    site.add("bad", "import no_such_package")
    with pytest.raises(PluginError, match=r"'bad' \(acme-bad 1.0\) failed: ModuleNotFoundError"):
        load(allow=["bad"])
    with pytest.raises(PluginError, match="no plugin named 'bat' is installed") as caught:
        load(allow=["bat"])
    assert caught.value.hint == "did you mean bad?"


def test_plugin_given_as_an_object() -> None:
    class Mine:
        @hookimpl
        def kernelforge_tuners(self) -> list[TunerSpec]:
            return [TunerSpec("mine", "nowhere:Tuner")]

    registry = load_registry(entry_points=[], extra_plugins=[Mine()], disable=["Mine"])
    assert registry.tuners["mine"].provenance == Provenance("Mine", "given as an object", "")
    with pytest.raises(PluginError, match="'mine' is already registered by Mine"):
        load_registry(entry_points=[], extra_plugins=[Mine(), type("Other", (Mine,), {})()])


@dataclass(frozen=True)
class Flavour:
    name: str
    provenance: Provenance = BUILTIN


def flavour_plugins(*returned: Any) -> list[object]:
    """One plugin that brings the hook `kernelforge_flavours`, and one that uses it."""

    class Specs:
        @hookspec
        def kernelforge_flavours(self) -> list[Flavour]:
            raise AssertionError

    class User:
        @hookimpl
        def kernelforge_flavours(self) -> list[Any]:
            return list(returned)

    owner = types.ModuleType("owner")
    vars(owner)["kernelforge_hookspecs"] = [Specs()]
    return [User(), owner]


def test_hook_brought_by_a_plugin() -> None:
    registry = load_registry(entry_points=[], extra_plugins=flavour_plugins(Flavour("sweet")))
    assert [f.name for f in registry.extra("kernelforge_flavours")] == ["sweet"]
    assert registry.extra("kernelforge_flavours")[0].provenance.plugin == "User"
    assert registry.extra("kernelforge_unheard_of") == ()


@pytest.mark.parametrize("wrong", ["sweet", Flavour, TunerSpec, 3])
def test_hook_brought_by_a_plugin_wants_descriptors(wrong: object) -> None:
    with pytest.raises(PluginError, match="wants a dataclass with the fields name and provenance"):
        load_registry(entry_points=[], extra_plugins=flavour_plugins(wrong))


def test_verb_and_group_of_verbs_cannot_share_a_name() -> None:
    def plugin(name: str, group: str = "") -> object:
        class Verbs:
            @hookimpl
            def kernelforge_commands(self) -> list[CommandSpec]:
                return [CommandSpec(name, "nowhere:f", group=group)]

        return Verbs()

    verb, sub_verb = plugin("bake"), plugin("list", group="bake")
    sub_verb.__class__.__name__ = "Bakery"
    with pytest.raises(PluginError, match=r"'bake' is a verb of Verbs \(.*\), so it cannot be a group of verbs"):
        load_registry(entry_points=[], extra_plugins=[verb, sub_verb])
    with pytest.raises(PluginError, match=r"'bake' is a group of verbs of Bakery \(.*\), so it cannot be a verb"):
        load_registry(entry_points=[], extra_plugins=[sub_verb, verb])


def test_optional_hook_may_be_absent(site: Site, load: Callable[..., Registry]) -> None:
    site.add("optional", "@hookimpl(optionalhook=True)\ndef kernelforge_flavours(): return []")
    assert load().plugins["optional"].state == "loaded"


def test_core_registry_imports_no_other_plugin() -> None:
    registry = core_registry()
    assert [s.name for s in registry.plugins.values() if s.state == "loaded"] == ["core"]
    assert "plugins list" in registry.commands


# Quarantine: processes that end or hang while they import.


def crash(site: Site) -> None:
    """Run a command that a plugin ends while it is imported."""
    site.add("crash", "import os\nos._exit(77)")
    assert site.run("plugins", "list").returncode == 77


def test_plugin_that_ends_the_process_is_quarantined(site: Site) -> None:
    crash(site)
    ran = site.run("plugins", "list")
    assert ran.returncode == 0
    assert "is quarantined: its import did not end last time (process" in ran.stderr
    assert "`kernelforge plugins check crash` tests it in a process of its own" in ran.stderr
    listed = {plugin["name"]: plugin["state"] for plugin in site.run_json("plugins", "list")["data"]["plugins"]}
    assert listed["crash"] == "quarantined"
    assert listed["core"] == "loaded"


def test_check_lifts_the_quarantine_once_the_import_ends(site: Site) -> None:
    crash(site)
    ran = site.run("plugins", "check", "crash")
    assert ran.returncode == 12
    assert "crash: failed: importing it ended the process with exit code 77" in ran.stdout
    module = site.folder / "acme_crash_1_0.py"
    module.write_text(module.read_text().replace("os._exit(77)", ""))
    assert site.run("plugins", "check", "crash").stdout == "crash: loaded\n"
    assert "quarantined" not in site.run("plugins", "list").stderr


def test_another_version_is_not_quarantined(site: Site) -> None:
    crash(site)
    info = site.folder / "acme_crash-1.0.dist-info"
    (info / "METADATA").write_text((info / "METADATA").read_text().replace("1.0", "1.1"))
    assert site.run("plugins", "list").returncode == 77


def test_check_ends_an_import_that_hangs(site: Site) -> None:
    site.add("hang", "import time\ntime.sleep(600)")
    started = time.monotonic()
    ran = site.run("plugins", "check", "hang", "--timeout", "2", "--json")
    assert time.monotonic() - started < 60
    assert ran.returncode == 12
    envelope = json.loads(ran.stdout)
    assert envelope["data"]["plugins"]["hang"]["error"] == "its import did not end within 2 s"
    assert envelope["errors"][0]["message"] == "1 of 1 plugins failed: hang"
    assert "is quarantined" in site.run("passes", "list").stderr


def test_check_reports_every_plugin(site: Site) -> None:
    site.add("bad", "import no_such_package")
    site.add("future", "", requires="kernelforge-core>=7")
    site.add("loud", "print('hello')\n" + TUNER.format(name="mine"))
    states = {
        name: (r["state"], r["error"]) for name, r in site.run_json("plugins", "check")["data"]["plugins"].items()
    }
    assert states["bad"] == ("failed", "ModuleNotFoundError: No module named 'no_such_package'")
    assert states["future"][0] == "incompatible"
    assert states["loud"] == ("loaded", "")
    assert states["core"] == ("loaded", "")


def leave_marker(own_home: Path, **changed: object) -> Quarantine:
    trace = Quarantine("p", "1", "")
    trace.begin()
    (marker,) = (own_home / "plugins").iterdir()
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **changed}))
    return trace


def test_import_that_another_process_is_at_does_not_count(own_home: Path) -> None:
    assert leave_marker(own_home, pid=os.getppid()).left_over() == ""


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"time": time.time() - 3600}, {"pid": "?"}])
def test_marker_of_an_import_that_did_not_end(own_home: Path, changed: dict[str, object]) -> None:
    assert "its import did not end last time" in leave_marker(own_home, **{"pid": os.getppid(), **changed}).left_over()


def test_import_error_leaves_no_marker(site: Site, load: Callable[..., Registry], own_home: Path) -> None:
    site.add("bad", "import no_such_package")
    broken(load, "bad", "failed", "no_such_package")
    assert list((own_home / "plugins").iterdir()) == []


def test_home_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    site.add("good", TUNER.format(name="mine"))
    occupied = tmp_path / "file"
    occupied.write_text("")
    ran = site.run("plugins", "list", KERNELFORGE_HOME=str(occupied / "below"))
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert "good" in ran.stdout


CTRL_C = """
import signal
signal.raise_signal(signal.SIGINT)
"""


def test_a_plugin_that_raises_keyboard_interrupt_costs_itself_alone(site: Site) -> None:
    """Nobody pressed Ctrl-C: the verb goes on, and says whose fault it was."""
    site.add("bad", "raise KeyboardInterrupt")
    site.add("worse", "@hookimpl\ndef kernelforge_tuners():\n    raise KeyboardInterrupt\n")
    for _ in range(2):
        ran = site.run("passes", "list")
        assert ran.returncode == 0
        for name in ("bad", "worse"):
            assert f"plugin '{name}' (acme-{name} 1.0) failed: it raised KeyboardInterrupt itself" in ran.stderr
            assert f"`kernelforge plugins disable {name}` leaves it out" in ran.stderr
    assert site.run("passes", "list", "--plugin", "bad").returncode == 12
    site.add("interrupted", CTRL_C)
    assert site.run("passes", "list").returncode == 130


def test_an_import_that_is_interrupted_at_once_is_tried_again(site: Site, load: Callable[..., Registry]) -> None:
    site.add("slow", CTRL_C)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            load()


def test_an_import_that_is_interrupted_after_a_while_is_named_and_quarantined(
    site: Site, load: Callable[..., Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelforge.discovery.QUICK_S", 0.0)
    site.add("slow", CTRL_C)
    with (
        pytest.warns(
            KernelForgeWarning, match=r"interrupted while importing plugin slow \(acme-slow 1.0\): it is left out"
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        load()
    broken(load, "slow", "quarantined", "its import did not end last time")


def test_hooks_of_core_name_their_descriptor_types() -> None:
    from kernelforge import hookspecs, plugins

    assert set(plugins.DESCRIPTORS) == {name for name in vars(hookspecs) if name.startswith("kernelforge_")}


def test_status_and_specs_are_immutable() -> None:
    status = PluginStatus("a", "b", "1", "loaded")
    for frozen, attribute in ((status, "state"), (PassSpec("p", "a:b"), "name")):
        with pytest.raises(AttributeError):
            setattr(frozen, attribute, "x")


def test_probe_of_the_installed_interpreter_is_isolated() -> None:
    """The check's process must not import from the folder it happens to be started in."""
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "kernelforge.cli.plugin_probe", "core"], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout.splitlines()[-1])["state"] == "loaded"
