"""Named model shapes with random weights, for benchmarks and for trying the plumbing without a download."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from kernelforge.errors import UsageError
from kernelforge_llm.checkpoint import missing_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TABLE_SIZE = 1 << 16
_CHUNK = 1 << 18  # elements drawn at once: their random numbers stay in the cache


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, max_position: int = 8192
) -> Mapping[str, Any]:
    """The config.json of a Llama with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


NAMED_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tinypy": _llama(256, 8, 8, 4, 704, 4096, max_position=1024),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152),
    "llama-1b": _llama(2048, 16, 32, 8, 8192, 32768),
}
"""Name -> content of config.json. They have no end-of-sequence id, so that generation runs to the length asked for."""


@dataclass(frozen=True)
class RandomCheckpoint:
    """A `TensorSource` whose bfloat16 tensors are made when they are asked for, the same ones for the same seed.

    Matrices are normal with deviation 1/sqrt(columns), so that activations keep their size; norms are ones.
    """

    config: Mapping[str, Any]
    seed: int
    shapes: Mapping[str, tuple[int, ...]]

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the layers."""
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `AssetError` if there is no such tensor, as `dtype` and `tensor` do."""
        if name not in self.shapes:
            raise missing_tensor(name, self.names(), "the random checkpoint")
        return self.shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """bfloat16, that of ml_dtypes."""
        import ml_dtypes
        import numpy as np

        self.shape(name)
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor, made anew by each call."""
        import numpy as np

        shape, dtype = self.shape(name), self.dtype(name)
        if len(shape) == 1:
            return np.ones(shape, dtype)
        table = _normal_table() / math.sqrt(shape[-1])
        bits = table.astype(dtype).view(np.uint16)
        source = np.random.SFC64([self.seed, zlib.crc32(name.encode())])
        drawn = np.empty(math.prod(shape), np.uint16)
        for start in range(0, drawn.size, _CHUNK):
            part = drawn[start : start + _CHUNK]
            part[:] = bits[source.random_raw(-(-part.size // 4)).view(np.uint16)[: part.size]]
        return drawn.view(dtype).reshape(shape)


def random_checkpoint(shape: str, seed: int = 0) -> RandomCheckpoint:
    """Random weights at a named shape. Raises `UsageError` for an unknown name or a negative seed."""
    if shape not in NAMED_SHAPES:
        raise UsageError(f"there is no shape {shape!r}", hint=f"shapes: {', '.join(NAMED_SHAPES)}")
    if seed < 0:
        raise UsageError(f"the seed must be an integer from 0, not {seed}")
    config = NAMED_SHAPES[shape]
    return RandomCheckpoint(config, seed, _tensor_shapes(config))


def _tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (hidden,)}


@cache
def _normal_table() -> NDArray[np.float64]:
    """A fixed sample of the standard normal distribution, shifted and scaled to mean 0 and deviation 1.

    Drawing from it by 16 random bits is five times as fast as drawing normal numbers.
    """
    import numpy as np

    table = np.random.Generator(np.random.PCG64(0)).standard_normal(_TABLE_SIZE)
    table -= table.mean()
    table /= table.std()
    return table
