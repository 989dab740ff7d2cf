"""Llama with parallel blocks: x + attention(norm(x)) + mlp(norm(x)), one norm a layer (Wang and Komatsuzaki, GPT-J, 2021).

Attention and MLP read the same states, so that their products can be merged and none waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernelforge_llm.architectures.llama import attention, mlp, norm
from kernelforge_llm.config import ModelConfig

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge_llm.model import StepInputs
    from kernelforge_llm.weights import WeightTable


class ParallelLlama:
    """The tensors are those of a Llama, without `post_attention_layernorm`."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        return ModelConfig.from_hf(raw, generation=generation, source=source)

    def hidden_states(self, g: Graph, config: ModelConfig, weights: WeightTable, step: StepInputs) -> Tensor:
        table = weights.matrix("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        x = g.embedding(table, step.tokens, dtype="f32")  # [T, hidden]
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            with g.scope(name):
                h = norm(g, x, weights, f"{name}.input_layernorm", config)
                x = x + attention(g, h, config, weights, step, layer) + mlp(g, h, config, weights, f"{name}.mlp")
        return norm(g, x, weights, "model.norm", config)
