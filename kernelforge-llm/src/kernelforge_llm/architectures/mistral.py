"""Mistral (Jiang et al. 2023): Llama with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.config import ModelConfig

_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
"""What transformers' MistralConfig has where a key is absent; null means another thing: as many heads, no window."""


class Mistral(Llama):
    """`MistralForCausalLM`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        return ModelConfig.from_hf(raw, generation=generation, source=source, defaults=_DEFAULTS, sliding=True)
