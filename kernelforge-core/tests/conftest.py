from __future__ import annotations

from pathlib import Path

import pytest
from plugin_dist import Site


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a state folder of its own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KERNELFORGE_HOME", str(folder))
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A folder for plugin distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)
