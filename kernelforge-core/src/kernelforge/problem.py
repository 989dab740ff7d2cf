"""A problem: one op instance to be run, with everything that a kernel may be specialised for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from kernelforge.dtype import DTYPES, GROUP, ITEMSIZE, QUANTISED
from kernelforge.errors import UsageError

Dim = int | str
"""A size: a number, or the name of a dynamic dimension (`"tokens"`; in a problem `"?0"`, `"?1"` by first appearance)."""

_TOO_MANY = 1 << 60
"""Elements; of eight bytes each, numpy cannot count their bytes."""

Attr = bool | int | float | str | tuple[int, ...]
"""An attribute's value."""


@dataclass(frozen=True)
class TensorType:
    """Shape, element type and layout of one operand or result."""

    shape: tuple[Dim, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    """Strides in elements; None is row-major contiguous. The strides of dynamic outer dimensions are numbers too."""
    constant: bool = False
    """Known when compiling (a weight): a kernel may ask for it packed."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{self.dtype}'", hint=f"one of {', '.join(DTYPES)}")
        for dim in self.shape:
            if isinstance(dim, int) and dim < 0:
                raise UsageError(f"negative dimension {dim} in shape {self.shape}")
        if prod(d or 1 for d in self.shape if isinstance(d, int)) >= _TOO_MANY:
            raise UsageError(f"a tensor of shape {self.shape} has more elements than memory can have")
        if self.strides is not None and len(self.strides) != len(self.shape):
            raise UsageError(f"{len(self.strides)} strides for a tensor of rank {len(self.shape)}")
        if self.quantised:
            columns = self.shape[-1] if self.shape else 1
            if isinstance(columns, str) or columns % GROUP:
                raise UsageError(f"{self.dtype}{list(self.shape)} has rows that are no multiple of {GROUP} elements")
            if self.strides is not None:
                raise UsageError(f"{self.dtype}{list(self.shape)} cannot have strides")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def quantised(self) -> bool:
        """Whether its elements come in groups with a scale: see `kernelforge.quant`."""
        return self.dtype in QUANTISED

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element. Raises UsageError for a quantised tensor, where only groups have a size."""
        if self.quantised:
            raise UsageError(f"an element of {self.dtype} has no size of its own")
        return ITEMSIZE[self.dtype]

    @cached_property
    def static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    def static_shape(self, dims: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape with dynamic dimensions taken from `dims`. Raises UsageError for one that is missing there."""
        try:
            return tuple(d if isinstance(d, int) else (dims or {})[d] for d in self.shape)
        except KeyError as error:
            raise UsageError(f"dynamic dimension {error} has no size", hint="pass it in dims=") from None

    def size(self, dims: Mapping[str, int] | None = None) -> int:
        """Number of elements."""
        return prod(self.static_shape(dims))

    def bytes_of(self, elements: int) -> int:
        """Bytes of that many elements; of a quantised tensor, of whole groups."""
        if self.quantised:
            return elements // GROUP * QUANTISED[self.dtype]
        return elements * self.itemsize

    def nbytes(self, dims: Mapping[str, int] | None = None) -> int:
        return self.bytes_of(self.size(dims))

    def array_shape(self, dims: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape of the numpy array that holds it: that of a quantised tensor counts groups along the last axis."""
        shape = self.static_shape(dims)
        return (*shape[:-1], shape[-1] // GROUP) if self.quantised else shape

    @property
    def array_dims(self) -> tuple[Dim, ...]:
        """As `array_shape`, dynamic dimensions by name."""
        *lead, last = self.shape or (1,)
        return (*lead, last // GROUP) if self.quantised and isinstance(last, int) else self.shape

    def row_major_strides(self) -> tuple[int, ...] | None:
        """Row-major strides in elements, or None when one of them depends on a dynamic dimension."""
        strides: list[int] = []
        step = 1
        for axis in range(self.rank - 1, -1, -1):
            strides.append(step)
            dim = self.shape[axis]
            if isinstance(dim, str):
                if axis > 0:
                    return None
            else:
                step *= dim
        return tuple(reversed(strides))

    def element_strides(self) -> tuple[int, ...]:
        """Strides in elements. Raises UsageError when they depend on a dynamic dimension."""
        strides = self.strides if self.strides is not None else self.row_major_strides()
        if strides is None:
            raise UsageError(f"strides of {self} depend on a dynamic dimension that is not its first")
        return strides

    @property
    def contiguous(self) -> bool:
        """Row-major without gaps (dimensions of size 1 may have any stride)."""
        if self.strides is None:
            return True
        reference = self.row_major_strides()
        if reference is None:
            return False
        pairs = zip(self.shape, self.strides, reference, strict=True)
        return all(have == want for dim, have, want in pairs if dim != 1)

    def __str__(self) -> str:
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.strides is not None:
            text += f":[{','.join(map(str, self.strides))}]"
        return text + ("@const" if self.constant else "")


_TENSOR = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[^\]]*)\](?::\[(?P<strides>[^\]]*)\])?(?P<constant>@const)?")
_DIM = re.compile(r"\?\d+|\d+|[A-Za-z_]\w*")
_PROBLEM = re.compile(r"(?P<op>[\w.]+)\((?P<operands>.*)\) -> \((?P<results>.*)\) \{(?P<attrs>.*)\}", re.DOTALL)
_STRING = r'"(?:[^"\\]|\\.)*"'
_ATTR = re.compile(rf"(?P<name>\w+)=(?P<value>{_STRING}|\[[^\]]*\]|[^,\]]+)")


def parse_tensor_type(text: str) -> TensorType:
    """Inverse of `str(TensorType)`. Raises UsageError."""
    match = _TENSOR.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a tensor type", hint="write it as f32[4,16]")
    dims: list[Dim] = []
    for item in filter(None, match["shape"].split(",")):
        if _DIM.fullmatch(item.strip()) is None:
            raise UsageError(f"'{item}' in '{text}' is not a dimension")
        dims.append(int(item) if item.strip().isdigit() else item.strip())
    strides = match["strides"]
    try:
        parsed = None if strides is None else tuple(int(s) for s in strides.split(",") if s)
    except ValueError:
        raise UsageError(f"strides of '{text}' are not numbers") from None
    return TensorType(tuple(dims), match["dtype"], parsed, match["constant"] is not None)


def _format_attr(value: Attr) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return repr(value)


def _parse_attr(text: str) -> Attr:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if text.startswith("["):
        return tuple(int(item) for item in text[1:-1].split(",") if item)
    try:
        return int(text)
    except ValueError:
        return float(text)


def _split_operands(text: str) -> Iterator[str]:
    """Split at the commas that are not inside brackets."""
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


@dataclass(frozen=True)
class Problem:
    """One op instance: op name, operand and result types, attributes. `str(problem)` is its canonical key."""

    op: str
    """Full name, `dialect.op`."""
    operands: tuple[TensorType | None, ...]
    """In the op's order; None where an optional operand is absent. Variadic operands are listed one by one."""
    results: tuple[TensorType, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    """Sorted by name, defaults filled in."""

    def __post_init__(self) -> None:
        if "." not in self.op:
            raise UsageError(f"'{self.op}' is not an op name", hint="write it as dialect.op, e.g. transformer.matmul")
        names = [name for name, _ in self.attrs]
        if names != sorted(set(names)):
            raise UsageError(f"attributes of {self.op} must be sorted and unique, got {names}")

    def attr(self, name: str) -> Attr:
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(name)

    def operand(self, index: int) -> TensorType:
        """The type of a present operand. Raises UsageError when it is absent."""
        found = self.operands[index] if index < len(self.operands) else None
        if found is None:
            raise UsageError(f"{self.op} has no operand {index} here")
        return found

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions in order of first appearance: the order of the kernel ABI's `dims`."""
        tensors = [t for t in (*self.operands, *self.results) if t is not None]
        return tuple(dict.fromkeys(d for t in tensors for d in t.shape if isinstance(d, str)))

    def canonical(self) -> Problem:
        """The same problem with dynamic dimensions renamed to ?0, ?1, ... so that equal problems compare equal."""
        if all(d == f"?{i}" for i, d in enumerate(self.dims)):
            return self
        return self.with_dims({d: f"?{i}" for i, d in enumerate(self.dims)})

    def with_dims(self, dims: Mapping[str, Dim]) -> Problem:
        """Replace dynamic dimensions by sizes or by other names; those not in `dims` stay."""

        def renamed(t: TensorType) -> TensorType:
            shape = tuple(d if isinstance(d, int) else dims.get(d, d) for d in t.shape)
            return TensorType(shape, t.dtype, t.strides, t.constant)

        operands = tuple(None if t is None else renamed(t) for t in self.operands)
        return Problem(self.op, operands, tuple(renamed(t) for t in self.results), self.attrs)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        operands = ", ".join("_" if t is None else str(t) for t in self.operands)
        results = ", ".join(map(str, self.results))
        attrs = ", ".join(f"{name}={_format_attr(value)}" for name, value in self.attrs)
        return f"{self.op}({operands}) -> ({results}) {{{attrs}}}"


def parse_problem(text: str) -> Problem:
    """Inverse of `str(problem)`. Raises UsageError with the part that is wrong."""
    match = _PROBLEM.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"'{text}' is not a problem", hint='written as "dialect.op(f32[2,3], _) -> (f32[2,3]) {name=1}"'
        )
    operands = tuple(None if t == "_" else parse_tensor_type(t) for t in _split_operands(match["operands"]))
    results = tuple(parse_tensor_type(t) for t in _split_operands(match["results"]))
    try:
        attrs = tuple((m["name"], _parse_attr(m["value"].strip())) for m in _ATTR.finditer(match["attrs"]))
    except ValueError:
        raise UsageError(f"attributes '{match['attrs']}' cannot be read") from None
    return Problem(match["op"], operands, results, attrs)
