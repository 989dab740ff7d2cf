"""A model's configuration: sizes and switches, checked. `config_file` reads one from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.config_values import check_size, is_int, set_number

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

# field of ModelConfig -> (key in config.json, largest value that can be meant)
_SIZES = {
    "vocab_size": ("vocab_size", 1 << 24),
    "hidden_size": ("hidden_size", 1 << 17),
    "intermediate_size": ("intermediate_size", 1 << 20),
    "num_layers": ("num_hidden_layers", 1 << 10),
    "num_heads": ("num_attention_heads", 1 << 14),
    "num_kv_heads": ("num_key_value_heads", 1 << 14),
    "head_dim": ("head_dim", 1 << 13),
    "max_position": ("max_position_embeddings", 1 << 27),
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


# gelu_new, gelu_fast and gelu_pytorch_tanh are one formula, the tanh approximation.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Spellings of activations in checkpoints, each with the op that it is."""

ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
}
"""For each kind of RoPE the keys that it reads, each with its field in RopeConfig; keys of another kind have no effect."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, RoFormer): `inv_freq[i] = theta ** (-2 i / head_dim)`, then scaled.

    The kind `default` leaves the frequencies, `linear` divides them by `factor`. `llama3` divides the low ones by
    `factor`, keeps the high ones and blends those between: wavelengths from `original_max_position / high_freq_factor`
    to `original_max_position / low_freq_factor` positions.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KEYS:
            raise AssetError(
                f"rope_type {shorten(self.kind)} is not supported",
                hint=f"supported kinds of RoPE: {', '.join(ROPE_KEYS)}",
            )
        set_number(self, "theta", "rope_theta", above=0.0, most=1e15)
        set_number(self, "factor", "factor", above=0.0, most=1e6)
        if self.kind == "llama3":
            set_number(self, "low_freq_factor", "low_freq_factor", above=0.0, most=1e6)
            set_number(self, "high_freq_factor", "high_freq_factor", above=self.low_freq_factor, most=1e6)
            check_size("original_max_position_embeddings", self.original_max_position, 1 << 27)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a decoder. Raises `AssetError` with the name of the key if a value cannot be meant."""

    architecture: str
    """The class name in `architectures`, such as `LlamaForCausalLM`; empty if the file has none."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Positions the model was made for: the longest prompt plus answer, in tokens."""
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    """`silu`, `gelu` (exact) or `gelu_tanh`."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections, none on o."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each head's queries and keys, before RoPE."""
    sliding_window: int | None = None
    """Keys that a query of a sliding layer sees, itself included."""
    sliding_layers: tuple[bool, ...] = ()
    """One per layer; empty: every layer slides if there is a window."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    dtype: str | None = None
    """The dtype the weights are said to have: `float32`, `bfloat16`, `float16`, `float64`, or None."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, (key, limit) in _SIZES.items():
            check_size(key, getattr(self, name), limit)
        if self.num_heads % self.num_kv_heads:
            raise AssetError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise AssetError(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        set_number(self, "rms_norm_eps", "rms_norm_eps", above=0.0, most=1.0)
        if self.hidden_act not in ACTIVATIONS.values():
            raise AssetError(
                f"hidden_act {shorten(self.hidden_act)} is not supported", hint=f"supported: {', '.join(ACTIVATIONS)}"
            )
        for name in ("tie_word_embeddings", "attention_bias", "qkv_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise AssetError(f"{name} must be true or false, not {shorten(getattr(self, name))}")
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window, 1 << 27)
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise AssetError(f"layer_types has {len(self.sliding_layers)} entries for {self.num_layers} layers")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise AssetError("layer_types has sliding layers, but there is no sliding_window")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise AssetError(f"dtype {shorten(self.dtype)} is not supported", hint=f"supported: {', '.join(_DTYPES)}")
        for key, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if token is not None and not (is_int(token) and 0 <= token < self.vocab_size):
                    raise AssetError(f"{key} must be an integer from 0 to {self.vocab_size - 1}, not {shorten(token)}")

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees, itself included; None: all before it."""
        return self.sliding_window if not self.sliding_layers or self.sliding_layers[layer] else None

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        *,
        generation: Mapping[str, Any] | None = None,
        source: str = CONFIG_FILE,
        defaults: Mapping[str, Any] | None = None,
        known_keys: frozenset[str] = frozenset(),
        sliding: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
    ) -> ModelConfig:
        """The configuration in `raw`, the content of a config.json.

        `generation` is the content of generation_config.json, whose token ids take precedence; `source` names the file
        in messages. The rest comes from the architecture: `defaults` of keys that may be absent, `known_keys` that it
        handles itself, whether it has sliding windows, biases on q, k and v only, norms of queries and keys.
        Raises `AssetError` with file and key.
        """
        from kernelforge_llm.config_file import model_config

        return model_config(
            raw,
            generation or {},
            source,
            defaults or {},
            known_keys,
            sliding=sliding,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )
