"""A model as a GGUF file, for the programs that read those: a benchmark's peers get the weights that we run, number for number.

Format: ggml's docs/gguf.md, version 3. Names and the order of rotary pairs are those of llama.cpp's converter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import GROUP, QUANTISED, from_numpy, to_numpy
from kernelforge.errors import UsageError
from kernelforge.quant import quantize
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.gguf import MAGIC

if TYPE_CHECKING:
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from kernelforge_llm.source import Source

VERSION, ALIGNMENT = 3, 32
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""What llama.cpp calls an architecture."""
TYPES = {"f32": 0, "f16": 1, "q4": 2, "q8": 8, "bf16": 30}
"""Numbers of the formats that are written: F32, F16, Q4_0, Q8_0, BF16."""

_U32, _F32, _STRING = 4, 6, 8
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(source: Source, config: ModelConfig, path: Path, weights: str) -> None:
    """Write a model with its matrices in `weights` ("native" leaves them), norms and biases in f32, without a tokenizer.

    Raises UsageError for a model that the format cannot say: another family, scaled rotary frequencies, a sliding window, or
    rows that cannot be quantised. Raises OSError.
    """
    family = _family(source, config)
    names = [n for n in source.tensors.names() if not (config.tie_word_embeddings and n.startswith("lm_head."))]
    formats = {name: _format(source, name, weights) for name in names}
    with path.open("wb") as file:
        pairs = _metadata(family, config)
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(names), len(pairs)))
        for key, (kind, value) in pairs.items():
            file.write(_text(key) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name in names:
            shape = source.tensors.shape(name)
            file.write(_text(gguf_name(name)) + struct.pack("<I", len(shape)))
            file.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
            file.write(struct.pack("<IQ", TYPES[formats[name]], offset))
            offset += -(-_nbytes(shape, formats[name]) // ALIGNMENT) * ALIGNMENT
        _pad(file)
        for name in names:
            array = source.tensors.tensor(name)
            if family == "llama" and ".q_proj." in name:
                array = _neighbours(array, config.num_heads)
            elif family == "llama" and ".k_proj." in name:
                array = _neighbours(array, config.num_kv_heads)
            file.write(_encoded(array, formats[name]))
            _pad(file)


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a checkpoint. Raises UsageError for one that it does not have."""
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("model.layers."):
        number, _, module = module.removeprefix("model.layers.").partition(".")
        layer = f"blk.{number}."
    if module not in _NAMES:
        raise UsageError(f"GGUF has no name for tensor '{name}'")
    return f"{layer}{_NAMES[module]}.{kind}"


def _family(source: Source, config: ModelConfig) -> str:
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UsageError(f"{config.architecture} is not written as GGUF", hint=f"those are: {', '.join(FAMILIES)}")
    if config.rope.kind != "default" or config.sliding_window is not None:
        what = "a sliding window" if config.sliding_window is not None else f"RoPE of kind {config.rope.kind}"
        raise UsageError(f"{source.name} has {what}, which is not written as GGUF")
    return family


def _format(source: Source, name: str, weights: str) -> str:
    shape = source.tensors.shape(name)
    if len(shape) == 1:
        return "f32"
    if weights in QUANTISED and shape[-1] % GROUP:
        raise UsageError(
            f"rows of tensor '{name}' ({shape[-1]} elements) are no multiple of {GROUP}: no {weights} in GGUF"
        )
    found = from_numpy(source.tensors.dtype(name))
    if found in QUANTISED and weights not in ("native", found):
        raise UsageError(f"tensor '{name}' is {found} already", hint="leave --weights out")
    return ("f32" if found == "f64" else found) if weights == "native" else weights


def _metadata(family: str, config: ModelConfig) -> Mapping[str, tuple[int, Any]]:
    sizes = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    numbers = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope.theta}
    return {
        "general.architecture": (_STRING, family),
        "general.alignment": (_U32, ALIGNMENT),
        "tokenizer.ggml.model": (_STRING, "no_vocab"),
        **{f"{family}.{key}": (_U32, value) for key, value in sizes.items()},
        **{f"{family}.{key}": (_F32, value) for key, value in numbers.items()},
    }


def _value(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else struct.pack("<I" if kind == _U32 else "<f", value)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    elements = math.prod(shape)
    return elements // (GROUP if dtype in QUANTISED else 1) * int(to_numpy(dtype).itemsize)


def _neighbours(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head in the order of llama.cpp's "llama", which turns pairs of neighbours: 0, D/2, 1, D/2 + 1, ..."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _encoded(array: NDArray[Any], dtype: str) -> bytes:
    if dtype in QUANTISED and array.dtype != to_numpy(dtype):
        return quantize(array, dtype).tobytes()
    kind: np.dtype[Any] = to_numpy(dtype)
    return array.astype(kind).tobytes()
