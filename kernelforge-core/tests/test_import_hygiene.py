"""What must stay unloaded until it is used, and how long `--help` may take."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

HEAVY = ("torch_mlir", "numpy", "ml_dtypes", "numba", "llvmlite", "wgpu", "tokenizers", "safetensors", "rich", "typer")


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh process has loaded after `code`."""
    report = f"{code}\nimport sys\nsys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import kernelforge",
        "from kernelforge.registry import default_registry; default_registry()",
        "from kernelforge.cli.app import main; main(['--help'])",
        "from kernelforge.cli.app import main; main(['--version'])",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_by(code) == set()


def test_verb_loads_typer_and_no_more() -> None:
    assert loaded_by("from kernelforge.cli.app import main; main(['plugins', 'list'])") == {"typer"}


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - start


def test_help_is_about_as_fast_as_importing_typer() -> None:
    """The promise is 1.6 times; the margin is for a busy machine. The two alternate, so that load hits both."""
    pairs = [(seconds("-m", "kernelforge", "--help"), seconds("-c", "import typer, pluggy")) for _ in range(7)]
    assert statistics.median(h / b for h, b in pairs) < 2.0
