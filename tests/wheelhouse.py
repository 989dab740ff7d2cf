"""Packages as their users get them: wheels, and virtual environments that they are installed into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernelforge-core", "kernelforge-cpu", "kernelforge-metal", "kernelforge-llm")


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "uv", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def succeed(*arguments: str) -> None:
    ran = uv(*arguments)
    assert ran.returncode == 0, ran.stderr


def need_index(folder: Path) -> None:
    """Skip the test when the package index, from which build backends come, cannot be reached."""
    probe = folder / "requirements.in"
    probe.write_text("hatchling\n")
    reached = uv("pip", "compile", "--refresh", "--quiet", str(probe))
    if reached.returncode:
        pytest.skip(f"the package index cannot be reached: {reached.stderr.strip().splitlines()[-1]}")


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path, wheels: Path, *packages: str) -> None:
        self._scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self._environment = {**os.environ, "KERNELFORGE_HOME": str(folder / "home")}
        self._environment.pop("PYTHONPATH", None)
        self._folder = folder
        succeed("venv", "--quiet", "--python", sys.executable, str(folder / "venv"))
        named = [_wheel(wheels, package) for package in packages]
        succeed(
            "pip", "install", "--quiet", "--python", str(self._scripts / "python"), "--find-links", str(wheels), *named
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._scripts / command[0], *command[1:]],
            capture_output=True,
            text=True,
            cwd=self._folder,
            env=self._environment,
            check=False,
        )

    def kernelforge(self, *arguments: str) -> dict[str, Any]:
        ran = self.run("kernelforge", *arguments, "--json")
        assert ran.stdout, ran.stderr
        envelope: dict[str, Any] = json.loads(ran.stdout)
        assert envelope["ok"], envelope["errors"]
        return envelope

    def plugins(self) -> dict[str, str]:
        return {p["name"]: p["state"] for p in self.kernelforge("plugins", "list")["data"]["plugins"]}


def _wheel(wheels: Path, package: str) -> str:
    """The path of a package's wheel, with the extras that are asked for: "name[extra]"."""
    name, bracket, extras = package.partition("[")
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-*.whl")
    return f"{wheel}{bracket}{extras}"
