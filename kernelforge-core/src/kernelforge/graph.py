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
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.methods import TransformerMethods
from kernelforge.dtype import WEIGHT_FORMATS
from kernelforge.errors import UsageError
from kernelforge.module import CONSTANT, DIMS, DONATED, NAME, TOKENS
from kernelforge.op import OpDef, OpError
from kernelforge.problem import Attr, Dim, TensorType
from kernelforge.syntax import attribute_texts, string_text, tensor_text

if TYPE_CHECKING:
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


class Graph(TransformerMethods):
    """A function under construction. The ops of the transformer dialect are methods, those of others go through `op()`."""

    def __init__(self, name: str = "main", catalog: OpCatalog | None = None) -> None:
        """`catalog` is where `op()` looks up ops; None: the installed plugins'. Raises UsageError for a name that is none."""
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
