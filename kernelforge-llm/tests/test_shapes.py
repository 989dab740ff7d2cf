from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kernelforge.errors import AssetError, UsageError
from kernelforge_llm import shapes as shapes_module
from kernelforge_llm.checkpoint import Checkpoint
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.shapes import NAMED_SHAPES, random_checkpoint

TINYPY = Path(shapes_module.__file__).parent / "assets" / "tinypy"

PARAMETERS = {"tinypy": 6_951_168, "smollm2-135m": 134_515_008, "llama-1b": 1_040_254_976}


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_shapes_are_configs_with_their_tensors(name: str) -> None:
    source = random_checkpoint(name)
    config = ModelConfig.from_hf(source.config)
    assert (config.architecture, config.tie_word_embeddings, config.eos_token_ids) == ("LlamaForCausalLM", True, ())
    assert sum(int(np.prod(source.shape(tensor))) for tensor in source.names()) == PARAMETERS[name]


def test_tinypy_is_shaped_as_the_checkpoint_is() -> None:
    source, checkpoint = random_checkpoint("tinypy"), Checkpoint.open(TINYPY)
    assert {name: source.shape(name) for name in source.names()} == {
        name: checkpoint.shape(name) for name in checkpoint.names()
    }
    config = json.loads((TINYPY / "config.json").read_text())
    same = NAMED_SHAPES["tinypy"].keys() - {"bos_token_id", "eos_token_id"}
    assert {key: NAMED_SHAPES["tinypy"][key] for key in same} == {key: config[key] for key in same}


def test_weights_are_normal_and_norms_are_ones() -> None:
    source = random_checkpoint("tinypy", seed=5)
    matrix = source.tensor("model.layers.3.mlp.down_proj.weight")
    assert matrix.dtype == ml_dtypes.bfloat16 == source.dtype("model.layers.3.mlp.down_proj.weight")
    values = matrix.astype(np.float64).ravel() * np.sqrt(704)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    # Kurtosis and neighbours: a normal distribution, and independent draws.
    assert abs((values**4).mean() - 3) < 0.1
    assert abs((values[1:] * values[:-1]).mean()) < 0.01
    assert (source.tensor("model.norm.weight") == 1).all()


def test_a_seed_decides_each_tensor_on_its_own() -> None:
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    source = random_checkpoint("tinypy", seed=1)
    source.tensor(other)
    first = source.tensor(name).tobytes()
    assert random_checkpoint("tinypy", seed=1).tensor(name).tobytes() == first
    assert random_checkpoint("tinypy", seed=2).tensor(name).tobytes() != first
    assert source.tensor(other).tobytes() != first


def test_what_there_is_not() -> None:
    with pytest.raises(UsageError, match="there is no shape 'gpt-5'") as caught:
        random_checkpoint("gpt-5")
    assert caught.value.hint == "shapes: tinypy, smollm2-135m, llama-1b"
    with pytest.raises(UsageError, match="the seed must be an integer from 0, not -1"):
        random_checkpoint("tinypy", seed=-1)
    with pytest.raises(AssetError, match=r"the random checkpoint has no tensor 'lm_head\.weight'"):
        random_checkpoint("tinypy").tensor("lm_head.weight")
