"""A model's configuration, read from the `config.json` of a Hugging Face checkpoint.

Both spellings are read: the present one (`rope_parameters`, `dtype`) and the older one that most published checkpoints
carry (`rope_scaling` with `type` or `rope_type`, `rope_theta`, `torch_dtype`). A key that changes results and is not
supported is an error that names it; one that is known to change nothing is ignored; one that is not known at all is
named in a `KernelForgeWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge_llm.config_keys import COMMON_KEYS, SLIDING_KEYS, shorten, unknown_keys
from kernelforge_llm.files import read_json_object

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

# gelu_new, gelu_fast and gelu_pytorch_tanh are one formula, the tanh approximation.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


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
        if self.kind not in _ROPE_KEYS:
            raise AssetError(
                f"rope_type {shorten(self.kind)} is not supported",
                hint=f"supported kinds of RoPE: {', '.join(_ROPE_KEYS)}",
            )
        _set_number(self, "theta", "rope_theta", above=0.0, most=1e15)
        _set_number(self, "factor", "factor", above=0.0, most=1e6)
        if self.kind == "llama3":
            _set_number(self, "low_freq_factor", "low_freq_factor", above=0.0, most=1e6)
            _set_number(self, "high_freq_factor", "high_freq_factor", above=self.low_freq_factor, most=1e6)
            _check_size("original_max_position_embeddings", self.original_max_position, 1 << 27)


# kind of RoPE -> the keys it reads, each with its field in RopeConfig; a key of another kind is without effect
_ROPE_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_position",
    },
}


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
            _check_size(key, getattr(self, name), limit)
        if self.num_heads % self.num_kv_heads:
            raise AssetError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise AssetError(f"head_dim {self.head_dim} is odd; RoPE turns pairs")
        _set_number(self, "rms_norm_eps", "rms_norm_eps", above=0.0, most=1.0)
        if self.hidden_act not in _ACTIVATIONS.values():
            raise AssetError(
                f"hidden_act {shorten(self.hidden_act)} is not supported", hint=f"supported: {', '.join(_ACTIVATIONS)}"
            )
        for name in ("tie_word_embeddings", "attention_bias", "qkv_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise AssetError(f"{name} must be true or false, not {shorten(getattr(self, name))}")
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window, 1 << 27)
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise AssetError(f"layer_types has {len(self.sliding_layers)} entries for {self.num_layers} layers")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise AssetError("layer_types has sliding layers, but there is no sliding_window")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise AssetError(f"dtype {shorten(self.dtype)} is not supported", hint=f"supported: {', '.join(_DTYPES)}")
        for key, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if token is not None and not (_is_int(token) and 0 <= token < self.vocab_size):
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
        values = {**(defaults or {}), **raw}
        try:
            rope, unused = _parse_rope(values)
            known = COMMON_KEYS | known_keys | (SLIDING_KEYS if sliding else frozenset())
            unused += unknown_keys(values, known)
            window, sliding_layers = _parse_sliding(values) if sliding else (None, ())
            generation = generation or {}
            activation = _string(values, "hidden_act", "silu")
            config = cls(
                architecture=architecture_name(values),
                model_type=_string(values, "model_type", ""),
                vocab_size=_required(values, "vocab_size"),
                hidden_size=_required(values, "hidden_size"),
                intermediate_size=_required(values, "intermediate_size"),
                num_layers=_required(values, "num_hidden_layers"),
                num_heads=_required(values, "num_attention_heads"),
                num_kv_heads=_or(values, "num_key_value_heads", values.get("num_attention_heads")),
                head_dim=_head_dim(values),
                max_position=_required(values, "max_position_embeddings"),
                rms_norm_eps=_or(values, "rms_norm_eps", 1e-6),
                hidden_act=_ACTIVATIONS.get(activation, activation),
                tie_word_embeddings=_or(values, "tie_word_embeddings", False),
                attention_bias=_or(values, "attention_bias", False),
                qkv_bias=qkv_bias,
                mlp_bias=_or(values, "mlp_bias", False),
                qk_norm=qk_norm,
                sliding_window=window,
                sliding_layers=sliding_layers,
                rope=rope,
                dtype=_string(values, "dtype", _string(values, "torch_dtype", "")).removeprefix("torch.") or None,
                bos_token_id=_or(generation, "bos_token_id", values.get("bos_token_id")),
                eos_token_ids=_parse_ids(_or(generation, "eos_token_id", values.get("eos_token_id"))),
            )
        except AssetError as error:
            raise AssetError(f"{source}: {error}", hint=error.hint) from None
        if unused:
            keys = ", ".join(sorted(unused))
            warnings.warn(f"{source}: ignored without knowing what they mean: {keys}", KernelForgeWarning, stacklevel=2)
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


def _parse_rope(values: Mapping[str, Any]) -> tuple[RopeConfig, list[str]]:
    """RoPE's configuration, and the names of keys that have no effect on its kind."""
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = _or(values, key, {})
        if not isinstance(part, dict):
            raise AssetError(f"{key} must be an object, not {shorten(part)}")
        given.update(part)
    kind = _string(given, "rope_type", _string(given, "type", "default"))
    theta = _or(given, "rope_theta", _or(values, "rope_theta", 10000.0))
    if _or(given, "partial_rotary_factor", 1) != 1:
        raise AssetError("partial_rotary_factor other than 1 is not supported")
    if values.get("original_max_position_embeddings") is not None and kind == "llama3":
        given.setdefault("original_max_position_embeddings", values["original_max_position_embeddings"])
    keys = _ROPE_KEYS.get(kind, {})
    rope = RopeConfig(theta=theta, kind=kind, **{field: _required(given, key) for key, field in keys.items()})
    rest = given.keys() - keys.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unsupported := sorted(rest - _ROPE_KEYS["llama3"].keys()):
        raise AssetError(f"rope_parameters has {shorten(unsupported[0])}, which is not supported")
    return rope, [f"rope_parameters.{key}" for key in rest]


def _parse_sliding(values: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and for each layer whether it has it."""
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if not values.get("use_sliding_window", True) or (window is None and kinds is None):
        return None, ()
    if kinds is None:
        first, count = _or(values, "max_window_layers", 0), _required(values, "num_hidden_layers")
        if not _is_int(first):
            raise AssetError(f"max_window_layers must be an integer, not {shorten(first)}")
        _check_size("num_hidden_layers", count, 1 << 10)
        layers = tuple(layer >= first for layer in range(count))
    elif isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds):
        layers = tuple(kind == "sliding_attention" for kind in kinds)
    else:
        raise AssetError(f"layer_types must be a list of full_attention and sliding_attention, not {shorten(kinds)}")
    return (window, layers) if any(layers) else (None, ())


def _parse_ids(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _head_dim(values: Mapping[str, Any]) -> Any:
    if values.get("head_dim") is not None:
        return values["head_dim"]
    hidden, heads = _required(values, "hidden_size"), _required(values, "num_attention_heads")
    _check_size("hidden_size", hidden, 1 << 17)
    _check_size("num_attention_heads", heads, 1 << 14)
    if hidden % heads:
        raise AssetError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim"
        )
    return hidden // heads


def _or(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value


def _required(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise AssetError(f"{key} is missing")
    return values[key]


def _string(values: Mapping[str, Any], key: str, default: str) -> str:
    value = _or(values, key, default)
    if not isinstance(value, str):
        raise AssetError(f"{key} must be a string, not {shorten(value)}")
    return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(key: str, value: object, limit: int) -> None:
    if not _is_int(value):
        raise AssetError(f"{key} must be an integer, not {shorten(value)}")
    if not 1 <= value <= limit:
        raise AssetError(f"{key} must be from 1 to {limit}, not {shorten(value)}")


def _set_number(config: RopeConfig | ModelConfig, name: str, key: str, *, above: float, most: float) -> None:
    """Checks a field and makes it a float, as JSON may have an integer there."""
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise AssetError(f"{key} must be a number, not {shorten(value)}")
    if not above < value <= most:  # false for a NaN too
        raise AssetError(f"{key} must be above {above:g} and at most {most:g}, not {shorten(value)}")
    object.__setattr__(config, name, float(value))
