"""Each package as its users get it: built, installed with nothing but its declared dependencies, and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
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


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of every package, each built from its source distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    probe = folder / "requirements.in"
    probe.write_text("hatchling\n")
    reached = uv("pip", "compile", "--refresh", "--quiet", str(probe))
    if reached.returncode:
        pytest.skip(f"the package index cannot be reached: {reached.stderr.strip().splitlines()[-1]}")
    for package in PACKAGES:
        succeed("build", "--quiet", "--package", package, "--out-dir", str(folder))
    return folder


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path, wheels: Path, *packages: str) -> None:
        self._scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        self._environment = {**os.environ, "KERNELFORGE_HOME": str(folder / "home")}
        self._environment.pop("PYTHONPATH", None)
        self._folder = folder
        succeed("venv", "--quiet", "--python", sys.executable, str(folder / "venv"))
        named = [str(next(wheels.glob(f"{name.replace('-', '_')}-*.whl"))) for name in packages]
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


Install = Callable[..., Environment]


@pytest.fixture
def install(tmp_path: Path, wheels: Path) -> Install:
    def make(*packages: str) -> Environment:
        return Environment(tmp_path, wheels, *packages)

    return make


MATMUL = ("benchmark-matmul", "--m", "5", "--n", "6", "--k", "7")


def test_wheels_are_pure_typed_and_licensed(wheels: Path) -> None:
    for package in PACKAGES:
        (wheel,) = wheels.glob(f"{package.replace('-', '_')}-*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        names = zipfile.ZipFile(wheel).namelist()
        top = "kernelforge" if package == "kernelforge-core" else package.replace("-", "_")
        assert f"{top}/py.typed" in names
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
        assert {name.split("/")[0] for name in names} == {top, f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_core_alone(install: Install) -> None:
    core = install("kernelforge-core")
    assert core.run("kernelforge", "--version").stdout.startswith("kernelforge ")
    assert core.plugins() == {"core": "loaded"}
    assert core.kernelforge(*MATMUL, "--target", "reference")["data"]["variant"] == "reference"
    refused = core.run("kernelforge", *MATMUL)
    assert refused.returncode == 11
    assert "pip install kernelforge-cpu" in refused.stderr
    assert core.run("kernelforge", "llm-inference").stderr.endswith("hint: pip install kernelforge-llm\n")


def test_cpu_brings_core(install: Install) -> None:
    cpu = install("kernelforge-cpu")
    assert cpu.plugins() == {"core": "loaded", "cpu": "loaded"}
    assert cpu.kernelforge(*MATMUL)["data"]["threads"] >= 1


def test_metal_brings_core(install: Install) -> None:
    metal = install("kernelforge-metal")
    assert metal.plugins() == {"core": "loaded", "metal": "loaded"}
    assert "gpu" in metal.kernelforge("doctor")["data"]["devices"]


def test_llm_brings_core_and_its_model(install: Install) -> None:
    llm = install("kernelforge-llm")
    assert llm.plugins() == {"core": "loaded", "llm": "loaded"}
    generated = llm.kernelforge("llm-inference", "--prompt", "def", "--max-tokens", "1", "--target", "reference")
    assert generated["data"]["generated_tokens"] >= 1


def test_all_together(install: Install) -> None:
    everything = install(*PACKAGES)
    assert everything.plugins() == dict.fromkeys(("core", "cpu", "llm", "metal"), "loaded")
    generated = everything.kernelforge("llm-inference", "--prompt", "the quick brown fox", "--max-tokens", "5")
    assert generated["data"]["generated_tokens"] >= 1
