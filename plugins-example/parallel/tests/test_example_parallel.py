from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kernelforge.errors import AssetError
from kernelforge.session import Session
from kernelforge_llm.decoder import load

Array = np.ndarray[Any, np.dtype[Any]]

CONFIG = {
    "architectures": ["ParallelLlamaForCausalLM"],
    "model_type": "parallel_llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture
def tensors() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (16,)
        for projection, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
            shapes[f"{name}.self_attn.{projection}.weight"] = (rows, 16)
        for projection, shape in (("gate_proj", (24, 16)), ("up_proj", (24, 16)), ("down_proj", (16, 24))):
            shapes[f"{name}.mlp.{projection}.weight"] = shape
    return {name: (rng.standard_normal(shape) / 3).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Array], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path / "home"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, model / "model.safetensors")
    return model


def rms_norm(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean() + 1e-5) * weight)


def first_token_logits(tensors: dict[str, Array], token: int) -> Array:
    """In float64. A first token sees itself alone, so that attention gives its values: RoPE and scores do not matter."""
    t = {name: a.astype(np.float64) for name, a in tensors.items()}
    table = t["model.embed_tokens.weight"]
    x = table[token]
    for layer in range(2):
        name = f"model.layers.{layer}"
        h = rms_norm(x, t[f"{name}.input_layernorm.weight"])
        values = (t[f"{name}.self_attn.v_proj.weight"] @ h).reshape(2, 4)  # [kv heads, head_dim]
        attended = t[f"{name}.self_attn.o_proj.weight"] @ values.repeat(2, axis=0).reshape(-1)
        gate, up = (t[f"{name}.mlp.{p}_proj.weight"] @ h for p in ("gate", "up"))
        x = x + attended + t[f"{name}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    return np.asarray(table @ rms_norm(x, t["model.norm.weight"]))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_it_computes_what_its_formula_says(folder: Path, tensors: dict[str, Array], target: str) -> None:
    with Session(target, threads=1) as session:
        logits = np.asarray(load(folder, session=session).logits([7]))
    np.testing.assert_allclose(logits.reshape(-1), first_token_logits(tensors, 7), rtol=1e-4, atol=1e-5)


def test_it_generates(folder: Path) -> None:
    with Session("reference") as session:
        decoder = load(folder, session=session)
        first, again = (list(decoder.generate([3, 1, 4], 5)) for _ in range(2))
    assert len(first) == 5
    assert [token.id for token in first] == [token.id for token in again]


def test_a_missing_tensor_is_named(folder: Path, tensors: dict[str, Array]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with Session("reference") as session, pytest.raises(AssetError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, session=session).logits([7])
