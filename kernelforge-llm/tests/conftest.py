from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kernelforge.session import Session


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own state; all share compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", params=["reference", "cpu"])
def session(request: pytest.FixtureRequest, state_folder: None) -> Iterator[Session]:
    with Session(request.param, threads=2) as session:
        yield session
