"""`quantize` of activations: int8 in groups of 32, as `kernelforge.quant` says, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT, GROUP, QUANTISED
from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import FLOATS, Tensor, contiguous_rows, emit_each_row, tensor
from kernelforge_cpu.ssa import vec

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Builder, Pointer, Value

GROUP_BYTES = QUANTISED[ACTIVATION_FORMAT]
ZEROS, VALUES = 4, 8
"""Offsets in a group, after its scale: eight times the sums of v over the elements whose index modulo 4 is below 2, and
over the others, each i16; the int8 values."""

GRAIN = 16384
"""Elements below which another thread costs more than it saves."""

SMALLEST = 2.0**-126
"""Normal f32: a smaller scale counts as 0."""
MAGIC = 1.5 * 2**23
"""f32 around it are whole numbers: adding it rounds to the nearest, halves to even, and leaves the number in the low bits."""


def takes_quantize(problem: Problem, device: DeviceInfo) -> Verdict:
    if problem.attr("format") != ACTIVATION_FORMAT:
        return Reject(f"makes {ACTIVATION_FORMAT}; {problem.attr('format')} is computed when a module is compiled")
    if problem.operand(0).dtype not in FLOATS:
        return Reject(f"takes {', '.join(FLOATS)}, not {problem.operand(0).dtype}")
    if not contiguous_rows(problem.operand(0)):
        return Reject(f"takes rows whose elements are neighbours, not {problem.operand(0)}")
    return Accept()


def build_quantize(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k, shape = new_kernel(problem, config, device), problem.operand(0).shape

    def text() -> str:
        x = tensor(k, problem, 0)
        groups = int(shape[-1]) // GROUP
        out = k.buffer(1, "i8")

        def row(index: Value, source: Pointer) -> None:
            own = out.at(index * (groups * GROUP_BYTES))
            with k.for_(0, groups) as loop:
                start = source.at(loop.i * GROUP)
                emit_group(k, own.at(loop.i * GROUP_BYTES), lambda i: start.load_f32(i, k.lanes))

        emit_each_row(k, problem, shape[:-1], [Tensor(x.pointer, x.strides[:-1])], row)
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*shape), GRAIN)),), text)


def emit_group(k: Builder, out: Pointer, load: Callable[[int], Value]) -> None:
    """Writes the group at `out` (counted in bytes) of the 32 numbers of which `load(i)` gives a vector from number i on."""
    parts = [load(i) for i in range(0, GROUP, k.lanes)]
    whole = vec(k.lanes, "i32")
    sizes = [k.bitcast(k.abs(x), whole) for x in parts]  # as integers they sort as numbers do, then infinity, then NaN
    while len(sizes) > 1:
        sizes = [k.max(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    largest = k.bitcast(k.reduce_max(sizes[0]), vec(0))
    finite = largest.lt(float("inf"))
    scale = largest / 127.0
    scale = k.select(scale.lt(SMALLEST), 0.0, scale)
    usable = k.select(finite, scale, 0.0).gt(0.0)
    inverse = 1.0 / k.select(usable, scale, 1.0)
    values = []
    for x in parts:
        rounded = k.bitcast(x * inverse + MAGIC, whole)
        values.append(k.convert(k.select(usable, rounded, 0), "i8"))
    v = k.concat(*values)
    sums = k.convert(v, "i16")
    while sums.type.lanes > 4:
        half = sums.type.lanes // 2
        sums = k.slice(sums, 0, half) + k.slice(sums, half, half)
    pairs = k.shuffle(sums, sums, (0, 2)) + k.shuffle(sums, sums, (1, 3))
    out.of("f32").store(k.select(finite, scale, float("nan")))
    out.at(ZEROS).of("i16").store(pairs << 3)
    out.at(VALUES).store(v)
