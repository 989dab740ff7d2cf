from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

from kernelforge.errors import KernelForgeWarning
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session
from kernelforge_metal.adapters import list_adapters
from kernelforge_metal.backend import WITHOUT

NO_GPU = "no GPU adapter here; on Debian and Ubuntu: apt install mesa-vulkan-drivers libvulkan1"


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def open_session(without: str) -> Iterator[Session]:
    if not list_adapters():
        pytest.skip(NO_GPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WITHOUT, without)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
            session = Session("gpu", records=NO_RECORDS)
    with session:
        yield session


@pytest.fixture(scope="session")
def gpu(state_folder: None) -> Iterator[Session]:
    """The first adapter with all its features: pipelines are shared by all tests."""
    yield from open_session("")


@pytest.fixture(scope="session")
def plain_gpu(state_folder: None) -> Iterator[Session]:
    """The same adapter as if it had no optional features."""
    yield from open_session("shader-f16,subgroup,immediates,timestamp-query")
