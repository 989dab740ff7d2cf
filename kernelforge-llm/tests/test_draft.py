"""Drafts of folders, of processes that come to their end and of those that are killed, one after the other and at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kernelforge.errors import KernelForgeError
from kernelforge_llm import draft as drafts
from kernelforge_llm.draft import new_folder

WRITING = """
import sys
from pathlib import Path
from kernelforge_llm.draft import new_folder
with new_folder(Path(sys.argv[1]), lambda name: False) as draft:
    (draft / "weights").write_bytes(b"theirs")
    print(draft.name, flush=True)
    sys.stdin.read()
"""

BUSY = "model is being written by another process"


@contextmanager
def writing(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that writes until its stdin is closed, and its draft."""
    command = [sys.executable, "-c", WRITING, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, folder.with_name(process.stdout.readline().strip())


def write(folder: Path, weights: bytes = b"ours") -> None:
    with new_folder(folder, lambda name: False) as draft:
        assert list(draft.iterdir()) == []
        (draft / "weights").write_bytes(weights)


@pytest.mark.skipif(sys.platform == "win32", reason="drafts are not held there")
def test_the_draft_of_a_process_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    others = [tmp_path / name for name in (".model.backup", ".model.20261127", ".models.kernelforge-draft")]
    for other in others:
        other.mkdir()
    with writing(folder) as (process, left):
        process.kill()
    assert (left / "weights").read_bytes() == b"theirs"
    write(folder)
    assert (folder / "weights").read_bytes() == b"ours"
    assert sorted(tmp_path.iterdir()) == sorted([folder, *others])


@pytest.mark.parametrize("there", [False, True])
def test_two_processes_do_not_write_one_folder(tmp_path: Path, there: bool) -> None:
    """Nor by another name of it."""
    folder, link = tmp_path / "model", tmp_path / "link"
    if there:
        write(folder)
    link.symlink_to(folder)
    with writing(folder) as (process, _):
        for name in (folder, link):
            with pytest.raises(KernelForgeError, match=BUSY):
                write(name)
        process.communicate()
    assert (folder / "weights").read_bytes() == b"theirs"
    write(link, b"later")
    assert (folder / "weights").read_bytes() == b"later"
    assert sorted(tmp_path.iterdir()) == [link, folder]


def test_where_folders_cannot_be_locked_what_is_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "fcntl", None)
    folder = tmp_path / "model"
    write(folder)
    left = tmp_path / ".model.kernelforge-draft"
    left.mkdir()
    with pytest.raises(KernelForgeError, match=BUSY) as raised:
        write(folder)
    assert str(raised.value.hint).endswith(f"if none is there, delete {left}")
    left.rmdir()
    write(folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(sys.platform == "win32", reason="drafts are not held there")
def test_a_draft_that_another_process_moves_while_it_is_locked_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    folder, draft = tmp_path / "model", tmp_path / ".model.kernelforge-draft"
    draft.mkdir()
    (draft / "weights").write_bytes(b"theirs")

    def finish() -> None:
        draft.rename(folder)

    def begin_again() -> None:
        draft.rmdir()
        draft.mkdir()

    lock, moves = fcntl.flock, [begin_again, finish]

    def late(handle: int, operation: int) -> None:
        if moves:
            moves.pop()()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(folder)
    assert moves == []
    assert (folder / "weights").read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [folder]
