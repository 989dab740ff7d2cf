from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield
