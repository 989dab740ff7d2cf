"""Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values, and optional sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.config import ModelConfig

DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,  # published configs carry a window that is off
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""What transformers' Qwen2Config and Qwen3Config have where a key is absent."""


class Qwen2(Llama):
    """`Qwen2ForCausalLM`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        return ModelConfig.from_hf(
            raw, generation=generation, source=source, defaults=DEFAULTS, sliding=True, qkv_bias=True
        )
