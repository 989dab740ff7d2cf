"""`kernelforge plugins new`: packages of every kind that pass their own tests, as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from wheelhouse import need_index, succeed

from kernelforge.cli.app import main
from kernelforge.errors import AssetError, UsageError
from kernelforge.registry import default_registry
from kernelforge.scaffold import KINDS, LONGEST, Scaffold

PACKAGES: dict[str, tuple[str, str | None]] = {**{kind: (kind, None) for kind in KINDS}, "gpu": ("kernel", "gpu")}
"""What is written: the last word of its name, its kind, and its target."""
PACKAGE = pytest.mark.parametrize("package", PACKAGES)


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> None:
    """Succeed in a fresh process, one that sees what is installed in `path`."""
    environment = {**os.environ, "KERNELFORGE_HOME": str(cwd / "home"), "MYPYPATH": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of every kind, and a kernel for every target."""
    folder = tmp_path_factory.mktemp("written")
    for package, (kind, target) in PACKAGES.items():
        options = ("--target", target) if target is not None else ()
        assert main(["plugins", "new", f"own-{package}", "--kind", kind, "--folder", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def installed(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which all of them are installed."""
    target = tmp_path_factory.mktemp("installed")
    need_index(target)
    succeed("pip", "install", "--quiet", "--no-deps", "--target", str(target), *map(str, sorted(written.iterdir())))
    return target


def test_they_pass_their_own_tests(written: Path, installed: Path, tmp_path: Path) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", written, "-W", "error")
    tests = sorted(written.glob("*/tests"))
    assert len(tests) == len(PACKAGES)
    run(sys.executable, "-m", "pytest", *options, *tests, cwd=tmp_path, path=installed)


def test_they_are_loaded(written: Path, installed: Path, tmp_path: Path) -> None:
    names = [f"own-{package}" for package in PACKAGES]
    run(sys.executable, "-m", "kernelforge", "plugins", "check", *names, cwd=tmp_path, path=installed)


def test_their_types_are_right(written: Path, tmp_path: Path) -> None:
    code = [part for package in sorted(written.iterdir()) for part in (package / "src", package / "tests")]
    config = written / "kernelforge-own-kernel" / "pyproject.toml"
    cache = ("--cache-dir", tmp_path / "cache")
    run(sys.executable, "-m", "mypy", "--config-file", config, *cache, *code, cwd=tmp_path)


@pytest.mark.parametrize("name", ["x", "a" * LONGEST])
@PACKAGE
def test_their_style_is_right(package: str, name: str, tmp_path: Path) -> None:
    Scaffold(name, *PACKAGES[package]).write(tmp_path)
    for command in (["check", "--no-cache"], ["format", "--no-cache", "--check"]):
        run(sys.executable, "-m", "ruff", *command, ".", cwd=tmp_path / f"kernelforge-{name}")


@PACKAGE
def test_what_is_written(package: str, written: Path) -> None:
    root = written / f"kernelforge-own-{package}"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    module = f"kernelforge_own_{package}"
    assert files >= {
        ".github/workflows/ci.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"src/{module}/__init__.py",
        f"src/{module}/plugin.py",
        f"src/{module}/py.typed",
        f"tests/test_own_{package}.py",
    }
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"kernelforge": {f"own-{package}": f"{module}.plugin"}}
    assert project["dependencies"][0] == "kernelforge-core>=0.1,<0.2"
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    assert "python-version: ${{ matrix.python }}" in workflow
    for verb in re.findall(rf"uv run kernelforge (.*) own-{package}", workflow):
        assert verb in default_registry().commands
    assert not any("$" in path.read_text() for path in root.rglob("*.py"))


def test_the_smallest_kernel_is_small(written: Path) -> None:
    text = (written / "kernelforge-own-kernel" / "src" / "kernelforge_own_kernel" / "plugin.py").read_text()
    assert len([line for line in text.splitlines() if line]) <= 15


def test_the_verb_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "new", "mine", "--kind", "tuner", "--folder", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["plugin"], data["kind"], data["folder"]) == ("mine", "tuner", str(tmp_path / "kernelforge-mine"))
    assert all(Path(file).is_file() for file in data["files"])
    assert main(["plugins", "new", "other", "--kind", "pass", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "src/kernelforge_other/plugin.py" in out
    assert f"next: pip install -e {tmp_path / 'kernelforge-other'}" in out


def test_a_folder_that_exists_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernelforge-mine").mkdir()
    assert main(["plugins", "new", "mine", "--kind", "pass", "--folder", str(tmp_path)]) == 2
    assert "kernelforge-mine is there already" in capsys.readouterr().err
    assert not list((tmp_path / "kernelforge-mine").iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Fast", "'Fast' cannot name a plugin"),
        ("fast_silu", "'fast_silu' cannot name a plugin"),
        ("1st", "'1st' cannot name a plugin"),
        ("../up", "'../up' cannot name a plugin"),
        ("class", "is a word of Python's"),
        ("kernelforge-mine", "repeats what comes before every name"),
        ("a" * (LONGEST + 1), f"is longer than {LONGEST} characters"),
    ],
)
def test_bad_names(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Scaffold(name, "kernel")


def test_an_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown kind of plugin 'kernels'") as caught:
        Scaffold("mine", "kernels")
    assert caught.value.hint == f"one of: {', '.join(KINDS)}"


def test_a_gpu_kernel_is_a_wgsl_file_and_a_few_lines(written: Path) -> None:
    root = written / "kernelforge-own-gpu"
    assert (root / "src" / "kernelforge_own_gpu" / "own_gpu.wgsl").is_file()
    text = (root / "src" / "kernelforge_own_gpu" / "plugin.py").read_text()
    assert len([line for line in text.splitlines() if line]) <= 15
    assert (
        "kernelforge-metal>=0.1,<0.2" in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    assert "mesa-vulkan-drivers" in (root / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        ("pass", "gpu", "a plugin of kind 'pass' is not written for one target"),
        ("kernel", "reference", "no kernel can be written for target 'reference'\nhint: one of: cpu, gpu"),
    ],
)
def test_targets_that_cannot_be(
    kind: str, target: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--kind", kind, "--target", target, "--folder", str(tmp_path)]
    assert main(["plugins", "new", "mine", *options]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("cpu", "kernel", r"plugin 'cpu' \(kernelforge-cpu .*\) is installed already"),
        ("grid", "tuner", r"plugin 'core' \(kernelforge-core .*\) registers tuner 'grid' already"),
        ("tune", "command", r"plugin 'core' \(kernelforge-core .*\) registers command 'tune' already"),
        ("vectorized", "kernel", r"plugin 'cpu' .* registers kernel 'cpu/transformer\.silu/vectorized' already"),
    ],
)
def test_names_that_are_taken(
    name: str, kind: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "new", name, "--kind", kind, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert re.search(reason, error)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="cannot write"):
        Scaffold("mine", "pass").write(tmp_path / "file")
