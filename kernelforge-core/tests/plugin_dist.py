"""Real distributions in a temporary folder: a module and its dist-info, as an installer leaves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from textwrap import dedent
from typing import Any

HEADER = """\
from kernelforge.descriptors import *
from kernelforge.hookspecs import hookimpl
"""

IN_RANGE = "kernelforge-core>=0.1,<0.2"


@dataclass(frozen=True)
class Site:
    """A folder to be put on the path."""

    folder: Path

    def add(
        self, name: str, code: str, *, requires: str = IN_RANGE, version: str = "1.0", distribution: str = ""
    ) -> None:
        """Install plugin `name` with this module."""
        distribution = distribution or f"acme-{name}"
        module = f"{distribution}_{version}".replace("-", "_").replace(".", "_")
        (self.folder / f"{module}.py").write_text(HEADER + dedent(code), encoding="utf-8")
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.4\nName: {distribution}\nVersion: {version}\n"
        if requires:
            metadata += f"Requires-Dist: {requires}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[kernelforge]\n{name} = {module}\n", encoding="utf-8")

    def entry_points(self) -> list[EntryPoint]:
        found = distributions(path=[str(self.folder)])
        return [entry for dist in found for entry in dist.entry_points if entry.group == "kernelforge"]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `kernelforge` in a process that sees these plugins beside the installed ones."""
        return subprocess.run(
            [sys.executable, "-m", "kernelforge", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": str(self.folder), **environment},
        )

    def run_json(self, *arguments: str, **environment: str) -> dict[str, Any]:
        ran = self.run(*arguments, "--json", **environment)
        envelope: dict[str, Any] = json.loads(ran.stdout)
        return envelope
