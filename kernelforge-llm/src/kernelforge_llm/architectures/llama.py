"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm decoder with RoPE, grouped-query attention and SwiGLU.

The other architectures of this folder are this one with switches in `ModelConfig`: biases, norms of queries and keys,
sliding windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kernelforge_llm.config import ModelConfig
from kernelforge_llm.model import rope_attributes

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge_llm.model import StepInputs
    from kernelforge_llm.weights import WeightTable


class Llama:
    """`LlamaForCausalLM`, with its optional attention and MLP biases."""

    def config(self, raw: Mapping[str, Any], generation: Mapping[str, Any], *, source: str) -> ModelConfig:
        return ModelConfig.from_hf(raw, generation=generation, source=source)

    def hidden_states(self, g: Graph, config: ModelConfig, weights: WeightTable, step: StepInputs) -> Tensor:
        with g.scope("embed_tokens"):
            table = weights.matrix("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
            x = g.embedding(table, step.tokens, dtype="f32")  # [T, hidden]
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}"
            with g.scope(f"{name}.self_attn"):
                h = norm(g, x, weights, f"{name}.input_layernorm", config)
                x = x + attention(g, h, config, weights, step, layer)
            with g.scope(f"{name}.mlp"):
                h = norm(g, x, weights, f"{name}.post_attention_layernorm", config)
                x = x + mlp(g, h, config, weights, f"{name}.mlp")
        with g.scope("norm"):
            return norm(g, x, weights, "model.norm", config)


def norm(g: Graph, x: Tensor, weights: WeightTable, name: str, config: ModelConfig) -> Tensor:
    """RMS norm over the last axis, of a hidden state or of a head."""
    width = x.shape[-1]
    assert isinstance(width, int)
    return g.rms_norm(x, weights.vector(f"{name}.weight", (width,)), eps=config.rms_norm_eps)


def linear(g: Graph, x: Tensor, weights: WeightTable, name: str, width: int, *, bias: bool) -> Tensor:
    """x @ weight.T + bias, [T, width]."""
    depth = x.shape[-1]
    assert isinstance(depth, int)
    matrix = weights.matrix(f"{name}.weight", (width, depth))
    y = weights.product(x, matrix)
    return y + weights.vector(f"{name}.bias", (width,)) if bias else y


def attention(g: Graph, x: Tensor, config: ModelConfig, weights: WeightTable, step: StepInputs, layer: int) -> Tensor:
    """Grouped-query attention over the cache, into which this step's keys and values are written first."""
    name = f"model.layers.{layer}.self_attn"
    heads, groups, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    bias = config.attention_bias or config.qkv_bias
    rope = rope_attributes(config, step.context)
    q = linear(g, x, weights, f"{name}.q_proj", heads * head_dim, bias=bias).reshape(-1, heads, head_dim)
    k = linear(g, x, weights, f"{name}.k_proj", groups * head_dim, bias=bias).reshape(-1, groups, head_dim)
    v = linear(g, x, weights, f"{name}.v_proj", groups * head_dim, bias=bias).reshape(-1, groups, head_dim)
    if config.qk_norm:
        q = norm(g, q, weights, f"{name}.q_norm", config)
        k = norm(g, k, weights, f"{name}.k_norm", config)
    q = g.rope(q, step.positions, **rope)
    k = g.rope(k, step.positions, **rope)
    keys = g.kv_cache_update(step.keys[layer], k, step.positions, step.slots)
    values = g.kv_cache_update(step.values[layer], v, step.positions, step.slots)
    g.output(keys, f"key.{layer}")
    g.output(values, f"value.{layer}")
    window = config.window(layer)
    attended = g.attention(q, keys, values, step.positions, step.slots, window=window or 0)
    flat = attended.reshape(-1, heads * head_dim)  # [T, heads * head_dim]
    return linear(g, flat, weights, f"{name}.o_proj", config.hidden_size, bias=config.attention_bias)


def mlp(g: Graph, x: Tensor, config: ModelConfig, weights: WeightTable, name: str) -> Tensor:
    """Gated MLP: (act(x Wg) * (x Wu)) Wd (Shazeer 2020)."""
    width, bias = config.intermediate_size, config.mlp_bias
    gate = linear(g, x, weights, f"{name}.gate_proj", width, bias=bias)
    up = linear(g, x, weights, f"{name}.up_proj", width, bias=bias)
    if config.hidden_act == "silu":
        activated = g.silu(gate)
    else:
        activated = g.gelu(gate, approximate="tanh" if config.hidden_act == "gelu_tanh" else "none")
    return linear(g, activated * up, weights, f"{name}.down_proj", config.hidden_size, bias=bias)
