"""What is found to be installed, against what `importlib.metadata` finds."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from textwrap import dedent

import pytest

from kernelforge.distributions import EntryPoint, entry_points, version
from kernelforge.errors import KernelForgeWarning

Install = Callable[..., None]

FULL = """
    # a comment
    [console_scripts]
    tool = acme.tool:main

    [acme]
    plain = acme_module
    attr = acme_module : Outer.inner
    spaced=  acme_module
    extra = acme_module:attr [fast]
    [other]
    elsewhere = acme_module
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two folders, which are the path."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "absent"), *map(str, folders)])
    return folders


def install(folder: Path, name: str, entries: str, *, metadata: str = "METADATA") -> None:
    info = folder / name
    info.mkdir(parents=True)
    told = name.rpartition(".")[0].partition("-")[0] or "egg"
    (info / metadata).write_text(f"Name: {told}\nVersion: 1.0\nRequires-Dist: a\nRequires-Dist: b\n\nName: no\n")
    (info / "entry_points.txt").write_text(dedent(entries))


def found() -> list[tuple[str, str]]:
    return sorted((e.name, e.value) for e in entry_points("acme"))


def theirs() -> list[tuple[str, str]]:
    return sorted((e.name, e.value) for e in importlib.metadata.entry_points(group="acme"))


def test_as_importlib_metadata(path: list[Path]) -> None:
    install(path[0], "acme_full-1.0.dist-info", FULL)
    install(path[0], "acme.egg-info", "[acme]\nold = acme_module", metadata="PKG-INFO")
    install(path[1], "Acme.Full-2.0.dist-info", "[acme]\nhidden = acme_module")
    install(path[1], "none-1.0.dist-info", "[other]\nno = acme_module")
    (path[1] / "bare-1.0.dist-info").mkdir()
    (path[1] / "file-1.0.egg-info").write_text("Name: file")
    assert [name for name, _ in found()] == ["attr", "extra", "old", "plain", "spaced"]
    assert found() == theirs()


def test_egg_folders_and_archives(path: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    egg, archive = path[0] / "acme-1.0.egg", path[1] / "acme_zipped.zip"
    install(egg, "EGG-INFO", "[acme]\negg = acme_module")
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("zipped-1.0.dist-info/METADATA", "Name: zipped\nVersion: 2.0\n")
        zipped.writestr("zipped-1.0.dist-info/entry_points.txt", "[acme]\nzipped = acme_module")
    monkeypatch.setattr(sys, "path", [*sys.path, str(egg), str(archive)])
    assert found() == theirs() == [("egg", "acme_module"), ("zipped", "acme_module")]
    assert version("zipped") == "2.0"


def test_another_import_hook(path: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(path[0] / "hidden", "acme_hooked-1.0.dist-info", "[acme]\nhooked = acme_module")

    class Hook:
        def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return None

        def find_distributions(self, context: object) -> list[importlib.metadata.Distribution]:
            return [importlib.metadata.Distribution.at(path[0] / "hidden" / "acme_hooked-1.0.dist-info")]

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Hook()])
    assert found() == theirs() == [("hooked", "acme_module")]


def test_what_is_no_text_on_the_path_is_passed_over(path: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(path[0], "acme_one-1.0.dist-info", "[acme]\none = acme_module")
    monkeypatch.setattr(sys, "path", [None, path[1], *sys.path])
    assert found() == [("one", "acme_module")]


def test_installed_a_moment_ago_is_seen(path: list[Path]) -> None:
    install(path[0], "acme_one-1.0.dist-info", "[acme]\none = acme_module")
    assert [name for name, _ in found()] == ["one"]
    install(path[0], "acme_two-1.0.dist-info", "[acme]\ntwo = acme_module")
    assert [name for name, _ in found()] == ["one", "two"]
    (path[0] / "acme_one-1.0.dist-info" / "entry_points.txt").write_text("[acme]\nmoved = acme_module")
    assert [name for name, _ in found()] == ["moved", "two"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[acme]\nno value"])
def test_one_that_cannot_be_read_is_left_out(path: list[Path], content: bytes) -> None:
    install(path[0], "acme_good-1.0.dist-info", "[acme]\ngood = acme_module")
    install(path[0], "acme_torn-1.0.dist-info", "")
    (path[0] / "acme_torn-1.0.dist-info" / "entry_points.txt").write_bytes(content)
    with pytest.warns(KernelForgeWarning, match="the entry points of acme-torn cannot be read: "):
        assert found() == [("good", "acme_module")]


def test_header_ends_with_the_first_empty_line(path: list[Path]) -> None:
    install(path[0], "acme-1.0.dist-info", "[acme]\none = acme_module")
    (entry,) = entry_points("acme")
    assert entry.header == {"Name": ["acme"], "Version": ["1.0"], "Requires-Dist": ["a", "b"]}


def test_version(path: list[Path]) -> None:
    install(path[1], "Two_Words-1.0.dist-info", "")
    assert version("two.words") == "1.0"
    assert version("nowhere") == ""


def test_damaged_metadata_costs_the_version_alone(path: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    install(path[0], "acme_good-1.0.dist-info", "[acme]\ngood = acme_module")
    install(path[0], "torn-1.0.dist-info", "[acme]\ntorn = acme_module")
    (path[0] / "torn-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\0\0")
    with pytest.warns(KernelForgeWarning, match="the version of torn cannot be read; install it again: Unicode"):
        assert version("torn") == ""
    with pytest.warns(KernelForgeWarning, match="the entry points of torn cannot be read: Unicode"):
        assert found() == [("good", "acme_module")]
    hook = type("Hook", (), {"find_spec": lambda *_: None, "find_distributions": lambda *_: []})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, hook])  # from now on importlib.metadata looks
    with pytest.warns(KernelForgeWarning, match="a distribution is left out, whose METADATA cannot be read: Unicode"):
        assert found() == [("good", "acme_module")]


@pytest.mark.parametrize(
    "value", ["pathlib", "pathlib:Path", "pathlib : Path.home", "pathlib:Path [fast]", "pathlib [fast]"]
)
def test_load_as_importlib_metadata(value: str) -> None:
    theirs = importlib.metadata.EntryPoint("name", value, "acme")
    ours = EntryPoint("name", value, {})
    assert ours.module == theirs.module
    assert ours.load() == theirs.load()


@pytest.mark.parametrize("value", ["no_such_module", "pathlib:nothing", "pathlib:Path.nothing"])
def test_errors_as_importlib_metadata(value: str) -> None:
    with pytest.raises((ImportError, AttributeError)) as theirs:
        importlib.metadata.EntryPoint("name", value, "acme").load()
    with pytest.raises(theirs.type) as ours:
        EntryPoint("name", value, {}).load()
    assert str(ours.value) == str(theirs.value)
