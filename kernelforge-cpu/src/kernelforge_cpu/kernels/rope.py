"""Rotary position embedding by a table of cosines and sines."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kernelforge.variant import Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_inside, emit_size, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import takes_rows, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Attr, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value
    from kernelforge_cpu.kernel import Array

GRAIN = 32768
"""Elements below which another thread costs more than it saves."""

MAX_TABLE_POSITIONS = 131072
"""A table of this length and 128 rotated elements has 64 MiB."""


def takes_rope(problem: Problem, device: DeviceInfo) -> Verdict:
    positions = problem.attr("max_position")
    assert isinstance(positions, int)
    if positions > MAX_TABLE_POSITIONS:
        return Reject(f"tabulates at most {MAX_TABLE_POSITIONS} positions, not {positions}")
    if isinstance(problem.operand(0).shape[-1], str):
        return Reject("takes heads of a static size")
    return takes_rows(problem, device)


@lru_cache(maxsize=4)
def rotations(head_size: int, attrs: tuple[tuple[str, Attr], ...]) -> Array:
    """f32 [max_position, 2, pairs]: cosine and sine of every position's angles, computed in float64. Equal arguments give
    the same array, so that all ropes of a model share one."""
    import numpy as np

    from kernelforge.dialects.transformer.rope import inverse_frequencies

    named = dict(attrs)
    positions = named["max_position"]
    assert isinstance(positions, int)
    frequencies = inverse_frequencies(head_size, named)
    table = np.empty((positions, 2, frequencies.size), np.float32)
    for first in range(0, positions, 4096):  # in blocks, to keep the float64 angles small
        angles = np.arange(first, min(first + 4096, positions))[:, None] * frequencies
        table[first : first + 4096, 0], table[first : first + 4096, 1] = np.cos(angles), np.sin(angles)
    return table


class Heads(NamedTuple):
    """The heads of one token."""

    source: Pointer
    result: Pointer
    number: Value
    steps: tuple[Value, Value]
    """Elements from one head to the next, in source and result."""


def emit_turned(k: KernelBuilder, heads: Heads, row: Pointer, size: int, pairs: int, *, interleaved: bool) -> None:
    """Rotates heads of `size` elements by `row`, a position's cosines and sines. They are loaded once for all heads."""
    # No wider than the pairs: a vector with empty lanes costs as much as a full one.
    lanes = min(k.lanes, 1 << max(0, pairs.bit_length() - 1))

    def step(i: Value, valid: Value | None) -> None:
        cos, sin = row.load(i, lanes, valid=valid), row.load(i + pairs, lanes, valid=valid)
        with k.for_(0, heads.number) as head:
            src, dst = heads.source.at(head.i * heads.steps[0]), heads.result.at(head.i * heads.steps[1])
            if interleaved:
                both = None if valid is None else valid * 2
                x = src.load_f32(i * 2, 2 * lanes, valid=both)
                a, b = (k.shuffle(x, x, range(first, 2 * lanes, 2)) for first in (0, 1))
                a, b = k.fma(a, cos, -(b * sin)), k.fma(b, cos, a * sin)
                dst.store(k.shuffle(a, b, [j // 2 + j % 2 * lanes for j in range(2 * lanes)]), i * 2, valid=both)
            else:
                a, b = (src.load_f32(i + first, lanes, valid=valid) for first in (0, pairs))
                dst.store(k.fma(a, cos, -(b * sin)), i, valid=valid)
                dst.store(k.fma(b, cos, a * sin), i + pairs, valid=valid)

    k.vectorize(0, pairs, step, lanes=lanes)
    if 2 * pairs < size:
        emit_copied(k, heads, 2 * pairs, size)


def emit_angles(k: KernelBuilder, turns: Pointer, position: Value, table: Array) -> Pointer:
    """The row of a position in the table; that of position 0 where it has none."""
    places, _, pairs = table.shape
    return turns.at(k.select(emit_inside(position, k.i64(places)), position, 0) * (2 * pairs))


def emit_copied(k: KernelBuilder, heads: Heads, first: int, size: int) -> None:
    """Copies the elements of the heads from `first` on."""
    with k.for_(0, heads.number) as head:
        src, dst = heads.source.at(head.i * heads.steps[0]), heads.result.at(head.i * heads.steps[1])
        k.vectorize(first, size, lambda i, valid: dst.store(src.load(i, k.lanes, valid=valid), i, valid=valid))


def build_rope(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    shape, interleaved = problem.operand(0).shape, bool(problem.attr("interleaved"))
    size = shape[-1]
    assert isinstance(size, int)
    table = rotations(size, problem.attrs)
    pairs = table.shape[2]
    x, positions, out = (tensor(k, problem, i) for i in range(3))
    turns = k.buffer(3, "f32")
    count = emit_size(k, problem, size_of(shape[1]))
    steps = [[emit_size(k, problem, s) for s in t.strides] for t in (x, positions, out)]
    with k.for_(*k.share(emit_size(k, problem, size_of(shape[0])))) as token:
        source, result = x.pointer.at(token.i * steps[0][0]), out.pointer.at(token.i * steps[2][0])
        heads = Heads(source, result, count, (steps[0][1], steps[2][1]))
        position = k.convert(positions.pointer.load(token.i * steps[1][0]), "i64")
        angles = emit_angles(k, turns, position, table)
        emit_turned(k, heads, angles, size, pairs, interleaved=interleaved)
    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), k.text(), tables=(table,))
