"""A graph builder that reads like numpy and writes MLIR text.

    g = Graph()
    x = g.input("x", ("tokens", 576), "f32")
    w = g.constant("w", (1536, 576), "bf16")
    with g.scope("mlp"):
        y = g.silu(g.matmul(x, w, transpose_rhs=True))
    g.output(y[:, :768] * y[:, 768:], "y")
    module = g.module()

Shapes and types are checked as ops are added; dynamic dimensions are strings. Nothing here needs MLIR until `module()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
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
from kernelforge.dtype import WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.module import CONSTANT, DIMS, DONATED, NAME, TOKENS
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Attr, Dim, TensorType
from kernelforge.syntax import attribute_texts, string_text, tensor_text

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.rope import RopeAttributes
    from kernelforge.module import Module, OpCatalog


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value of a graph. Operators and methods add ops to that graph, and raise UsageError when they do not fit."""

    graph: Graph
    name: str
    """In the MLIR text: `%arg0`, `%3`, `%4#1`."""
    type: TensorType

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def rank(self) -> int:
        return self.type.rank

    def __add__(self, other: Tensor) -> Tensor:
        return self.graph.add(self, other)

    def __mul__(self, other: Tensor) -> Tensor:
        return self.graph.mul(self, other)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.graph.matmul(self, other)

    @property
    def T(self) -> Tensor:  # noqa: N802 (numpy's name)
        return self.transpose()

    def transpose(self, *perm: int) -> Tensor:
        """Axes in the order `perm`; without it, reversed."""
        return self.graph.transpose(self, perm or tuple(reversed(range(self.rank))))

    def reshape(self, *shape: Dim) -> Tensor:
        """The same elements in another shape; the dynamic dimension is written by name or as -1."""
        return self.graph.reshape(self, shape)

    def cast(self, dtype: str) -> Tensor:
        return self.graph.cast(self, dtype)

    def split(self, sizes: Sequence[int], axis: int = -1) -> tuple[Tensor, ...]:
        return self.graph.split(self, sizes, axis)

    def __getitem__(self, key: object) -> Tensor:
        """Basic indexing: integers drop their axis, slices without step cut theirs, `...` stands for the axes between.

        A dynamic axis can only be taken whole.
        """
        wanted = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in wanted:
            at = wanted.index(Ellipsis)
            wanted[at : at + 1] = [slice(None)] * (self.rank - len(wanted) + 1)
        wanted += [slice(None)] * (self.rank - len(wanted))
        if len(wanted) > self.rank:
            raise UsageError(f"too many indices for a tensor of shape {list(self.shape)}")
        boxes = [_box(item, dim) for item, dim in zip(wanted, self.shape, strict=True)]
        out = self
        if any(box != (0, -1) for box in boxes):
            out = self.graph.slice(self, [start for start, _ in boxes], [size for _, size in boxes])
        kept = [d for d, item in zip(out.shape, wanted, strict=True) if isinstance(item, slice)]
        return out if len(kept) == self.rank else out.reshape(*kept)

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError("a tensor of a graph cannot be iterated; split() cuts it in pieces")

    def __repr__(self) -> str:
        return f"Tensor({self.name}: {self.type})"


def _box(item: object, dim: Dim) -> tuple[int, int]:
    """(start, size) of one index; size -1 is up to the end."""
    if isinstance(item, slice) and item == slice(None):
        return 0, -1
    if isinstance(dim, str):
        raise UsageError(f"the dynamic dimension '{dim}' can only be taken whole", hint="gather rows with embedding()")
    if isinstance(item, slice):
        start, stop, step = item.indices(dim)
        if step != 1:
            raise UsageError(f"slices with a step are not supported, got {item}")
        return start, max(0, stop - start)
    if not isinstance(item, int):
        raise UsageError(f"{item!r} is not an index", hint="integers, slices without step and ... are")
    if not -dim <= item < dim:
        raise UsageError(f"index {item} is out of range for a dimension of size {dim}")
    return item % dim, 1


def _type(shape: Sequence[Dim], dtype: str) -> TensorType:
    return TensorType(tuple(d if isinstance(d, str) else index(d) for d in shape), dtype)


def _attributes(given: RopeAttributes) -> dict[str, Attr]:
    return cast("dict[str, Attr]", given)


class Graph:
    """A function under construction. `catalog` is where `op()` looks up ops; None: the installed plugins'."""

    def __init__(self, name: str = "main", catalog: OpCatalog | None = None) -> None:
        if not name.isidentifier():
            raise UsageError(f"'{name}' is not a function name")
        self.name = name
        self._catalog = catalog
        self._arguments: dict[str, str] = {}  # name: text
        self._body: list[str] = []
        self._results = 0
        self._outputs: dict[str, Tensor] = {}
        self._scopes: list[str] = []

    def input(self, name: str, shape: Sequence[Dim], dtype: str, *, donated: bool = False) -> Tensor:
        """An argument given at every run. A donated one may be overwritten by ops that work in place.

        Raises UsageError for a second argument of that name, an unknown dtype or a dimension that is none.
        """
        t = _type(shape, dtype)
        if t.dtype in WEIGHT_FORMATS and not donated:
            raise UsageError(f"input '{name}' cannot be {dtype}", hint="it is a format of constants and donated caches")
        return self._argument(name, t, {DONATED: ""} if donated else {})

    def constant(self, name: str, shape: Sequence[int], dtype: str) -> Tensor:
        """A weight: a tensor that is known when the module is compiled, by this name. Raises UsageError as `input`."""
        t = _type(shape, dtype)
        if not t.static:
            raise UsageError(f"constant '{name}' cannot have dynamic dimensions: {t}")
        return self._argument(name, t, {CONSTANT: ""})

    def _argument(self, name: str, t: TensorType, flags: Mapping[str, str]) -> Tensor:
        if name in self._arguments:
            raise UsageError(f"the graph has an argument '{name}' already")
        names = [d for d in t.shape if isinstance(d, str)]
        if bad := [d for d in names if not d.isidentifier()]:
            raise UsageError(f"'{bad[0]}' cannot name a dimension of '{name}'")
        attributes = {**flags, NAME: f" = {string_text(name)}"}
        if any(d != TOKENS for d in names):
            attributes[DIMS] = f" = [{', '.join(map(string_text, names))}]"
        value = f"%arg{len(self._arguments)}"
        inner = ", ".join(f"{key}{text}" for key, text in sorted(attributes.items()))
        self._arguments[name] = f"{value}: {tensor_text(t.shape, t.dtype)} {{{inner}}}"
        return Tensor(self, value, t)

    def output(self, tensor: Tensor, name: str) -> None:
        """Return `tensor` from the function. Raises UsageError for a second output of that name."""
        if name in self._outputs:
            raise UsageError(f"the graph has an output '{name}' already")
        self._own(tensor)
        self._outputs[name] = tensor

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Ops added inside are located at `name` (within outer scopes, joined by dots), where diagnostics point to."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def op(self, op: str | OpDef, *operands: Tensor | None, **attrs: Attr) -> Tensor | tuple[Tensor, ...]:
        """Add any op, named as `dialect.op`. One result is returned alone, several as a tuple.

        Raises UsageError for an unknown op, and with the op's reason when it refuses operands or attributes.
        """
        found = self._add(self._lookup(op) if isinstance(op, str) else op, operands, attrs)
        return found if len(found) != 1 else found[0]

    def _lookup(self, name: str) -> OpDef:
        from kernelforge.registry import default_registry, lookup

        catalog = self._catalog if self._catalog is not None else default_registry()
        return lookup("op", catalog.ops, name)

    def _own(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor) or tensor.graph is not self:
            raise UsageError(f"{tensor!r} is not a tensor of this graph")

    def _add(self, op: OpDef, operands: Sequence[Tensor | None], attrs: Mapping[str, Attr]) -> tuple[Tensor, ...]:
        for tensor in operands:
            if tensor is not None:
                self._own(tensor)
        place = ".".join(self._scopes)
        try:
            problem = op.problem([None if t is None else t.type for t in operands], attrs)
            texts = attribute_texts(op, problem)
        except OpError as error:
            raise UsageError(f"'{op.full_name}'{f' at {place}' if place else ''}: {error}") from None
        given = [t for t in operands if t is not None]
        count = len(problem.results)
        value = f"%{self._results}"
        self._results += 1
        types = [tensor_text(t.shape, t.dtype) for t in problem.results]
        self._body.append(
            f'    {value}{f":{count}" if count > 1 else ""} = "{op.full_name}"({", ".join(t.name for t in given)})'
            + (f" {{{', '.join(f'{key} = {texts[key]}' for key in sorted(texts))}}}" if texts else "")
            + f" : ({', '.join(tensor_text(t.shape, t.dtype) for t in given)}) -> "
            + (types[0] if count == 1 else f"({', '.join(types)})")
            + (f" loc({string_text(place)})" if place else "")
        )
        names = [value] if count == 1 else [f"{value}#{i}" for i in range(count)]
        return tuple([Tensor(self, name, t) for name, t in zip(names, problem.results, strict=True)])

    def _one(self, op: OpDef, *operands: Tensor | None, **attrs: Attr) -> Tensor:
        return self._add(op, operands, attrs)[0]

    def text(self) -> str:
        """The module's MLIR text. Raises UsageError when the graph has no output."""
        if not self._outputs:
            raise UsageError("the graph has no output", hint="name one with output()")
        types = [tensor_text(t.shape, t.dtype) for t in self._outputs.values()]
        results = [f"{t} {{{NAME} = {string_text(name)}}}" for t, name in zip(types, self._outputs, strict=True)]
        return "\n".join(
            [
                "module {",
                f"  func.func @{self.name}({', '.join(self._arguments.values())}) -> ({', '.join(results)}) {{",
                *self._body,
                f"    return {', '.join(t.name for t in self._outputs.values())} : {', '.join(types)}",
                "  }",
                "}",
                "",
            ]
        )

    def module(self, catalog: OpCatalog | None = None) -> Module:
        """Parse the text. `catalog` holds the ops; None: the graph's own, else the installed plugins'."""
        from kernelforge.module import Module
        from kernelforge.registry import default_registry

        return Module.parse(self.text(), catalog or self._catalog or default_registry())

    # The transformer dialect. What each op means, and when it refuses its operands, is said in kernelforge.dialects.

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
