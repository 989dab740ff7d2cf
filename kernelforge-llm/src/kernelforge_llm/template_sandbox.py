"""Jinja for templates of strangers: its immutable sandbox, with an end to what one may compute and keep.

Jinja's own only bounds `range`. Here each turn of a loop, call and filter looks at the time; an operation that multiplies (`*`,
`replace`, `center`, a format) is refused before it makes too much; and what all of them make is added up. What may take longer or
more than that tells, and what no chat template has a use for, is not there.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from math import prod
from string import Formatter
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""Of the processor; a long conversation takes milliseconds."""
MOST = 100_000_000
"""Bytes that may be made in all, or by one operation."""

MOST_BITS = 4096
"""Of an integer: multiplying larger ones takes longer and longer, and nothing can stop it."""
WIDEST = 9999
"""Characters of one field of a format."""

_MULTIPLYING = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "zfill"}
)
"""Filters and methods whose result may be as large as the product of what they take."""
_SEARCHING = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"})
"""What may take as long as the product of the lengths of both texts; from the left, Python searches in linear time."""
_ABSENT_FILTERS = ("pprint", "striptags", "urlize", "wordwrap")
_ABSENT_METHODS = frozenset({"encode", "to_bytes", "translate"})
_PERCENT = re.compile(r"%(?:%|(?:\([^()]*\))?([-+ #0\d.*]*))")
_LONGEST_NUMBER = 400
"""Characters of what counts little and is written out, such as 1e308."""
_LONGEST_ITERATOR = 1_000_000
"""Nobody knows before it is taken from. What may be made in all bounds it so."""


class LimitError(TemplateError):
    """The template wants too much."""


class _Names(Namespace):
    """May hold itself, or another one many times."""

    def __repr__(self) -> str:
        return "<namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """For one rendering, from parsing on. Raises LimitError."""

    intercepted_binops = frozenset({"+", "*", "**", "//", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """`filters` replace Jinja's own of their names; `options` are those of Jinja."""
        super().__init__(**options)
        self._until, self._left = time.thread_time() + SECONDS, MOST
        del self.globals["lipsum"]
        for name in _ABSENT_FILTERS:
            del self.filters[name]
        self.globals["namespace"] = _Names
        self.filters = {n: self._bounded(n, f) for n, f in {**self.filters, **filters}.items()}
        # What takes a context is not called when compiling.
        self.filters["in turns"] = pass_context(lambda context, values: self._turns(values))
        self.filters["made"] = pass_context(lambda context, value: self._made(value))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counted().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _ABSENT_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, called: Any, /, *args: Any, **options: Any) -> Any:
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps `format`
        owned = [owner] if isinstance(owner, str | list | tuple) else []
        name = getattr(called, "__name__", "")
        if name in ("format", "format_map") and isinstance(owner, str):
            self._check_format(owner, _of_braces, args, options)
        self._check(name, (*owned, *args), options)
        return self._made(super().call(context, called, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._turn()
        for value in (left, right):
            if isinstance(value, int):
                self._check_bits(value.bit_length())
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, _of_percents, right)
        elif operator == "*" and not numbers:
            self._room(_factor(left), _factor(right))
        return self._made(super().call_binop(context, operator, left, right))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        given = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # also what says that Jinja gives it a context
        def bounded(*args: Any, **options: Any) -> Any:
            if name == "format":
                self._check_format(str(args[0]), _of_percents, args[1:], options)
            self._check(name, args[given:], options)
            return self._made(function(*args, **options))

        return bounded

    def _check(self, name: str, values: Sequence[Any], options: Mapping[str, Any]) -> None:
        self._turn()
        given = (*values, *options.values())
        if name == "replace" and len(values) > 2:
            self._room(self._size(values[0]) // max(_factor(values[1]), 1) + 1, _factor(values[2]))
        elif name in _SEARCHING:
            self._room(*(len(value) for value in given if isinstance(value, str)))
        elif name in _MULTIPLYING:
            self._room(*map(_factor, given))
        elif name == "round":  # computes that power of 10
            self._check_bits(4 * max(map(_factor, given[1:]), default=0))
        elif name == "sum" and any(isinstance(value, list | tuple) for value in given[1:]):
            raise LimitError("it adds up what are no numbers")

    def _check_format(self, text: str, specs_of: Callable[[str], list[str]], *values: Any) -> None:
        """Refuses fields that are too wide, or as wide as is told elsewhere (`*`), and more than there is room for."""
        self._room(len(text), _LONGEST_NUMBER)
        specs = specs_of(text)
        widths = [int(width) for spec in specs for width in re.findall(r"\d{1,9}", spec)]
        if any("*" in spec for spec in specs) or max(widths, default=0) > WIDEST:
            raise LimitError(f"it formats to a width of more than {WIDEST}, or to one that is not written there")
        self._room(sum(widths) + len(specs) * (self._size(values) + _LONGEST_NUMBER))

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._turn()
            yield value

    def _turn(self) -> None:
        if time.thread_time() > self._until:
            raise LimitError(f"it computes for more than {SECONDS:g} s")

    def _room(self, *factors: int) -> None:
        if prod(max(factor, 1) for factor in factors) > MOST:
            raise LimitError(f"it makes more than {MOST // 1_000_000} MB")

    def _check_bits(self, bits: int) -> None:
        if bits > MOST_BITS:
            raise LimitError(f"it computes with integers of more than {MOST_BITS} bits")

    def _made(self, value: Any) -> Any:
        """Takes off the size of a value."""
        if isinstance(value, int):
            self._check_bits(value.bit_length())
        self._left -= self._size(value)
        if self._left < 0:
            raise LimitError(f"it makes more than {MOST // 1_000_000} MB")
        return value

    def _size(self, value: Any) -> int:
        """Of what a value has of its own, and of what is in it: one may hold another many times."""
        size, level = _extent(value), [value]
        while level and size <= MOST:
            self._turn()
            level = [inner for each in level if isinstance(each, list | tuple | dict) for inner in _inside(each)]
            size += sum(map(_extent, level))
        return size


class _Counted(NodeTransformer):
    """Puts filters where a template makes something without a call: loops, literals, joined and written text."""

    def visit(self, node: nodes.Node, *args: Any, **options: Any) -> nodes.Node:
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _filtered(node.iter, "in turns")
            case nodes.Output() | nodes.Concat():  # each part, before all are joined
                node.nodes = [_filtered(_constant(child), "made") for child in node.nodes]
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return _filtered(node, "made")
        return node


def _constant(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _of_percents(text: str) -> list[str]:
    """What says how the fields of a format look, flags and widths."""
    return [found[1] for found in _PERCENT.finditer(text) if found[1] is not None]


def _of_braces(text: str) -> list[str]:
    """As `_of_percents`; `*` is for widths that other fields have, elsewhere it is what fills a field."""
    specs = [spec or "" for _, field, spec, _ in Formatter().parse(text) if field is not None]
    return [re.sub(r"\{.*", "*", spec.replace("*", " ")) for spec in specs]


def _extent(value: Any) -> int:
    """About how many bytes."""
    if isinstance(value, list | tuple | dict):
        return 128 * len(value)
    return len(value) if isinstance(value, str) else 1


def _factor(value: Any) -> int:
    """A number counts as how often or how wide."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, Iterator):
        return _LONGEST_ITERATOR
    return len(value) if isinstance(value, Sized) else 1


def _inside(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value
