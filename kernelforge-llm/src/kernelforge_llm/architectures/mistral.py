"""Mistral (Jiang et al. 2023): Llama with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernelforge_llm.architectures.llama import Llama
from kernelforge_llm.config import ModelConfig


class Mistral(Llama):
    """`MistralForCausalLM`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig.from_hf(raw, generation=generation, sliding=True)
