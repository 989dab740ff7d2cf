"""Kernels that treat a tensor row by row, a workgroup each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kernelforge.problem import Dim, Problem, TensorType
from kernelforge_metal.kernels.tensors import Tensor, count, dim_text, offsets, product_text, tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.variant import DeviceInfo

MAX_THREADS = 256

MAX_KEPT = 16
"""Elements of a row that a thread keeps in registers at most."""


class Rows:
    """The rows of a problem's tensors along an axis of the first operand: where each starts, and loops along it.

    `names` are those of the operands, then of the results, as many as are wanted; an absent optional operand is the one before
    the last. A tensor of rank 1 is the same for every row.
    """

    def __init__(self, problem: Problem, device: DeviceInfo, names: Sequence[str], axis: int = -1) -> None:
        self.problem, self.device = problem, device
        first = problem.operand(0)
        axis %= first.rank
        numbers = [i for i, t in enumerate((*problem.operands, *problem.results)) if t is not None]
        found = list(names)
        if len(found) > len(numbers):  # an optional operand is absent
            found = [*found[: len(numbers) - 1], found[-1]]
        self.tensors = [tensor(problem, i, name, device) for i, name in zip(numbers, found, strict=False)]
        outer = tuple(d for i, d in enumerate(first.shape) if i != axis)
        self.length: str = dim_text(problem, first.shape[axis])
        self.count, self.count_text = count(problem, outer), product_text(problem, outer)
        size = first.shape[axis]
        self.threads = threads_for(size)
        rank = first.rank
        spread = [t for t in self.tensors if t.type.rank == rank and (rank > 1 or t.type.shape == first.shape)]
        spread = [t for t in spread if t.type.shape == first.shape]
        self.setup, places = offsets(problem, outer, [_without(t.type, axis) for t in spread], "row")
        starts = {t.name: place for t, place in zip(spread, places, strict=True)} if rank > 1 else {}
        self._places = {}
        for t in self.tensors:
            own = axis if t.type.rank == rank else 0
            step = t.type.element_strides()[own]
            along = "i" if step == 1 else f"i * {step}u"
            self._places[t.name] = f"{starts[t.name]} + {along}" if t.name in starts else along
            if t.name in starts:
                self.setup += f"\n  let {t.name}_row = {starts[t.name]};"
                self._places[t.name] = f"{t.name}_row + {along}"

    def place(self, t: Tensor) -> str:
        """The offset of element `i` of the row."""
        return self._places[t.name]

    @property
    def kept(self) -> int:
        """How many elements of a row a thread has, if they are few enough to stay in registers; else 0."""
        size = self.problem.operand(0).shape[-1]
        each = -(-size // self.threads) if isinstance(size, int) else 0
        return each if each <= MAX_KEPT else 0

    def each(self, statements: str) -> str:
        """`statements` for each of the `kept` elements of a thread, one after the other: `i` is the element, and names that end
        in `_k` are of it alone. All loads can be under way at once."""
        size = self.problem.operand(0).shape[-1]
        assert isinstance(size, int)
        lines = []
        for k in range(self.kept):
            text = re.sub(r"\bi\b", f"i{k}", re.sub(r"_k\b", f"_{k}", statements))
            whole = (k + 1) * self.threads <= size
            lines.append(text if whole else f"if (i{k} < {size}u) {{ {text} }}")
        return "\n  ".join(lines)

    def declare(self, *names: str) -> str:
        """Statements before those of `each`: the elements' numbers, and f32 variables for each of them."""
        lines = [f"let i{k} = ids.thread + {k * self.threads}u;" for k in range(self.kept)]
        return " ".join([*lines, *(f"var {name}_{k} = 0.0;" for name in names for k in range(self.kept))])

    def loop(self, statements: str) -> str:
        """`statements` for each element `i` of the row, shared out among the threads."""
        return f"for (var i = ids.thread; i < {self.length}; i += {self.threads}u) {{ {statements} }}"


def threads_for(size: Dim) -> int:
    """Threads for a row of that many elements: a power of two from 32 to 256."""
    threads = 32
    while threads < MAX_THREADS and (isinstance(size, str) or threads * 2 <= size):
        threads *= 2
    return threads


def _without(t: TensorType, axis: int) -> TensorType:
    """The type of what is left of a tensor when an axis is taken away: the starts of its rows."""
    strides = t.element_strides()
    kept = [i for i in range(t.rank) if i != axis]
    return TensorType(tuple(t.shape[i] for i in kept), t.dtype, tuple(strides[i] for i in kept))
