"""The GPU target on SwiftShader, the software Vulkan of Chromium, where it is present: a GPU with subgroups of 4, without f16 and
without subnormal numbers. A process keeps the Vulkan drivers that it started with: these tests run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLACE = "KERNELFORGE_SWIFTSHADER"
"""Environment variable: the path of SwiftShader's description, where it is in none of the places that are looked at."""

DESCRIPTION = "vk_swiftshader_icd.json"

FOLDERS = (
    "/usr/lib/chromium",
    "/usr/lib/chromium-browser",
    "/usr/lib64/chromium-browser",
    "/snap/chromium/current/usr/lib/chromium-browser",
    "/opt/google/chrome",
    "/opt/chromium.org/chromium",
    "/opt/microsoft/msedge",
)
CACHED = ("ms-playwright/chromium*/chrome-linux*", "puppeteer/chrome*/*/chrome*linux*")
"""Browsers that test tools keep below ~/.cache."""

TIMEOUT_S = 600


def find(named: str | None = None, root: Path = Path("/"), home: Path | None = None) -> Path | None:
    """The description of a SwiftShader whose library is there, too; `named`, if given, whatever it is."""
    if named:
        return Path(named)
    folders = [root / folder.lstrip("/") for folder in FOLDERS]
    folders += [f for pattern in CACHED for f in sorted(((home or Path.home()) / ".cache").glob(pattern))]
    for folder in folders:
        found = folder / DESCRIPTION
        if found.is_file() and (folder / json.loads(found.read_text())["ICD"]["library_path"]).is_file():
            return found
    return None


@pytest.fixture(scope="module")
def swiftshader() -> dict[str, str]:
    """The environment of a process that sees this driver and no other."""
    if sys.platform != "linux":
        pytest.skip("SwiftShader is tried through the Vulkan loader of Linux")
    found = find(os.environ.get(PLACE))
    if found is None:
        pytest.skip(f"no SwiftShader here; it comes with Chromium, or {PLACE} names its {DESCRIPTION}")
    assert found.is_file(), f"{PLACE} names {found}, which is no file"
    return {**os.environ, "VK_DRIVER_FILES": str(found), "KERNELFORGE_GPU": "SwiftShader"}


def run(environment: dict[str, str], *arguments: str) -> str:
    """The output of a Python process that ended well."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_oracles_of_the_decoder(swiftshader: dict[str, str]) -> None:
    check = Path(__file__).with_name("test_gpu_decoder.py")
    said = run(swiftshader, "pytest", "-q", "-p", "no:cacheprovider", str(check))
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize(("plugin", "least"), [("metal", 500), ("rowwise", 10)])
def test_kernels_are_conformant(swiftshader: dict[str, str], plugin: str, least: int) -> None:
    """All of them, at the level of every other GPU in these tests (test_conformance.py)."""
    command = ("conformance", "run", plugin, "--level", "1", "--timeout", "300")
    totals = json.loads(run(swiftshader, "kernelforge", "--json", *command))["data"]["totals"]
    assert totals["passed"] >= least
    assert totals["failed"] == totals["expected-failure"] == 0


@pytest.mark.parametrize(
    ("op", "case"),
    [("rms_norm", "gpu/transformer.rms_norm/wgsl/4/*.inf.*"), ("softmax", "gpu/transformer.softmax/wgsl/4/*.inf.*")],
)
def test_infinity_beside_numbers(swiftshader: dict[str, str], op: str, case: str) -> None:
    """Bits of a NaN reach the other half of a word in this driver's `pack2x16float`, and its `exp` of NaN is a number."""
    command = ("conformance", "run", "metal", "--op", op, "--case", case)
    totals = json.loads(run(swiftshader, "kernelforge", "--json", *command, "--timeout", "300"))["data"]["totals"]
    assert totals["passed"] > 1
    assert totals["failed"] == 0


def test_a_nan_stays_one(swiftshader: dict[str, str]) -> None:
    """This driver's `exp` has a number for it."""
    check = Path(__file__).parent.parent / "kernelforge-metal" / "tests" / "test_gpu_kernels.py"
    said = run(swiftshader, "pytest", "-q", "-p", "no:cacheprovider", str(check), "-k", "test_nan")
    assert "6 passed" in said


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    assert find(root=tmp_path, home=tmp_path) is None
    assert find("/somewhere/icd.json") == Path("/somewhere/icd.json")
    cached = tmp_path / ".cache/ms-playwright/chromium-1200/chrome-linux64" / DESCRIPTION
    installed = tmp_path / "opt/google/chrome" / DESCRIPTION
    for place in (cached, installed):
        place.parent.mkdir(parents=True)
        place.write_text('{"ICD": {"library_path": "./libvk_swiftshader.so"}}')
        assert find(root=tmp_path, home=tmp_path) != place  # without its library
        (place.parent / "libvk_swiftshader.so").touch()
        assert find(root=tmp_path, home=tmp_path) == place
