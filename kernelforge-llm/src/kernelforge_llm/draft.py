"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kernelforge.errors import KernelForgeError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def new_folder(folder: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """A draft of a folder to be filled, which then appears whole or not at all; in one that is there already, each file is
    replaced at once, and those that were not written and whose name is `stale` are deleted. One process at a time writes a
    folder; what one that was killed left behind is deleted.

    Raises `UsageError` if `folder` is a file, `KernelForgeError` if it cannot be written or another process writes it.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder")
    draft = folder.with_name(f".{folder.name}.kernelforge-draft")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = _hold(draft, folder)
        try:
            for left in draft.iterdir():
                left.unlink()
            yield draft
            if not folder.exists():
                draft.replace(folder)
                draft = folder  # another process may begin one of that name
                return
            written = sorted(path.name for path in draft.iterdir())
            for name in written:
                (draft / name).replace(folder / name)
            for path in folder.iterdir():
                if stale(path.name) and path.name not in written:
                    path.unlink()
        finally:
            if draft != folder:
                shutil.rmtree(draft, ignore_errors=True)
            if handle is not None:
                os.close(handle)
    except OSError as error:
        raise KernelForgeError(f"{folder} cannot be written: {error}", hint="choose another folder") from None


def _hold(draft: Path, folder: Path) -> int | None:
    """Make a draft, or take over that of a process that was killed. What is returned holds it until it is closed, which the
    system does when the process ends, however it does; None where drafts cannot be held: there one that is left behind cannot
    be told from one that is being written.

    Raises KernelForgeError where another process has it.
    """
    while True:
        try:
            draft.mkdir()
            made = True
        except FileExistsError:
            made = False
        try:
            handle = _lock(draft)
        except FileNotFoundError:  # it has just become the folder, or was deleted
            continue
        except BlockingIOError:
            left = ""
        else:
            if handle is not None or made:
                return handle
            left = f"; if none is there, delete {draft}"
        raise KernelForgeError(
            f"{folder} is being written by another process", hint=f"wait for its end, or choose another folder{left}"
        )


def _lock(draft: Path) -> int | None:
    """None where folders cannot be locked: on Windows, on some network drives. Raises FileNotFoundError when `draft` is not
    there any more, BlockingIOError when another process holds it."""
    if fcntl is None:
        return None
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), draft.stat()):
            return handle
        raise FileNotFoundError(draft)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
