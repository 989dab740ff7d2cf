"""From the `config.json` of a Hugging Face checkpoint to a `ModelConfig`.

Both spellings are read: the present one (`rope_parameters`, `dtype`) and the older one that most published checkpoints
carry (`rope_scaling` with `type` or `rope_type`, `rope_theta`, `torch_dtype`). A key that changes results and is not
supported is an error that names it; one that is known to change nothing is ignored; one that is not known at all is
named in a `KernelForgeWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge_llm.config import ACTIVATIONS, CONFIG_FILE, GENERATION_FILE, ROPE_KEYS, ModelConfig, RopeConfig
from kernelforge_llm.config_keys import COMMON_KEYS, SLIDING_KEYS, shorten, unknown_keys
from kernelforge_llm.config_values import check_size, is_int, required, string, value_or
from kernelforge_llm.files import read_json_object


def model_config(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    source: str,
    defaults: Mapping[str, Any],
    known_keys: frozenset[str],
    *,
    sliding: bool,
    qkv_bias: bool,
    qk_norm: bool,
) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    values = {**defaults, **raw}
    try:
        rope, unused = _read_rope(values)
        known = COMMON_KEYS | known_keys | (SLIDING_KEYS if sliding else frozenset())
        unused += unknown_keys(values, known)
        window, sliding_layers = _read_sliding(values) if sliding else (None, ())
        activation = string(values, "hidden_act", "silu")
        config = ModelConfig(
            architecture=architecture_name(values),
            model_type=string(values, "model_type", ""),
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "hidden_size"),
            intermediate_size=required(values, "intermediate_size"),
            num_layers=required(values, "num_hidden_layers"),
            num_heads=required(values, "num_attention_heads"),
            num_kv_heads=value_or(values, "num_key_value_heads", values.get("num_attention_heads")),
            head_dim=_head_dim(values),
            max_position=required(values, "max_position_embeddings"),
            rms_norm_eps=value_or(values, "rms_norm_eps", 1e-6),
            hidden_act=ACTIVATIONS.get(activation, activation),
            tie_word_embeddings=value_or(values, "tie_word_embeddings", False),
            attention_bias=value_or(values, "attention_bias", False),
            qkv_bias=qkv_bias,
            mlp_bias=value_or(values, "mlp_bias", False),
            qk_norm=qk_norm,
            sliding_window=window,
            sliding_layers=sliding_layers,
            rope=rope,
            dtype=string(values, "dtype", string(values, "torch_dtype", "")).removeprefix("torch.") or None,
            bos_token_id=value_or(generation, "bos_token_id", values.get("bos_token_id")),
            eos_token_ids=_read_ids(value_or(generation, "eos_token_id", values.get("eos_token_id"))),
        )
    except AssetError as error:
        raise AssetError(f"{source}: {error}", hint=error.hint) from None
    if unused:
        keys = ", ".join(sorted(unused))
        warnings.warn(f"{source}: ignored without knowing what they mean: {keys}", KernelForgeWarning, stacklevel=3)
    return config


def architecture_name(raw: Mapping[str, Any]) -> str:
    """The first of a config's `architectures`, such as `LlamaForCausalLM`; empty if it has none."""
    names = raw.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise AssetError(f"architectures must be a list of names, not {shorten(names)}")
    return names[0]


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint's config.json and generation_config.json (empty if there is none). Raises `AssetError`."""
    raw = read_json_object(folder / CONFIG_FILE)
    generation = folder / GENERATION_FILE
    return raw, read_json_object(generation) if generation.is_file() else {}


def _read_rope(values: Mapping[str, Any]) -> tuple[RopeConfig, list[str]]:
    """RoPE's configuration, and the names of keys that have no effect on its kind."""
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = value_or(values, key, {})
        if not isinstance(part, dict):
            raise AssetError(f"{key} must be an object, not {shorten(part)}")
        given.update(part)
    kind = string(given, "rope_type", string(given, "type", "default"))
    theta = value_or(given, "rope_theta", value_or(values, "rope_theta", 10000.0))
    if value_or(given, "partial_rotary_factor", 1) != 1:
        raise AssetError("partial_rotary_factor other than 1 is not supported")
    if values.get("original_max_position_embeddings") is not None and kind == "llama3":
        given.setdefault("original_max_position_embeddings", values["original_max_position_embeddings"])
    keys = ROPE_KEYS.get(kind, {})
    rope = RopeConfig(theta=theta, kind=kind, **{field: required(given, key) for key, field in keys.items()})
    rest = given.keys() - keys.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unsupported := sorted(rest - ROPE_KEYS["llama3"].keys()):
        raise AssetError(f"rope_parameters has {shorten(unsupported[0])}, which is not supported")
    return rope, [f"rope_parameters.{key}" for key in rest]


def _read_sliding(values: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and for each layer whether it has it."""
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if not values.get("use_sliding_window", True) or (window is None and kinds is None):
        return None, ()
    if kinds is None:
        first, count = value_or(values, "max_window_layers", 0), required(values, "num_hidden_layers")
        if not is_int(first):
            raise AssetError(f"max_window_layers must be an integer, not {shorten(first)}")
        check_size("num_hidden_layers", count, 1 << 10)
        layers = tuple(layer >= first for layer in range(count))
    elif isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        layers = tuple(kind == "sliding_attention" for kind in kinds)
    else:
        raise AssetError(f"layer_types must be a list of full_attention and sliding_attention, not {shorten(kinds)}")
    return (window, layers) if any(layers) else (None, ())


def _read_ids(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _head_dim(values: Mapping[str, Any]) -> Any:
    if values.get("head_dim") is not None:
        return values["head_dim"]
    hidden, heads = required(values, "hidden_size"), required(values, "num_attention_heads")
    check_size("hidden_size", hidden, 1 << 17)
    check_size("num_attention_heads", heads, 1 << 14)
    if hidden % heads:
        raise AssetError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    return hidden // heads
