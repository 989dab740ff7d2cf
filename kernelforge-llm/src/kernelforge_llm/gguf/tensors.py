"""The tensors of a GGUF file under the names that checkpoints of the Hugging Face Hub have."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import to_numpy
from kernelforge.errors import AssetError, KernelForgeWarning
from kernelforge_llm.checkpoint import missing_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kernelforge_llm.gguf.file import GgufEntry, GgufFile

ROPE_FACTORS = "rope_freqs.weight"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q4_0": "q4", "Q8_0": "q8", "Q6_K": "f16"}
"""Type in the file -> dtype here. Q6_K, which files of 4-bit weights have in one or two tensors, is widened."""

_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
_Q6_K = [("low", "u1", (2, 2, 32)), ("high", "u1", (2, 32)), ("scales", "i1", (2, 4, 2)), ("scale", "<f2")]


@dataclass(frozen=True, eq=False)
class GgufTensors:
    """A `TensorSource`: views of the memory map with the file's own numbers, but for what `tensor` says."""

    file: GgufFile
    entries: Mapping[str, GgufEntry]
    """By Hugging Face name; tensors that no such name is known for have their own."""
    heads: Mapping[str, int]
    """Of tensors whose rows llama.cpp permutes: the heads that they are of."""

    @classmethod
    def of(cls, file: GgufFile, config: Mapping[str, Any]) -> GgufTensors:
        """`config` is the model's, as `gguf.config` makes it."""
        entries = {hub_name(name): entry for name, entry in file.entries.items() if name != ROPE_FACTORS}
        if widened := [name for name, entry in entries.items() if entry.type.name == "Q6_K"]:
            what = f"{widened[0]} is" if len(widened) == 1 else f"{len(widened)} tensors are"
            warnings.warn(f"{file.path}: {what} stored as Q6_K, and widened to f16", KernelForgeWarning, stacklevel=2)
        heads = {}
        if file.metadata.get("general.architecture") == "llama":
            for name in entries:
                layer_name = name.removesuffix(".weight").removesuffix(".bias").split(".", 3)[-1]
                if layer_name in _HEADS:
                    heads[name] = int(config[_HEADS[layer_name]])
        return cls(file, entries, heads)

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of the file."""
        return tuple(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `AssetError` if there is no such tensor, as `dtype` and `tensor` do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of Q4_0 and Q8_0, that of a group of 32 elements (see `kernelforge.quant`)."""
        return to_numpy(_DTYPES[self._entry(name).type.name])

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor, quantised ones as groups. A copy where rows are put back in order and where Q6_K is widened to
        f16; raises `AssetError` when f16 cannot hold that."""
        entry = self._entry(name)
        raw = self.file.data[entry.start : entry.stop]
        if entry.type.name == "Q6_K":
            array = _widen_q6_k(raw, f"{self.file.path}: tensor {name!r}").reshape(entry.shape)
        else:
            array = raw.view(self.dtype(name)).reshape(*entry.shape[:-1], -1)
        return _hub_rows(array, self.heads[name]) if name in self.heads else array

    def _entry(self, name: str) -> GgufEntry:
        if name not in self.entries:
            raise missing_tensor(name, self.names(), str(self.file.path))
        return self.entries[name]


def hub_name(name: str) -> str:
    """`blk.0.attn_q.weight` as `model.layers.0.self_attn.q_proj.weight`; a name that is not known as it is."""
    if (found := _LAYER.fullmatch(name)) and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def _hub_rows(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of queries or keys in the order of the Hub, where RoPE turns row i of a head with row i + head_dim / 2; in
    llama.cpp's files of the llama architecture it turns neighbours."""
    import numpy as np

    rows = array.shape[0]
    if rows % (2 * heads):
        raise AssetError(f"{rows} rows cannot be those of {heads} heads")
    pairs = array.reshape(heads, rows // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _widen_q6_k(raw: NDArray[np.uint8], what: str) -> NDArray[Any]:
    """256 elements of 6 bits, in sixteen runs with scales of 8 bits under one of float16 (ggml, `block_q6_K`)."""
    import numpy as np

    blocks = raw.view(np.dtype(_Q6_K))
    out = np.empty((len(blocks), 2, 4, 2, 16), np.float16)
    for start in range(0, len(blocks), 4096):
        part = blocks[start : start + 4096]
        low, high = part["low"], part["high"][:, :, None, :]
        nibbles = np.concatenate([low & 15, low >> 4], axis=2)  # [blocks, halves, quarters, 32]
        six = nibbles | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
        scales = part["scale"].astype(np.float32)[:, None, None, None] * part["scales"]
        values = (six.astype(np.float32) - 32).reshape(-1, 2, 4, 2, 16) * scales[..., None]
        if not np.abs(values).max(initial=0) <= np.finfo(np.float16).max:  # false for a NaN, too
            raise AssetError(f"{what} has numbers that float16 cannot hold", hint="is the file intact?")
        out[start : start + 4096] = values
    return out
