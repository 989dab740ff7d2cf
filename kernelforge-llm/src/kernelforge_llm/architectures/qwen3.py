"""Qwen3 (Yang et al. 2025): Llama with an RMS norm over each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.architectures.qwen2 import DEFAULTS
from kernelforge_llm.config import ModelConfig


class Qwen3(Llama):
    """`Qwen3ForCausalLM`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        defaults = {**DEFAULTS, "head_dim": 128}
        return ModelConfig.from_hf(
            raw, generation=generation, source=source, defaults=defaults, sliding=True, qk_norm=True
        )
