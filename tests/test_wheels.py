"""Each package as its users get it: built, installed with nothing but its declared dependencies, and run."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from wheelhouse import PACKAGES, Environment

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


def test_pytest_runs_conformance_in_an_empty_folder(install: Install) -> None:
    core = install("kernelforge-core[testing]")
    ran = core.run("pytest", "-q", "-p", "no:cacheprovider", "--kernelforge-plugin", "core", "-k", "tuner/grid/1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "20 passed" in ran.stdout
    usual = core.run("pytest", "-q", "-p", "no:cacheprovider")
    assert usual.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, usual.stdout + usual.stderr


def test_cpu_brings_core(install: Install) -> None:
    cpu = install("kernelforge-cpu")
    assert cpu.plugins() == {"core": "loaded", "cpu": "loaded"}
    assert cpu.kernelforge(*MATMUL)["data"]["threads"] >= 1
    silu = ("conformance", "run", "cpu", "--op", "silu", "--variant", "vectorized")
    assert cpu.kernelforge(*silu, "--level", "1")["data"]["totals"]["passed"] > 0
    refused = cpu.run("kernelforge", *silu)
    assert refused.returncode == 13
    assert 'pip install "kernelforge-core[testing]", or --level 4' in refused.stderr


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
