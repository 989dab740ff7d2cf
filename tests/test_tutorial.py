"""docs/tutorial.md, followed to the letter in an empty folder, with wheels instead of the package index."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```\n", re.DOTALL)
MARK = "---- end of command"
CPU = version("kernelforge-cpu")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Command:
    text: str
    output: str
    """What the tutorial says it prints; `...` stands for anything."""


@dataclass(frozen=True)
class File:
    path: str
    text: str


def steps() -> Iterator[Command | File]:
    """What a reader does, in order. Every block of the page must be one or the other."""
    for block in BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8")):
        if block["file"]:
            yield File(block["file"], block["text"])
            continue
        assert block["language"] == "console", f"nobody runs this block:\n{block['text']}"
        for part in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Command(command, output)


def script() -> str:
    """The steps for a shell, with a mark after each command's output."""
    lines = ["set -euo pipefail"]
    for step in steps():
        if isinstance(step, File):
            lines.append(f"printf %s {shlex.quote(step.text)} > {shlex.quote(step.path)}")
        else:
            lines += [step.text, f"echo {shlex.quote(MARK)}"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def printed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each command prints."""
    if os.name == "nt":
        pytest.skip("the tutorial's commands are for a POSIX shell")
    folder = tmp_path_factory.mktemp("tutorial")
    uv = Path(sys.executable).parent
    environment = {
        **os.environ,
        "KERNELFORGE_HOME": str(folder / ".kernelforge"),
        "PATH": f"{uv}{os.pathsep}{os.environ['PATH']}",
        "UV_FIND_LINKS": str(wheels),
    }
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "UV_PYTHON", "UV_SYSTEM_PYTHON"):  # they would lead out of the folder
        environment.pop(name, None)
    ran = subprocess.run(
        ["bash", "-c", script()], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.split(f"{MARK}\n")[:-1]


def test_every_command_prints_what_the_tutorial_says(printed: list[str]) -> None:
    commands = [step for step in steps() if isinstance(step, Command)]
    assert len(printed) == len(commands)
    checker = doctest.OutputChecker()
    for command, got in zip(commands, printed, strict=True):
        want = command.output.replace("\n\n", "\n<BLANKLINE>\n").replace(
            "kernelforge-cpu 0.1.0", f"kernelforge-cpu {CPU}"
        )
        example = doctest.Example(command.text, want)
        assert checker.check_output(want, got, FLAGS), f"$ {command.text}\n" + checker.output_difference(
            example, got, FLAGS
        )


def test_the_first_kernel_is_the_smallest(printed: list[str]) -> None:
    first = next(step for step in steps() if isinstance(step, File))
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 15
