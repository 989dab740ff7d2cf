"""Plugins whose import never returned or ended the process, found out at the next start.

Neither can be caught by the process it happens to. So before the code of a plugin first runs a marker is written, and
taken away when the code returns; a marker that its process left behind is the trace of code that did not end.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kernelforge import __version__
from kernelforge.home import plugins_dir, write_atomic

PATIENCE_S = 60.0
"""An import of a living process that takes longer than this counts as one that does not end."""


@dataclass(frozen=True)
class Quarantine:
    """The trace of one plugin version with one version of core and of Python; none where the folder is read-only."""

    plugin: str
    version: str
    requires: str

    @property
    def _stem(self) -> Path:
        tested = (self.plugin, self.version, self.requires, __version__, str(sys.implementation.cache_tag))
        return plugins_dir() / quote(" ".join(tested), safe="")

    @property
    def _marker(self) -> Path:
        return Path(f"{self._stem}.importing")

    @property
    def _passed(self) -> Path:
        return Path(f"{self._stem}.imported")

    def passed(self) -> bool:
        """Whether this version was loaded before, from the same file, so that it needs no watching."""
        try:
            stamp, _, file = self._passed.read_text(encoding="utf-8").partition(" ")
            return stamp == _stamp(file)
        except (OSError, ValueError):
            return False

    def left_over(self) -> str:
        """Why the plugin must not be imported, or "" when it may."""
        try:
            marker = json.loads(self._marker.read_text(encoding="utf-8"))
            pid, host, since = int(marker["pid"]), str(marker["host"]), float(marker["time"])
        except OSError:
            return ""
        except (ValueError, TypeError, KeyError):
            return "its import did not end last time"
        if time.time() - since < PATIENCE_S and _alive(pid, host):
            return ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
        return f"its import did not end last time (process {pid}, {when})"

    def begin(self) -> None:
        """Leave the marker: code of the plugin is about to run. Nothing is left where the folder cannot be written."""
        import socket  # only a plugin that is new here needs it

        trace = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()})
        with contextlib.suppress(OSError):
            write_atomic(self._marker, trace)

    def end(self) -> None:
        """The code returned or raised: the process lives. Also what lifts a quarantine."""
        with contextlib.suppress(OSError):
            self._marker.unlink()

    def keep(self, file: str) -> None:
        """All of it returned; `file` is the plugin's module, "" when it has none."""
        with contextlib.suppress(OSError):
            write_atomic(self._passed, f"{_stamp(file)} {file}")


def _stamp(file: str) -> str:
    """Changes with the file's contents. Raises OSError when it is not there."""
    return str(Path(file).stat().st_mtime_ns) if file else "0"


def _alive(pid: int, host: str) -> bool:
    """Whether another process of this machine, still there, wrote the marker."""
    import socket

    if host != socket.gethostname() or pid == os.getpid():
        return False
    import psutil

    return bool(psutil.pid_exists(pid))
