"""Jinja for templates of strangers: its immutable sandbox, with an end to what one may compute and keep.

Jinja's own only bounds `range`. Here each turn of a loop, call and filter looks at the time; an operation that multiplies (`*`,
`replace`, `center`) is refused before it makes too much; and what all of them make is added up.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
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

_MULTIPLYING = frozenset(
    {"batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice", "translate", "zfill"}
)
"""Filters and methods whose result may be as large as the product of what they take."""
_WIDTH = re.compile(r"\d{5,}|%[-+ #0\d.]*\*|\{[^{}]*\{")
"""Of a format: large, or taken from what is formatted (`%*d`, `{:{}}`)."""


class LimitError(TemplateError):
    """The template wants too much."""


class _Names(Namespace):
    """May hold itself, or another one many times."""

    def __repr__(self) -> str:
        return "<namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """For one rendering, from parsing on. Raises LimitError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        """`filters` replace Jinja's own of their names; `options` are those of Jinja."""
        super().__init__(**options)
        self._until, self._left = time.thread_time() + SECONDS, MOST
        del self.globals["lipsum"]
        self.globals["namespace"] = _Names
        self.filters = {n: self._bounded(n, f) for n, f in {**self.filters, **filters}.items()}
        # What takes a context is not called when compiling.
        self.filters["in turns"] = pass_context(lambda context, values: self._turns(values))
        self.filters["made"] = pass_context(lambda context, value: self._made(value))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counted().visit(tree)
        return tree

    def call(self, context: Context, called: Any, /, *args: Any, **options: Any) -> Any:
        owner = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps `format`
        owned = [owner] if isinstance(owner, str | list | tuple) else []
        self._check(getattr(called, "__name__", ""), *owned, *args, *options.values())
        return self._made(super().call(context, called, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._turn()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._room(left.bit_length(), right)
        elif operator == "%" and isinstance(left, str):
            self._check("format", left, *(right if isinstance(right, tuple) else (right,)))
        elif operator == "*" and not numbers:
            self._room(_factor(left), _factor(right))
        return self._made(super().call_binop(context, operator, left, right))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        given = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # also what says that Jinja gives it a context
        def bounded(*args: Any, **options: Any) -> Any:
            self._check(name, *args[given:], *options.values())
            return self._made(function(*args, **options))

        return bounded

    def _check(self, name: str, *values: Any) -> None:
        self._turn()
        if name in ("format", "format_map"):
            if _WIDTH.search(str(values[0])):
                raise LimitError("it formats to a width of more than 9999, or to one that is not written there")
        elif name in _MULTIPLYING:
            self._room(*map(_factor, values))

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

    def _made(self, value: Any) -> Any:
        """Takes off what a value has of its own, and what is in it: one may hold another many times."""
        level = [value]
        while level:
            self._turn()
            self._left -= sum(map(_extent, level))
            if self._left < 0:
                raise LimitError(f"it makes more than {MOST // 1_000_000} MB")
            level = [inner for each in level if isinstance(each, list | tuple | dict) for inner in _inside(each)]
        return value


class _Counted(NodeTransformer):
    """Puts filters where a template makes something without a call: loops, literals, joined and written text."""

    def visit(self, node: nodes.Node, *args: Any, **options: Any) -> nodes.Node:
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _filtered(node.iter, "in turns")
            case nodes.Output():
                node.nodes = [_filtered(_constant(child), "made") for child in node.nodes]
            case nodes.Concat() | nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return _filtered(node, "made")
        return node


def _constant(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _extent(value: Any) -> int:
    """About how many bytes."""
    if isinstance(value, int):
        return value.bit_length() // 8
    if isinstance(value, list | tuple | dict):
        return 128 * len(value)
    return len(value) if isinstance(value, str) else 1


def _factor(value: Any) -> int:
    """A number counts as how often or how wide."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _inside(value: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value
