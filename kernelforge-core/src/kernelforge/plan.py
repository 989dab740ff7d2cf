"""The plan of a module: ops in order, each with its chosen kernel, and a place for every value.

A plan is data. It holds no kernel, no array and no pointer, so that it can be printed, compared and cached; a backend's
`compile` turns it into an executable.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from kernelforge.constant import Constant
from kernelforge.problem import Problem, TensorType
from kernelforge.selection import ConfigSource
from kernelforge.variant import Config

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


@dataclass(frozen=True)
class Value:
    """A tensor of the plan and where it lives."""

    type: TensorType
    place: Literal["input", "constant", "arena", "output", "view"]
    name: str = ""
    """Of an input or output: its name."""
    base: int = -1
    """Of a view: the value whose memory it shares (never itself a view)."""
    offset: int = 0
    """Of a view: elements from the base's start."""
    constant: Constant | None = None
    donated: bool = False
    """Of an input: steps may write into it."""


def root_of(values: Sequence[Value], value: int) -> int:
    """The value whose memory a value uses: itself, or the base of a view."""
    return values[value].base if values[value].place == "view" else value


@dataclass(frozen=True)
class Step:
    """One kernel call."""

    problem: Problem
    """Canonical: dynamic dimensions are ?0, ?1, ..."""
    dims: tuple[str, ...]
    """The plan's names of ?0, ?1, ..."""
    operands: tuple[int | None, ...]
    results: tuple[int, ...]
    variant: str
    config: Config
    group: int
    """Steps of one group do not depend on each other: a barrier is needed only between groups."""
    location: str = ""
    config_source: ConfigSource = "default"


@dataclass(frozen=True)
class PartKernel:
    """What runs, or would run, a part."""

    problem: str
    variant: str
    plugin: str

    @property
    def op(self) -> str:
        return self.problem.partition("(")[0]


@dataclass(frozen=True)
class Fusion:
    """What became of a fused op; decided by `kernelforge.fusion`."""

    problem: Problem
    """Canonical: dynamic dimensions are ?0, ?1, ..."""
    dims: tuple[str, ...]
    """The names of ?0, ?1, ..."""
    apart: bool
    reason: str
    forced: bool
    """Decided by a kernel that the user named."""
    parts: tuple[PartKernel, ...]
    """With those of parts that are taken apart in turn; empty where a part has no kernel."""


@dataclass(frozen=True)
class Plan:
    target: str
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    max_dims: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dynamic dimensions for which memory is reserved at the start; larger ones re-pack the arena."""
    fusions: tuple[Fusion, ...] = ()
    """What became of each fused problem, once."""

    def root(self, value: int) -> int:
        """See `root_of`."""
        return root_of(self.values, value)

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of first appearance among the inputs."""
        shapes = [self.values[i].type.shape for i in self.inputs]
        return tuple(dict.fromkeys(d for shape in shapes for d in shape if isinstance(d, str)))

    @cached_property
    def lifetimes(self) -> dict[int, tuple[int, int]]:
        """For each arena value: the first and the last group that touches its memory."""
        spans: dict[int, tuple[int, int]] = {}
        for step in self.steps:
            for value in (*step.operands, *step.results):
                if value is None:
                    continue
                root = self.root(value)
                if self.values[root].place == "arena":
                    first, _ = spans.get(root, (step.group, step.group))
                    spans[root] = (first, step.group)
        return spans

    def pack(self, dims: Mapping[str, int], *, alignment: int = ALIGNMENT) -> ArenaLayout:
        """Place all arena values for these sizes, at multiples of `alignment` bytes: values whose lifetimes overlap get
        disjoint memory.

        Greedy by size (largest first, each at the lowest offset where it fits), which is within a few percent of the
        lower bound for transformer graphs (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
        Inference", 2020, greedy-by-size).
        """
        sizes = {v: -(-self.values[v].type.nbytes(dims) // alignment) * alignment for v in self.lifetimes}
        offsets: dict[int, int] = {}
        placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last; in order
        for value in sorted(sizes, key=lambda v: (-sizes[v], v)):
            first, last = self.lifetimes[value]
            offset = 0
            for begin, end, other_first, other_last in placed:
                if other_first > last or other_last < first:
                    continue
                if offset + sizes[value] <= begin:
                    break
                offset = max(offset, end)
            offsets[value] = offset
            insort(placed, (offset, offset + sizes[value], first, last))
        return ArenaLayout(offsets, max((end for _, end, _, _ in placed), default=0))


@dataclass(frozen=True)
class ArenaLayout:
    offsets: Mapping[int, int]
    """Byte offset of each arena value."""
    nbytes: int
