"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kernelforge.errors import KernelForgeError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = r"[0-9a-f]{8}\.draft"


@contextmanager
def new_folder(folder: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """A draft of a folder to be filled, which then appears whole or not at all; in one that is there already, each file is
    replaced at once, and those that were not written and whose name is `stale` are deleted. Drafts of the same folder whose
    process was killed are deleted, too.

    Raises `UsageError` if `folder` is a file, `KernelForgeError` if it cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder")
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.draft")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_drafts(folder)
        draft.mkdir()
        with _held(draft):
            yield draft
            if not folder.exists():
                draft.replace(folder)
                return
            written = sorted(path.name for path in draft.iterdir())
            for name in written:
                (draft / name).replace(folder / name)
            for path in folder.iterdir():
                if stale(path.name) and path.name not in written:
                    path.unlink()
    except OSError as error:
        raise KernelForgeError(f"{folder} cannot be written: {error}", hint="choose another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _delete_drafts(folder: Path) -> None:
    """Those that nobody holds."""
    for path in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.{_NAME}", path.name) and path.is_dir():
            with suppress(OSError), _held(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(draft: Path) -> Iterator[bool]:
    """Hold a draft; the system lets go of it when the process ends, however it does. False where another process holds it, or
    where that cannot be told."""
    if fcntl is None:
        yield False
        return
    handle = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
