from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge_llm import config as config_module
from kernelforge_llm.config import ModelConfig, RopeConfig
from kernelforge_llm.config_file import architecture_name, read_config

ORACLES = Path(__file__).parent / "data" / "oracles"
TINYPY = Path(config_module.__file__).parent / "assets" / "tinypy"

PRESENT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


def parse(changes: dict[str, Any] | None = None, **options: Any) -> ModelConfig:
    """PRESENT with changes (`...` removes a key), any warning being an error."""
    raw = {key: value for key, value in {**PRESENT, **(changes or {})}.items() if value is not ...}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ModelConfig.from_hf(raw, **options)


def test_reads_tinypy() -> None:
    raw, generation = read_config(TINYPY)
    assert ModelConfig.from_hf(raw, generation=generation) == ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_position=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope=RopeConfig(theta=10000.0),
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_ids=(0,),
    )


@pytest.mark.parametrize("folder", sorted(ORACLES.iterdir()), ids=lambda folder: folder.name)
def test_reads_every_oracle_without_a_warning(folder: Path) -> None:
    raw, generation = read_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_hf(raw, generation=generation, sliding="llama" not in folder.name)
    assert (config.num_layers, config.vocab_size, config.eos_token_ids) == (3, 320, (2,))
    assert [config.window(layer) for layer in range(3)] == [16 if folder.name == "mistral-sliding" else None] * 3


def test_the_older_spelling_means_the_same() -> None:
    older = {key: value for key, value in PRESENT["rope_parameters"].items() if key != "rope_theta"}
    for kind in ("type", "rope_type"):
        scaling = {kind: older["rope_type"], **{key: value for key, value in older.items() if key != "rope_type"}}
        assert (
            parse(
                {
                    "rope_parameters": ...,
                    "dtype": ...,
                    "rope_theta": 500000.0,
                    "rope_scaling": scaling,
                    "torch_dtype": "bfloat16",
                }
            )
            == parse()
        )
    assert parse({"rope_parameters": ..., "rope_scaling": None, "rope_theta": 1000000}).rope == RopeConfig(1e6)
    assert parse({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2}}).rope.factor == 2
    assert parse({"rope_parameters": ...}, defaults={"rope_theta": 5e5}).rope == RopeConfig(5e5)
    assert isinstance(parse({"rope_parameters": ..., "rope_theta": 1000000}).rope.theta, float)


def test_absent_keys_have_the_usual_meaning() -> None:
    config = parse({"num_key_value_heads": None, "rms_norm_eps": ..., "dtype": ..., "eos_token_id": None})
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (6, 16, 1e-6)
    assert (config.hidden_act, config.tie_word_embeddings, config.dtype) == ("silu", False, None)
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("name", "canonical"), [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_activations(name: str, canonical: str) -> None:
    assert parse({"hidden_act": name}).hidden_act == canonical


def test_generation_config_takes_precedence() -> None:
    assert parse(generation={"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert parse(generation={"eos_token_id": None}).eos_token_ids == (2, 3)
    assert parse(generation={"bos_token_id": 5, "temperature": 0.6}).bos_token_id == 5


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8}, [8, 8, 8, 8]),
        ({"sliding_window": None}, [None] * 4),
        ({"sliding_window": 8, "use_sliding_window": False}, [None] * 4),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 8]),
        ({"sliding_window": 8, "max_window_layers": 28}, [None] * 4),
        ({"sliding_window": 8, "max_window_layers": 0}, [8] * 4),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}, [8, None, 8, None]),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 4}, [None] * 4),
    ],
)
def test_sliding_windows(changes: dict[str, Any], windows: list[int | None]) -> None:
    config = parse(changes, sliding=True)
    assert [config.window(layer) for layer in range(4)] == windows


def test_switches_of_the_architecture() -> None:
    config = parse({"attention_bias": True, "mlp_bias": True}, qk_norm=True)
    assert (config.attention_bias, config.mlp_bias, config.qkv_bias, config.qk_norm) == (True, True, False, True)
    assert parse(qkv_bias=True).qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ...}, "config.json: vocab_size is missing"),
        ({"hidden_size": -96}, "hidden_size must be from 1 to 131072, not -96"),
        ({"hidden_size": 0}, "hidden_size must be from 1"),
        ({"intermediate_size": 10**15}, "intermediate_size must be from 1 to 1048576"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers must be from 1 to 1024"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be an integer, not '3'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, not True"),
        ({"vocab_size": 320.0}, "vocab_size must be an integer, not 320.0"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings must be from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be from 1"),
        ({"num_attention_heads": []}, r"num_attention_heads must be an integer, not \[\]"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 96 is not a multiple of num_attention_he"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0 and at most 1, not nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, not '1e-5'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"hidden_act": 3}, "hidden_act must be a string, not 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"eos_token_id": 320}, "eos_token_id must be an integer from 0 to 319, not 320"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id must be an integer from 0 to 319, not '</s>'"),
        ({"bos_token_id": -1}, "bos_token_id must be an integer from 0 to 319, not -1"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"rope_parameters": []}, r"rope_parameters must be an object, not \[\]"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope_type must be a string"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor must be above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be above 0"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2]}}, "rope_parameters has 'mrope_section'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1"),
        ({"rope_parameters": {**PRESENT["rope_parameters"], "high_freq_factor": 1.0}}, "high_freq_factor must be abov"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 changes results and is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 changes results"),
        ({"logit_scale": 0.0625}, "logit_scale = 0.0625 changes results"),
        ({"attention_multiplier": 0.1}, "attention_multiplier = 0.1 changes results"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method': 'gptq'} changes"),
        ({"num_local_experts": 8}, "num_local_experts = 8 changes results"),
        ({"use_qk_norm": True}, "use_qk_norm = True changes results"),
        ({"logits_scaling": True}, "logits_scaling = True changes results"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssetError, match=message) as caught:
        parse(changes)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window must be from 1"),
        ({"sliding_window": "8"}, "sliding_window must be an integer"),
        ({"sliding_window": 8, "max_window_layers": "3"}, "max_window_layers must be an integer"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
        ({"sliding_window": 8, "layer_types": ["chunked_attention"] * 4}, "layer_types must be a list of full_attenti"),
        ({"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
    ],
)
def test_refuses_windows(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssetError, match=message):
        parse(changes, sliding=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "x" * 5000},
        {"mlp_bias": "x" * 5000},
        {"dtype": "x" * 5000},
        {"eos_token_id": "x" * 5000},
        {"architectures": "x" * 5000},
        {"rope_parameters": {"rope_type": "x" * 5000, "rope_theta": 1e4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_shown_of_a_value_is_short(changes: dict[str, Any]) -> None:
    with pytest.raises(AssetError, match=r"xxx\.\.\.") as caught:
        parse(changes)
    assert len(str(caught.value)) < 200


def test_keys_that_are_off_or_harmless_are_ignored() -> None:
    off = {
        "partial_rotary_factor": 1.0,
        "logits_scaling": 1,
        "num_experts": 0,
        "quantization_config": None,
        "use_mrope": False,
        "pretraining_tp": 2,
        "initializer_range": 0.02,
        "transformers_version": "4.40.0",
        "_name_or_path": "somewhere",
        "sliding_window": None,
    }
    assert parse(off) == parse()


def test_an_unknown_key_is_named_once() -> None:
    with pytest.warns(KernelForgeWarning, match="ignored without knowing what they mean: novelty, surprise") as caught:
        config = ModelConfig.from_hf(
            {**PRESENT, "surprise": 3, "novelty": "x", "nothing": None}, source="a/config.json"
        )
    assert len(caught) == 1
    assert str(caught[0].message).startswith("a/config.json")
    assert config == parse()
    assert parse({"surprise": 3}, known_keys=frozenset(["surprise"])) == parse()
    assert parse({"num_experts": 4}, known_keys=frozenset(["num_experts"])) == parse()


def test_an_unused_rope_key_is_named() -> None:
    with pytest.warns(KernelForgeWarning, match=r"rope_parameters\.factor"):
        ModelConfig.from_hf({**PRESENT, "rope_parameters": {"rope_type": "default", "factor": 2.0}})


def test_a_config_made_by_hand_is_checked_too() -> None:
    with pytest.raises(AssetError, match="num_hidden_layers must be from 1"):
        dataclasses.replace(parse(), num_layers=0)


def test_architecture_name() -> None:
    assert architecture_name(PRESENT) == "LlamaForCausalLM"
    assert architecture_name({}) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vocab_size": ', "config.json is not JSON"),
        (b"\xff\xfe\x00", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "config.json is not JSON"),
        (b"[1, 2]", "config.json holds a JSON list, not an object"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(AssetError, match=message):
        read_config(tmp_path)


def test_a_missing_or_huge_file(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"config\.json cannot be read: No such file") as caught:
        read_config(tmp_path)
    assert caught.value.exit_code == 13
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((1 << 26) + 1)
    with pytest.raises(AssetError, match="has 67108865 bytes"):
        read_config(tmp_path)


def test_generation_config_is_read_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESENT))
    assert read_config(tmp_path) == (PRESENT, {})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert read_config(tmp_path)[1] == {"eos_token_id": 4}
