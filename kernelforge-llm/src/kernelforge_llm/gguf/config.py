"""The metadata of a GGUF file as the content of a config.json and a generation_config.json."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.gguf.tensors import ROPE_FACTORS

if TYPE_CHECKING:
    from kernelforge_llm.gguf.file import GgufFile

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""`general.architecture` -> class. Mistral's files say llama: without a window they are."""

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Key of config.json -> key in the metadata, after the architecture and a dot."""

_END_MARKS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")
"""Special tokens that end an answer wherever a vocabulary has them."""

_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


def model_config(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises `AssetError` for an architecture or a setting that is not supported."""
    try:
        return _config(file), _generation(file)
    except AssetError as error:
        raise AssetError(f"{file.path}: {error}", hint=error.hint) from None


def _config(file: GgufFile) -> dict[str, Any]:
    metadata, tensors = file.metadata, file.entries
    family = metadata.get("general.architecture")
    if family not in _CLASSES:
        raise AssetError(f"architecture {shorten(family)} is not supported", hint=f"supported: {', '.join(_CLASSES)}")

    def get(key: str) -> Any:
        return metadata.get(f"{family}.{key}")

    if get("expert_count"):
        raise AssetError(f"is a mixture of {get('expert_count')} experts, which is not supported")
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise AssetError("has no table of embeddings (token_embd.weight)")
    config: dict[str, Any] = {"architectures": [_CLASSES[family]], "model_type": family, "vocab_size": table.shape[0]}
    for key, name in _SIZES.items():
        config[key] = _single(f"{family}.{name}", get(name))
        if config[key] is None:
            raise AssetError(f"{family}.{name} is missing")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = (
        _single(f"{family}.attention.head_count_kv", get("attention.head_count_kv")) or heads
    )
    config["head_dim"] = head_dim = get("attention.key_length") or hidden // max(1, heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name) not in (None, head_dim):
            raise AssetError(f"{family}.{name} is {shorten(get(name))}; other than {head_dim} is not supported")
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config |= _biases(file, family)
    if family == "llama" and get("attention.sliding_window"):
        config |= {"architectures": ["MistralForCausalLM"], "sliding_window": get("attention.sliding_window")}
    config["rope_parameters"] = _rope(file, family, head_dim)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = metadata.get("tokenizer.ggml.eos_token_id")
    return config


def _single(key: str, value: Any) -> Any:
    """A number that may be given once or for each layer."""
    import numpy as np

    if not isinstance(value, np.ndarray):
        return value
    if not value.size or (value != value[0]).any():
        raise AssetError(f"{key} differs from layer to layer, which is not supported")
    return value[0].item()


def _biases(file: GgufFile, family: str) -> dict[str, Any]:
    def has(name: str) -> bool:
        return f"blk.0.{name}.bias" in file.entries

    if family == "qwen2":
        return {}  # the architecture says so
    if has("attn_q") != has("attn_output"):
        raise AssetError("has biases on some projections of the attention only, which is not supported")
    found = {"attention_bias": has("attn_q")}
    return found if family == "qwen3" else {**found, "mlp_bias": has("ffn_gate")}


def _rope(file: GgufFile, family: str, head_dim: int) -> dict[str, Any]:
    def get(key: str) -> Any:
        return file.metadata.get(f"{family}.rope.{key}")

    theta = get("freq_base") or 10000.0
    kind, factor = get("scaling.type") or "none", get("scaling.factor") or get("scale_linear") or 1.0
    if kind == "none":
        kind = "linear" if get("scale_linear") not in (None, 1.0) else "default"
    if ROPE_FACTORS in file.entries:
        return {"rope_theta": theta, **_llama3(file, theta, head_dim)}
    if unknown := [n for n in ("rope_factors_long.weight", "rope_factors_short.weight") if n in file.entries]:
        raise AssetError(f"scales RoPE by {unknown[0]}, which is not supported")
    scaled = {"factor": factor} if kind == "linear" else {}
    return {"rope_type": kind, "rope_theta": theta, **scaled}


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Which of Llama 3's parameters give the factors in the file, by which RoPE's frequencies are divided."""
    import numpy as np

    entry = file.entries[ROPE_FACTORS]
    if entry.type.name != "F32" or entry.shape != (head_dim // 2,):
        raise AssetError(f"{ROPE_FACTORS} is {entry.type.name}{list(entry.shape)}, not F32[{head_dim // 2}]")
    given = file.data[entry.start : entry.stop].view(np.float32)
    factor = float(given.max())
    if not 1 <= factor <= 1e6:
        raise AssetError(f"{ROPE_FACTORS} has a factor of {factor:g}")
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for original in (1 << n for n in range(4, 24)):
        kept = np.clip((original / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
        if np.allclose(given, 1 / ((1 - kept) / factor + kept), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": original,
            }
    raise AssetError(f"{ROPE_FACTORS} does not follow Llama 3's rule, and no other is supported")


def _generation(file: GgufFile) -> dict[str, Any]:
    """The tokens that end an answer."""
    metadata = file.metadata
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ends += [tokens.index(mark) for mark in _END_MARKS if mark in tokens]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return {"eos_token_id": found} if found else {}
