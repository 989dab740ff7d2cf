"""Drafts of folders, of processes that come to their end and of those that are killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kernelforge_llm.draft import new_folder

WRITING = """
import sys
from pathlib import Path
from kernelforge_llm.draft import new_folder
with new_folder(Path(sys.argv[1]), lambda name: False) as draft:
    (draft / "weights").write_bytes(b"half")
    print(draft.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="drafts are not held there")
def test_a_draft_goes_with_the_next_one_once_its_process_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", WRITING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = tmp_path / process.stdout.readline().strip()
        others = [
            tmp_path / name
            for name in (".model.backup", ".model.20261127", ".model.0123456.draft", ".models.01234567.draft")
        ]
        for other in others:
            other.mkdir()
        with new_folder(folder, lambda name: False) as draft:
            (draft / "weights").write_bytes(b"whole")
            assert left.is_dir()  # it is being written
        process.kill()
        process.wait()
    assert (left / "weights").read_bytes() == b"half"
    with new_folder(folder, lambda name: False):
        assert not left.exists()
    assert (folder / "weights").read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([folder, *others])
