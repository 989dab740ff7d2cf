"""The text of a model's module is kept on disk: a second start does not write it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernelforge import home, plan_cache
from kernelforge.errors import KernelForgeWarning
from kernelforge.registry import default_registry
from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.model import Model
from kernelforge_llm.source import open_source

ORACLE = Path(__file__).parent / "data" / "oracles" / "llama-gqa"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written since; the folder is the test's own."""
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path / "home"))
    found: list[str] = []
    original = Llama.hidden_states

    def hidden_states(self, *args):  # type: ignore[no-untyped-def]
        found.append("hidden_states")
        return original(self, *args)

    monkeypatch.setattr(Llama, "hidden_states", hidden_states)
    return found


def module(weights: str = "native", context: int = 64) -> str:
    return Model.make(open_source(ORACLE), default_registry(), weights=weights, context=context).module  # type: ignore[arg-type]


def test_it_is_written_once_for_the_same_model_and_choices(written: list[str]) -> None:
    first = module()
    assert module() == first
    assert written == ["hidden_states"]
    others = {module("q4"), module("f16"), module(context=65)}
    assert len(others | {first}) == 4
    assert len(written) == 4


def test_a_damaged_file_is_written_anew(written: list[str]) -> None:
    first = module()
    (file,) = (home.cache_dir() / "plans").glob("*.mlir")
    for content in (b"", b"\xff\xfe", file.read_bytes()[:-9], b"x" + file.read_bytes()):
        file.write_bytes(content)
        assert module() == first
    assert len(written) == 5


def test_other_code_writes_anew(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = module()
    monkeypatch.setattr(plan_cache, "_stamp", lambda packages: "another")
    assert module() == first
    assert len(written) == 2


def test_what_is_warned_of_is_warned_of_at_every_start(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernelforge_llm.weights.GROUP", 64)
    for _ in range(2):
        with pytest.warns(KernelForgeWarning, match="not quantised"):
            Model.make(open_source(ORACLE), default_registry(), weights="q4").module  # noqa: B018
    assert len(written) == 2
