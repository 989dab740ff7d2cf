"""The KV cache of a decoder: per layer one buffer of keys and one of values, updated in place by the compiled step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kernelforge.dtype import QUANTISED
from kernelforge.errors import UsageError

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Device
    from kernelforge_llm.config import ModelConfig

CacheFormat = Literal["auto", "f32", "f16", "bf16", "q8"]
"""What keys and values are kept in; "auto": see `cache_dtype`."""


def cache_dtype(chosen: CacheFormat, weights: str) -> str:
    """The dtype of a cache. By default f16 beside f16 or quantised weights, whose errors are larger than its own; else f32."""
    if chosen != "auto":
        return chosen
    return "f16" if weights in ("f16", *QUANTISED) else "f32"


class KVCache:
    """Keys and values of up to `sequences` sequences of up to `context` positions.

    Buffers are [sequences, context, num_kv_heads, head_dim] of `dtype`. `lengths` says how many positions of each sequence are
    filled; `truncate` only changes that, the memory is overwritten later.
    """

    def __init__(
        self, device: Device, config: ModelConfig, *, sequences: int, context: int, dtype: str = "f32"
    ) -> None:
        shape = (sequences, context, config.num_kv_heads, config.head_dim)
        self.context = context
        self.lengths = [0] * sequences
        self.buffers: dict[str, Buffer] = {
            f"{kind}.{layer}": device.allocate(shape, dtype)
            for layer in range(config.num_layers)
            for kind in ("key", "value")
        }

    def truncate(self, sequence: int, length: int) -> None:
        """Keep only the first `length` positions of a sequence. Raises UsageError when it has fewer, or is not there."""
        self._check(sequence)
        if not 0 <= length <= self.lengths[sequence]:
            raise UsageError(f"sequence {sequence} holds {self.lengths[sequence]} positions, cannot be cut to {length}")
        self.lengths[sequence] = length

    def require_room(self, sequence: int, count: int) -> None:
        """Raises UsageError unless there is such a sequence and `count` more positions fit into it."""
        self._check(sequence)
        total = self.lengths[sequence] + count
        if total > self.context:
            raise UsageError(
                f"{total} tokens do not fit the context of {self.context}",
                hint="give fewer, or load the model with a larger context (--context) if it allows it",
            )

    def _check(self, sequence: int) -> None:
        if not 0 <= sequence < len(self.lengths):
            raise UsageError(
                f"there is no sequence {sequence}", hint=f"sequences are from 0 to {len(self.lengths) - 1}"
            )
