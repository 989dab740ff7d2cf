"""State on disk: `KERNELFORGE_HOME`, by default `~/.kernelforge`, and how files there are written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def env_flag(name: str) -> bool:
    """Whether an environment variable is set to something that means yes: not empty, 0, false, no or off."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def home() -> Path:
    """The state folder; it need not exist. Read on every call, so that a changed environment counts at once."""
    configured = os.environ.get("KERNELFORGE_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".kernelforge"


def records_path() -> Path:
    """Measurements: data, never removed by clearing a cache."""
    return home() / "autotune.jsonl"


def cache_dir() -> Path:
    """Compiled objects and packed weights: safe to delete."""
    return home() / "cache"


def plugins_dir() -> Path:
    """What is known of plugins: which are disabled, in quarantine, or were loaded before."""
    return home() / "plugins"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by a file with `content`: readers see the old one or the new one, whole. Raises OSError."""
    import tempfile  # what it imports costs every start that writes nothing

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def append_line(path: Path, line: str) -> None:
    """Append one line while no other process does, so that their lines do not mix. Raises OSError.

    A torn last line (a crash, a full disk) is ended first, so that it does not swallow this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o644)
    try:
        with _locked(handle):
            size = os.lseek(handle, 0, os.SEEK_END)
            torn = False
            if size:
                os.lseek(handle, size - 1, os.SEEK_SET)
                torn = os.read(handle, 1) != b"\n"
            os.write(handle, (("\n" if torn else "") + line.rstrip("\n") + "\n").encode())
    finally:
        os.close(handle)


def read_lines(path: Path) -> bytes:
    """A file that `append_line` writes: without the half of a line that somebody is writing. Raises OSError."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("rb") as file, suppress(OSError), _locked(file.fileno()):  # unlocked it may be read, too
            data = file.read()
    return data


_BEYOND = 1 << 30
"""On Windows a locked byte cannot be read by others: one that is not there is taken."""


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    """Hold an open file alone among the processes that ask for it. Raises OSError where files cannot be locked."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _BEYOND, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
        try:
            yield
        finally:
            os.lseek(handle, _BEYOND, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)  # closing the file ends it
        yield


def lock_now(handle: int) -> bool:
    """Hold an open file alone until it is closed or the process ends; False where another holds it. Raises OSError where
    files cannot be locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BEYOND, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
