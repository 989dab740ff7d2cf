"""Where state lives, and that files there are written whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kernelforge import home


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path / "state"))
    assert home.home() == tmp_path / "state"
    assert home.cache_dir() == tmp_path / "state" / "cache"
    assert home.records_path() == tmp_path / "state" / "autotune.jsonl"
    assert not home.home().exists()
    monkeypatch.setenv("KERNELFORGE_HOME", "~/elsewhere")
    assert home.home() == Path.home() / "elsewhere"
    for unset in ("", None):
        monkeypatch.setenv("KERNELFORGE_HOME", unset) if unset is not None else monkeypatch.delenv("KERNELFORGE_HOME")
        assert home.home() == Path.home() / ".kernelforge"


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("1", True),
        ("yes", True),
        ("on", True),
        ("", False),
        ("0", False),
        ("False", False),
        (" no ", False),
        ("OFF", False),
    ],
)
def test_flags(value: str, meaning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNELFORGE_SOMETHING", value)
    assert home.env_flag("KERNELFORGE_SOMETHING") is meaning
    monkeypatch.delenv("KERNELFORGE_SOMETHING")
    assert home.env_flag("KERNELFORGE_SOMETHING") is False


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    home.write_atomic(path, "first")
    home.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        home.write_atomic(path, b"third")
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.read_bytes() == b"second"


def test_lines_are_appended_and_a_torn_one_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lines"
    home.append_line(path, "one")
    home.append_line(path, "two\n")
    assert path.read_text(encoding="utf-8") == "one\ntwo\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("tor")
    home.append_line(path, "three")
    assert path.read_text(encoding="utf-8") == "one\ntwo\ntor\nthree\n"


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path, count = tmp_path / "lines", 200
    script = (
        "import sys; from pathlib import Path; from kernelforge.home import append_line\n"
        f"for i in range({count}): append_line(Path(sys.argv[1]), sys.argv[2] * 3000)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "abc"]
    assert [p.wait(120) for p in processes] == [0, 0, 0]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == [letter * 3000 for letter in "abc" for _ in range(count)]


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_cannot_be_written_is_the_systems_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        home.write_atomic(tmp_path / "file", b"")
    with pytest.raises(PermissionError):
        home.append_line(tmp_path / "file", "")


def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    path, found = tmp_path / "lines", list[bytes]()
    home.append_line(path, "one")
    handle = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        with home._locked(handle):
            os.write(handle, b"tw")
            reader = threading.Thread(target=lambda: found.append(home.read_lines(path)))
            reader.start()
            reader.join(0.2)
            assert not found
            os.write(handle, b"o\n")
    finally:
        os.close(handle)
    reader.join()
    assert found == [b"one\ntwo\n"]
    path.write_bytes(b"torn")
    assert home.read_lines(path) == b"torn"
