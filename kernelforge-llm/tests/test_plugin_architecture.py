"""An architecture that another package brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import AssetError, PluginError
from kernelforge.graph import Graph, Tensor
from kernelforge.hookspecs import hookimpl
from kernelforge.plugins import load_registry
from kernelforge.session import Session
from kernelforge_llm.architecture import ArchitectureSpec
from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.decoder import load
from kernelforge_llm.model import StepInputs
from kernelforge_llm.weights import WeightTable

LLAMA = Path(__file__).parent / "data" / "oracles" / "llama-gqa"


class Doubled(Llama):
    """Llama whose final states are twice as large, and with a key of its own in config.json."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        if raw.get("doubling") != 2:
            raise AssetError(f"{source}: doubling must be 2")
        return ModelConfig.from_hf(raw, generation=generation, source=source, known_keys=frozenset({"doubling"}))

    def hidden_states(self, g: Graph, config: ModelConfig, weights: WeightTable, step: StepInputs) -> Tensor:
        states = super().hidden_states(g, config, weights, step)
        return states + states


class Plugin:
    @hookimpl
    def kernelforge_architectures(self) -> list[ArchitectureSpec]:
        return [ArchitectureSpec("DoubledForCausalLM", "doubled", Doubled, "twice a Llama")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(LLAMA, copy)
    config = json.loads((copy / "config.json").read_text())
    changes = {"architectures": ["DoubledForCausalLM"], "model_type": "doubled", "doubling": 2}
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_an_architecture_of_another_plugin_is_found_and_runs(folder: Path) -> None:
    registry = load_registry(extra_plugins=[Plugin()])
    names = {spec.name: str(spec.provenance) for spec in registry.extra("kernelforge_architectures")}
    assert set(names) >= {"LlamaForCausalLM", "DoubledForCausalLM"}
    assert "kernelforge-llm" in names["LlamaForCausalLM"]
    ids = [3, 1, 4, 1, 5]
    with Session("reference", registry=registry) as session:
        doubled = load(folder, session=session).logits(ids)
        np.testing.assert_allclose(doubled, 2 * load(LLAMA, session=session).logits(ids), rtol=1e-5, atol=1e-5)


def test_its_own_errors_name_the_file(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"doubling": 2', '"doubling": 3'))
    with (
        Session("reference", registry=load_registry(extra_plugins=[Plugin()])) as session,
        pytest.raises(AssetError, match=r"config.json: doubling must be 2"),
    ):
        load(folder, session=session)


def test_without_the_plugin_it_is_unknown(folder: Path) -> None:
    with (
        Session("reference") as session,
        pytest.raises(AssetError, match=r"architecture 'DoubledForCausalLM' is unknown") as caught,
    ):
        load(folder, session=session)
    assert caught.value.hint is not None
    assert "kernelforge_architectures" in caught.value.hint


def test_a_name_can_be_taken_once() -> None:
    class Again:
        @hookimpl
        def kernelforge_architectures(self) -> list[ArchitectureSpec]:
            return [ArchitectureSpec("LlamaForCausalLM", "llama", Doubled)]

    with pytest.raises(PluginError, match=r"'LlamaForCausalLM' is already registered by .*kernelforge-llm"):
        load_registry(extra_plugins=[Again()])


def test_a_name_that_no_class_has_is_refused() -> None:
    with pytest.raises(PluginError, match="'my model' must be a class name"):
        ArchitectureSpec("my model", "mine", Doubled)
