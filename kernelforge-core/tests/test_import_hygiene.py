"""What must stay unloaded until it is used, and how long `--help` may take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from child_time import child_seconds

HEAVY = (
    "torch_mlir",
    "numpy",
    "ml_dtypes",
    "numba",
    "llvmlite",
    "wgpu",
    "tokenizers",
    "safetensors",
    "rich",
    "typer",
    "pydantic",
)


def loaded_by(code: str) -> set[str]:
    """The heavy packages that a fresh process has loaded after `code`."""
    looked_at = (*HEAVY, "importlib.metadata")
    report = f"{code}\nimport sys\nsys.stderr.write(' '.join(m for m in {looked_at!r} if m in sys.modules))"
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


def test_help_is_about_as_fast_as_importing_typer(tmp_path: Path) -> None:
    """The promise is 1.6 times; the margin is for a busy machine, and what load adds is least in the quickest run.

    Both find their bytecode in one fresh cache: where none may be written, the sources of one would be compiled anew
    at each start, and those of the other, installed with theirs, would not.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    commands = [("-m", "kernelforge", "--help"), ("-c", "import typer, pluggy")]
    for command in commands:
        child_seconds(environment, *command)
    rounds = [[child_seconds(environment, *command) for command in commands] for _ in range(9)]
    help_seconds, typer_seconds = (min(column) for column in zip(*rounds, strict=True))
    assert help_seconds < 2.0 * typer_seconds
