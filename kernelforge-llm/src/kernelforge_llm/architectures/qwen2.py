"""Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values, and optional sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.config import ModelConfig


class Qwen2(Llama):
    """`Qwen2ForCausalLM`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        # Published configs carry a window that is off unless use_sliding_window says otherwise.
        defaults = {"use_sliding_window": False}
        return ModelConfig.from_hf(raw, generation=generation, defaults=defaults, sliding=True, qkv_bias=True)
