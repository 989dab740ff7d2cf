from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheelhouse import PACKAGES, need_index, succeed


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of every package, each built from its source distribution."""
    folder = tmp_path_factory.mktemp("wheels")
    need_index(folder)
    for package in PACKAGES:
        succeed("build", "--quiet", "--package", package, "--out-dir", str(folder))
    return folder
