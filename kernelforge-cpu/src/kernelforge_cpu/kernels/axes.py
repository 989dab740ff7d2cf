"""Loop nests over strided tensors: sizes that depend on dynamic dimensions, merged axes, addresses of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from kernelforge_cpu.kernel import Count

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType
    from kernelforge_cpu.emit import KernelBuilder, Value


class Size(NamedTuple):
    """A number times dynamic dimensions (sorted names)."""

    number: int
    names: tuple[str, ...] = ()

    def times(self, other: Size) -> Size:
        number = self.number * other.number
        return Size(number, tuple(sorted(self.names + other.names)) if number else ())

    def evaluate(self, dims: Mapping[str, int]) -> int:
        return self.number * prod(dims[name] for name in self.names)


ZERO, ONE = Size(0), Size(1)


def size_of(*dims: Dim) -> Size:
    """The product of `dims`."""
    number = prod(d for d in dims if isinstance(d, int))
    return Size(number, tuple(sorted(d for d in dims if isinstance(d, str))) if number else ())


def strides_of(t: TensorType) -> tuple[Size, ...]:
    """Strides in elements; those of a contiguous tensor may depend on dynamic dimensions."""
    if t.strides is not None:
        return tuple(map(Size, t.strides))
    return row_major(t.shape)


def row_major(shape: Sequence[Dim]) -> tuple[Size, ...]:
    return tuple(size_of(*shape[axis + 1 :]) for axis in range(len(shape)))


def broadcast_strides(t: TensorType, shape: Sequence[Dim]) -> tuple[Size, ...]:
    """Strides with which `t` is read over `shape` (numpy's rules): 0 along the axes it is repeated over."""
    own = (ZERO,) * (len(shape) - t.rank) + strides_of(t)
    dims: tuple[Dim, ...] = (1,) * (len(shape) - t.rank) + t.shape
    return tuple(ZERO if have == 1 else stride for have, stride in zip(dims, own, strict=True))


class Axis(NamedTuple):
    """One loop of a nest."""

    extent: Size
    strides: tuple[Size, ...]
    """Of each tensor, in elements."""


def loop_nest(shape: Sequence[Dim], *strides: Sequence[Size]) -> list[Axis]:
    """The loops over `shape`, outermost first. Neighbours that every tensor crosses with one stride are one loop; axes of
    size 1 have none."""
    nest: list[Axis] = []
    for dim, *steps in reversed(list(zip(shape, *strides, strict=True))):
        if dim == 1:
            continue
        if nest and all(
            step == nest[0].extent.times(inner) for step, inner in zip(steps, nest[0].strides, strict=True)
        ):
            nest[0] = Axis(nest[0].extent.times(size_of(dim)), nest[0].strides)
        else:
            nest.insert(0, Axis(size_of(dim), tuple(steps)))
    return nest


def emit_inside(index: Value, size: Value) -> Value:
    """Whether an index that was given is one of `size` rows. Kernels touch nothing for one that is not."""
    return index.ge(0) & index.lt(size)


def emit_size(k: KernelBuilder, problem: Problem, size: Size) -> Value:
    value = k.i64(size.number)
    for name in size.names:
        value = value * k.dim(problem.dims.index(name))
    return value


def emit_rows(k: KernelBuilder, problem: Problem, nest: Sequence[Axis]) -> Value:
    """The number of iterations of a nest."""
    total = ONE
    for axis in nest:
        total = total.times(axis.extent)
    return emit_size(k, problem, total)


def emit_offsets(k: KernelBuilder, problem: Problem, nest: Sequence[Axis], index: Value, tensors: int) -> list[Value]:
    """The offset in elements of each of the nest's `tensors` at iteration `index` (row-major over the nest)."""
    offsets = [k.i64(0)] * tensors
    for axis in reversed(nest):
        here = index
        if axis is not nest[0]:
            extent = emit_size(k, problem, axis.extent)
            index = k.binary("divu", index, extent)
            here = here - index * extent
        for t, stride in enumerate(axis.strides):
            if stride.number:
                offsets[t] = offsets[t] + here * emit_size(k, problem, stride)
    return offsets


def shared(problem: Problem, work: Size, grain: int) -> Count:
    """Parts of a phase with `work` units, of which less than `grain` are not worth a thread."""

    def parts(dims: Sequence[int], threads: int) -> int:
        return max(1, min(threads, work.evaluate(dict(zip(problem.dims, dims, strict=True))) // grain))

    return parts
