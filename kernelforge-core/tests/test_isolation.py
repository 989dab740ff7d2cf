"""Broken plugins in real processes: every verb works, the culprit is named, and the user can do without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_time import child_seconds
from plugin_dist import HEADER, Site

GOOD = """
@hookimpl
def kernelforge_tuners():
    return [TunerSpec("good", "nowhere:Tuner")]
"""

BROKEN = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("import sys\nsys.exit(0)", "it called sys.exit(0)"),
    "missing": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "half": (GOOD + "@hookimpl\ndef kernelforge_passes(): raise OSError('no disk')", "OSError: no disk"),
    "wrong-type": (
        "@hookimpl\ndef kernelforge_passes(): return [7]",
        "returned 7 among its descriptors, wants PassSpec",
    ),
    "wrong-field": ("@hookimpl\ndef kernelforge_commands(): return [CommandSpec('x', 'a:b', 3)]", "wants str"),
    "misspelt": (
        "@hookimpl\ndef kernelforge_kernel(): return []",
        "no hook kernelforge_kernel: did you mean kernelforge_kernels",
    ),
    "twice": (
        "@hookimpl\ndef kernelforge_tuners(): return [TunerSpec('grid', 'a:b')]",
        "'grid' is already registered by core",
    ),
    "takes-stdout": ("import sys\nsys.stdout = None\nraise ValueError('x')", "ValueError: x"),
}
"""Plugins by name: their code, and what is said of it."""

LAZY = """
from kernelforge.variant import KernelVariant

@hookimpl
def kernelforge_kernels():
    return [KernelVariant("lazy", "transformer.matmul", "reference", "nowhere:build", supports="no_such:f", priority=9)]

@hookimpl
def kernelforge_dialects():
    return [DialectSpec("lazy", "no_such:OPS")]

@hookimpl
def kernelforge_importers():
    return [ImporterSpec("lazy", "no_such:Importer")]

@hookimpl
def kernelforge_backends():
    return [BackendSpec("lazy", "no_such:Backend")]
"""
"""A plugin that loads, and of which nothing works."""

WHY = ("why", "matmul", "--m", "2", "--n", "3", "--k", "4", "--target", "reference")


def add_broken(site: Site) -> None:
    for name, (code, _) in BROKEN.items():
        site.add(name, code)
    site.add("future", GOOD, requires="kernelforge-core>=7")
    site.add("lazy", LAZY)


def test_every_verb_works_beside_broken_plugins(site: Site) -> None:
    add_broken(site)
    for line in (["--help"], ["passes", "list"], ["cache", "info"], ["doctor"], [*WHY], ["records", "list"]):
        ran = site.run(*line)
        assert ran.returncode == 0, (line, ran.stderr)
        assert ran.stdout.strip(), line
    listed = site.run("plugins", "list")
    assert listed.returncode == 0
    for name, (_, reason) in {**BROKEN, "future": ("", "it wants kernelforge-core>=7")}.items():
        told = listed.stdout.partition(f"\n{name}: ")[2].splitlines()
        assert reason in told[0], name
        assert told[1] == f"  `kernelforge plugins disable {name}` leaves it out"
        assert f"plugin '{name}' (acme-{name} 1.0)" in listed.stderr


def test_what_fails_later_is_left_out_and_named(site: Site) -> None:
    site.add("lazy", LAZY)
    told = site.run(*WHY).stderr
    for part in ("dialect 'lazy'", "variant 'reference/transformer.matmul/lazy'"):
        assert f"{part} of plugin lazy (acme-lazy 1.0) is left out: ModuleNotFoundError" in told
    envelope = site.run_json(*WHY, "--variant", "lazy")
    assert envelope["errors"][0]["exit_code"] == 12
    assert envelope["errors"][0]["hint"] == "`kernelforge plugins disable lazy` leaves it out"
    assert site.run(*WHY, KERNELFORGE_PLUGINS_STRICT="1").returncode == 12
    model = site.run("why", "--model", "no-such-model", "--target", "reference")
    assert model.returncode == 13
    assert "importer 'lazy' of plugin lazy (acme-lazy 1.0) is left out: ModuleNotFoundError" in model.stderr


@pytest.mark.parametrize("name", ["exits", "half", "future"])
def test_broken_plugin_asked_for_by_name_is_an_error(site: Site, name: str) -> None:
    add_broken(site)
    ran = site.run("cache", "info", "--plugin", name)
    assert ran.returncode == 12
    assert f"error: plugin '{name}' (acme-{name} 1.0) " in ran.stderr
    assert f"hint: `kernelforge plugins disable {name}` leaves it out" in ran.stderr


def test_strict_mode_ends_with_what_is_broken(site: Site) -> None:
    assert site.run("--help", KERNELFORGE_PLUGINS_STRICT="1").returncode == 0
    site.add("raises", BROKEN["raises"][0])
    site.add("future", GOOD, requires="kernelforge-core>=7")
    ran = site.run("--help", KERNELFORGE_PLUGINS_STRICT="1")
    assert ran.returncode == 12
    assert "plugin 'future' (acme-future 1.0) is incompatible: " in ran.stderr
    assert "plugin 'raises' (acme-raises 1.0) failed: ZeroDivisionError" in ran.stderr
    assert site.run("--help", KERNELFORGE_PLUGINS_STRICT="0").returncode == 0
    for name in ("raises", "future"):
        assert site.run("plugins", "disable", name, KERNELFORGE_PLUGINS_STRICT="1").returncode == 0
    assert site.run("--help", KERNELFORGE_PLUGINS_STRICT="1").returncode == 0


LOUD = """
import os, subprocess, sys
import atexit
print("said by print")
atexit.register(print, "said at exit")
os.write(1, b"said by write\\n")
subprocess.run([sys.executable, "-c", "print('said by a child')"])
"""


def test_chatter_of_an_import_stays_out_of_the_result(site: Site) -> None:
    site.add("loud", LOUD)
    assert site.run_json("passes", "list")["ok"]
    ran = site.run("passes", "list", "--json")
    assert ran.stdout.count("\n") == 1
    assert all(f"said by {what}" in ran.stderr for what in ("print", "write", "a child"))
    assert "said at exit" in ran.stderr
    text = site.run("passes", "list")
    assert "said by print" in text.stderr
    assert "said by print" not in text.stdout


# Disabled by the user.


def test_disabling_needs_no_import(site: Site) -> None:
    site.add("crash", "import os\nos.abort()")
    assert site.run("plugins", "disable", "crash").stdout == (
        "crash is disabled; `kernelforge plugins enable crash` brings it back\n"
    )
    listed = site.run("plugins", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    info = site.run("plugins", "info", "crash").stdout
    assert "disabled: by `kernelforge plugins disable`\n              `kernelforge plugins enable crash` brings" in info
    wanted = site.run("plugins", "list", "--plugin", "crash")
    assert wanted.returncode == 12
    assert "hint: `kernelforge plugins enable crash` brings it back" in wanted.stderr
    assert site.run("plugins", "enable", "crash").stdout == "crash is enabled\n"
    assert site.run("passes", "list").returncode != 0


def test_disabling_again_and_enabling_what_was_not(site: Site, own_home: Path) -> None:
    site.add("good", GOOD)
    for _ in range(2):
        assert site.run_json("plugins", "disable", "good")["data"] == {"plugin": "good", "disabled": True}
    assert [file.name for file in (own_home / "plugins").glob("*.disabled")] == ["good.disabled"]
    changes = [site.run_json("plugins", "enable", "good")["data"]["changed"] for _ in range(2)]
    assert changes == [True, False]
    envelope = site.run_json("plugins", "enable", "good", KERNELFORGE_PLUGINS_DISABLE="good")
    assert envelope["warnings"] == ["KERNELFORGE_PLUGINS_DISABLE still leaves it out"]


def test_plugin_that_is_gone_can_still_be_enabled(site: Site, own_home: Path) -> None:
    (own_home / "plugins").mkdir()
    (own_home / "plugins" / "gone.disabled").touch()
    assert site.run("plugins", "enable", "gone").stdout == "gone is enabled\n"


@pytest.mark.parametrize("verb", ["disable", "enable", "retry"])
def test_verbs_for_a_plugin_that_is_not_there(site: Site, verb: str) -> None:
    site.add("good", GOOD)
    ran = site.run("plugins", verb, "godo")
    assert ran.returncode == 2
    assert ran.stderr == "error: unknown plugin 'godo'\nhint: did you mean good?\n"


def test_core_cannot_be_disabled(site: Site) -> None:
    ran = site.run("plugins", "disable", "core")
    assert (ran.returncode, ran.stderr) == (2, "error: core cannot be left out: it has the verbs\n")


def test_a_misspelt_name_of_a_plugin_to_leave_out_is_told_once(site: Site) -> None:
    """It may be installed on other machines: a warning."""
    site.add("good", GOOD)
    variable = "KERNELFORGE_PLUGINS_DISABLE"
    told = f"{variable}: no plugin named 'godo' is installed; did you mean good?"
    listed = site.run("plugins", "list", **{variable: "godo"})
    assert (listed.returncode, listed.stderr) == (0, f"warning: {told}\n")
    assert listed.stdout.endswith(f"\n\n{told}\n")
    envelope = site.run_json("doctor", "--target", "reference", **{variable: "godo,,core"})
    core = f"{variable}: core cannot be left out: it has the verbs"
    assert envelope["warnings"] == [core, told]
    assert [p["problem"] for p in envelope["data"]["problems"]] == [core, told]
    for heeded in ("good", ""):
        assert site.run_json("plugins", "list", **{variable: heeded})["warnings"] == []
    assert site.run("plugins", "list", **{variable: "godo"}, KERNELFORGE_PLUGINS_STRICT="1").returncode == 0


def test_disabling_where_nothing_can_be_kept(site: Site, tmp_path: Path) -> None:
    site.add("good", GOOD)
    occupied = tmp_path / "file"
    occupied.touch()
    ran = site.run("plugins", "disable", "good", KERNELFORGE_HOME=str(occupied))
    assert ran.returncode == 13
    assert "KERNELFORGE_PLUGINS_DISABLE=good" in ran.stderr
    assert site.run("plugins", "enable", "good", KERNELFORGE_HOME=str(occupied)).returncode == 0


def test_verb_of_a_first_party_plugin_that_failed(site: Site) -> None:
    site.add("stand-in", "1 / 0", distribution="kernelforge-llm")
    ran = site.run("llm-inference")
    assert ran.returncode == 12
    assert "'llm-inference' is not there: plugin 'stand-in' (kernelforge-llm 1.0) failed: ZeroDivision" in ran.stderr


# Quarantined: what cannot be caught.


@pytest.mark.parametrize(
    "code",
    ["import ctypes\nctypes.string_at(0)", "@hookimpl\ndef kernelforge_tuners():\n    import os\n    os.abort()"],
    ids=["at import", "in a hook"],
)
def test_native_crash_is_named_from_the_next_start_on(site: Site, code: str) -> None:
    site.add("crash", code)
    site.add("after", GOOD)
    assert site.run("--help").returncode not in (0, 12)
    for _ in range(2):
        ran = site.run("plugins", "list")
        assert ran.returncode == 0
        assert "warning: plugin 'crash' (acme-crash 1.0) is quarantined: its import did not end last time" in ran.stderr
        assert ran.stderr.count("quarantined") == 1
        assert "`kernelforge plugins retry crash` imports it at the next start" in ran.stdout
    assert site.run("passes", "list", "--plugin", "crash").returncode == 12


def test_retry_lifts_the_quarantine(site: Site) -> None:
    site.add("crash", "import os\nos._exit(9)")
    assert site.run("--help").returncode == 9
    lifted = site.run_json("plugins", "retry", "crash")["data"]
    assert lifted["was_quarantined"]
    assert "its import did not end last time" in lifted["reason"]
    assert site.run("--help").returncode == 9
    assert site.run("plugins", "retry", "crash").stdout == "crash is imported again at the next start\n"
    module = site.folder / "acme_crash_1_0.py"
    module.write_text(HEADER + GOOD)
    listed = {p["name"]: p["state"] for p in site.run_json("plugins", "list")["data"]["plugins"]}
    assert listed["crash"] == "loaded"
    assert site.run("plugins", "retry", "crash").stdout == "crash was not in quarantine\n"


def test_import_that_hangs_is_named_from_the_next_start_on(site: Site, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    site.add("hang", f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(600)")
    environment = {**os.environ, "PYTHONPATH": str(site.folder)}
    with subprocess.Popen([sys.executable, "-m", "kernelforge", "--help"], env=environment) as ran:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        ran.kill()
    assert ran.returncode != 0
    listed = site.run("plugins", "list")
    assert listed.returncode == 0
    assert "plugin 'hang' (acme-hang 1.0) is quarantined" in listed.stderr


def test_plugin_whose_code_has_changed_is_watched_again(site: Site) -> None:
    site.add("good", GOOD)
    assert site.run("--help").returncode == 0
    module = site.folder / "acme_good_1_0.py"
    module.write_text("import os\nos._exit(9)")
    os.utime(module, (1, 1))
    assert site.run("--help").returncode == 9
    assert "plugin 'good' (acme-good 1.0) is quarantined" in site.run("--help").stderr


# Many plugins.


def seconds(site: Site | None) -> float:
    environment = {**os.environ, **({} if site is None else {"PYTHONPATH": str(site.folder)})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else the plugins' sources are compiled at each start
    return child_seconds(environment, "-m", "kernelforge", "--help")


def test_help_is_quick_with_fifty_plugins(site: Site) -> None:
    """The promise is twice as long at most; the margin is for a busy machine, and what load adds is least in the quickest run."""
    for i in range(50):
        site.add(f"many-{i}", GOOD.replace('"good"', f'"good-{i}"'))
    assert site.run("--help").returncode == 0  # imported, compiled and known to end from here on
    pairs = [(seconds(site), seconds(None)) for _ in range(7)]
    many, none = (min(column) for column in zip(*pairs, strict=True))
    assert many < 2.5 * none
