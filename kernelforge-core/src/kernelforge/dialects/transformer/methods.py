"""The ops of the transformer dialect as methods of a graph. What each means, and when it refuses its operands, is said where
the op is defined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Unpack, cast

from kernelforge.dialects.transformer import (
    attention,
    elementwise,
    layout,
    lookup,
    matmul,
    norm_matmul,
    norms,
    quantisation,
    rope,
    rope_attention,
    rope_cache,
    sampling,
)

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.rope import RopeAttributes
    from kernelforge.graph import Tensor
    from kernelforge.op import OpDef
    from kernelforge.problem import Attr, Dim


def _attributes(given: RopeAttributes) -> dict[str, Attr]:
    return cast("dict[str, Attr]", given)


class TransformerMethods(ABC):
    """Of `kernelforge.graph.Graph`."""

    @abstractmethod
    def _add(self, op: OpDef, operands: Sequence[Tensor | None], attrs: Mapping[str, Attr]) -> tuple[Tensor, ...]:
        """The results of an op. Raises UsageError with the op's reason when it refuses operands or attributes."""

    def _one(self, op: OpDef, *operands: Tensor | None, **attrs: Attr) -> Tensor:
        return self._add(op, operands, attrs)[0]

    def matmul(
        self,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        transpose_lhs: bool = False,
        transpose_rhs: bool = False,
        epilogue: str = "none",
    ) -> Tensor:
        """act(lhs [..., M, K] @ rhs [K, N] or [..., K, N] + bias [N]) + residual [..., M, N]."""
        return self._one(
            matmul.MATMUL,
            lhs,
            rhs,
            bias,
            residual,
            transpose_lhs=transpose_lhs,
            transpose_rhs=transpose_rhs,
            epilogue=epilogue,
        )

    def glu_matmul(
        self, x: Tensor, gate: Tensor, up: Tensor, *, transpose_rhs: bool = False, activation: str = "silu"
    ) -> Tensor:
        """act(x [..., M, K] @ gate [K, N]) * (x @ up [K, N])."""
        return self._one(matmul.GLU_MATMUL, x, gate, up, transpose_rhs=transpose_rhs, activation=activation)

    def rms_norm_matmul(
        self,
        lhs: Tensor,
        gain: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        eps: float = 1e-5,
        transpose_rhs: bool = False,
        epilogue: str = "none",
    ) -> Tensor:
        """`matmul` of the rms_norm of lhs [..., M, K] with gain [K]."""
        operands = (lhs, gain, rhs, bias, residual)
        attrs: dict[str, Attr] = {"eps": eps, "transpose_rhs": transpose_rhs, "epilogue": epilogue}
        return self._one(norm_matmul.RMS_NORM_MATMUL, *operands, **attrs)

    def rms_norm_glu_matmul(
        self,
        x: Tensor,
        gain: Tensor,
        gate: Tensor,
        up: Tensor,
        *,
        eps: float = 1e-5,
        transpose_rhs: bool = False,
        activation: str = "silu",
    ) -> Tensor:
        """`glu_matmul` of the rms_norm of x [..., M, K] with gain [K]."""
        attrs: dict[str, Attr] = {"eps": eps, "transpose_rhs": transpose_rhs, "activation": activation}
        return self._one(norm_matmul.RMS_NORM_GLU_MATMUL, x, gain, gate, up, **attrs)

    def quantize_matmul(
        self,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        transpose_rhs: bool = True,
        epilogue: str = "none",
    ) -> Tensor:
        """`matmul` of lhs [..., M, K] in the format "q8a", K a multiple of 32, with quantised weights rhs."""
        attrs: dict[str, Attr] = {"transpose_rhs": transpose_rhs, "epilogue": epilogue}
        return self._one(norm_matmul.QUANTIZE_MATMUL, lhs, rhs, bias, residual, **attrs)

    def quantize_glu_matmul(
        self, x: Tensor, gate: Tensor, up: Tensor, *, transpose_rhs: bool = True, activation: str = "silu"
    ) -> Tensor:
        """`glu_matmul` of x [..., M, K] in the format "q8a", K a multiple of 32, with quantised weights."""
        attrs: dict[str, Attr] = {"transpose_rhs": transpose_rhs, "activation": activation}
        return self._one(norm_matmul.QUANTIZE_GLU_MATMUL, x, gate, up, **attrs)

    def rms_norm_quantize_matmul(
        self,
        lhs: Tensor,
        gain: Tensor,
        rhs: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        eps: float = 1e-5,
        transpose_rhs: bool = True,
        epilogue: str = "none",
    ) -> Tensor:
        """`matmul` of the rms_norm_quantize of lhs [..., M, K] with gain [K], and quantised weights rhs."""
        operands = (lhs, gain, rhs, bias, residual)
        attrs: dict[str, Attr] = {"eps": eps, "transpose_rhs": transpose_rhs, "epilogue": epilogue}
        return self._one(norm_matmul.RMS_NORM_QUANTIZE_MATMUL, *operands, **attrs)

    def rms_norm_quantize_glu_matmul(
        self,
        x: Tensor,
        gain: Tensor,
        gate: Tensor,
        up: Tensor,
        *,
        eps: float = 1e-5,
        transpose_rhs: bool = True,
        activation: str = "silu",
    ) -> Tensor:
        """`glu_matmul` of the rms_norm_quantize of x [..., M, K] with gain [K], and quantised weights."""
        attrs: dict[str, Attr] = {"eps": eps, "transpose_rhs": transpose_rhs, "activation": activation}
        return self._one(norm_matmul.RMS_NORM_QUANTIZE_GLU_MATMUL, x, gain, gate, up, **attrs)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        causal: bool = True,
        scale: float = 0.0,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Dense: q [B, T, H, D], k and v [B, L, G, D], or all without B. Over a cache: q [T, H, D], k and v
        [S, C, G, D], positions and slots [T]. The result is like q."""
        operands = (q, k, v, positions, slots, lengths)
        return self._one(attention.ATTENTION, *operands, causal=causal, scale=scale, window=window, softcap=softcap)

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return self._one(norms.SOFTMAX, x, axis=axis)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        """x [..., N], weight [N]."""
        return self._one(norms.RMS_NORM, x, weight, eps=eps)

    def rms_norm_quantize(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        """`rms_norm` of x [..., N], N a multiple of 32, in the format "q8a"."""
        return self._one(norms.RMS_NORM_QUANTIZE, x, weight, eps=eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
        """x [..., N], weight and bias [N]."""
        return self._one(norms.LAYER_NORM, x, weight, bias, eps=eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        """x + residual, and its rms_norm."""
        total, norm = self._add(norms.ADD_RMS_NORM, (x, residual, weight), {"eps": eps})
        return total, norm

    def rope(
        self,
        x: Tensor,
        positions: Tensor,
        **attrs: Unpack[RopeAttributes],
    ) -> Tensor:
        """x [T, H, D], positions [T] below `max_position`."""
        return self._one(rope.ROPE, x, positions, **_attributes(attrs))

    def silu(self, x: Tensor) -> Tensor:
        return self._one(elementwise.SILU, x)

    def gelu(self, x: Tensor, *, approximate: str = "none") -> Tensor:
        return self._one(elementwise.GELU, x, approximate=approximate)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._one(elementwise.ADD, a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._one(elementwise.MUL, a, b)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return self._one(elementwise.CAST, x, dtype=dtype)

    def embedding(self, table: Tensor, ids: Tensor, *, dtype: str = "") -> Tensor:
        """The rows of table [V, D] that ids [T] name: [T, D]."""
        return self._one(lookup.EMBEDDING, table, ids, dtype=dtype)

    def kv_cache_update(self, cache: Tensor, new: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """cache [S, C, G, D] with new [T, G, D] written at (slots [T], positions [T])."""
        return self._one(lookup.KV_CACHE_UPDATE, cache, new, positions, slots)

    def rope_cache_update(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        positions: Tensor,
        slots: Tensor,
        **attrs: Unpack[RopeAttributes],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], rotated; both caches [S, C, G, D], with k [T, G, D], rotated, and v [T, G, D] written at (slots [T],
        positions [T])."""
        operands = (q, k, v, key_cache, value_cache, positions, slots)
        rotated, keys, values = self._add(rope_cache.ROPE_CACHE_UPDATE, operands, _attributes(attrs))
        return rotated, keys, values

    def rope_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        positions: Tensor,
        slots: Tensor,
        *,
        scale: float = 0.0,
        window: int = 0,
        softcap: float = 0.0,
        **attrs: Unpack[RopeAttributes],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What causal `attention` gives with the results of `rope_cache_update`, and both caches."""
        operands = (q, k, v, key_cache, value_cache, positions, slots)
        given = _attributes(attrs) | {"scale": scale, "window": window, "softcap": softcap}
        out, keys, values = self._add(rope_attention.ROPE_ATTENTION, operands, given)
        return out, keys, values

    def argmax(self, x: Tensor) -> Tensor:
        """Index of the largest element along the last axis, i32."""
        return self._one(lookup.ARGMAX, x)

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """A token for each row of logits [rows, vocab], i32, drawn with `uniform`; all else [rows], `top_k` i32, the rest f32."""
        return self._one(sampling.SAMPLE, logits, temperature, top_k, top_p, min_p, uniform)

    def reshape(self, x: Tensor, shape: Sequence[Dim]) -> Tensor:
        return self._one(layout.RESHAPE, x, shape=tuple(-1 if isinstance(d, str) else d for d in shape))

    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        return self._one(layout.TRANSPOSE, x, perm=tuple(perm))

    def slice(self, x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """`sizes` elements from `starts` along each axis; size -1 is up to the end."""
        return self._one(layout.SLICE, x, starts=tuple(starts), sizes=tuple(sizes))

    def split(self, x: Tensor, sizes: Sequence[int], axis: int = -1) -> tuple[Tensor, ...]:
        return self._add(layout.SPLIT, (x,), {"axis": axis, "sizes": tuple(sizes)})

    def concat(self, *xs: Tensor, axis: int = -1) -> Tensor:
        return self._one(layout.CONCAT, *xs, axis=axis)

    def quantize(self, x: Tensor, format: str) -> Tensor:  # noqa: A002 (the attribute's name)
        """A constant in the quantised format "q8" or "q4", or activations in "q8a": rows of a multiple of 32 elements."""
        return self._one(quantisation.QUANTIZE, x, format=format)

    def dequantize(self, x: Tensor, dtype: str = "f32") -> Tensor:
        return self._one(quantisation.DEQUANTIZE, x, dtype=dtype)
