"""reshape, transpose, slice, split and concat where they cannot be views: strided copies of elements as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import Size, emit_size, row_major, shared, size_of, strides_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import Tensor, emit_map

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Value

GRAIN = 65536
"""Bytes below which another thread costs more than it saves."""


class Copier:
    """Copies between tensors of one problem, which all have one element type."""

    def __init__(self, problem: Problem, config: Config, device: DeviceInfo) -> None:
        self.problem = problem
        self.k = new_kernel(problem, config, device)
        self.itemsize = problem.results[0].itemsize
        self.element = f"i{8 * self.itemsize}"  # bits only: nothing is rounded, no NaN is changed

    def at(self, index: int, start: Value | int = 0) -> Tensor:
        """Operand or result `index`, from element `start` on."""
        t = (*self.problem.operands, *self.problem.results)[index]
        assert t is not None
        return Tensor(self.k.buffer(index, self.element).at(start), strides_of(t))

    def copy(self, shape: Sequence[Dim], source: Tensor, result: Tensor) -> None:
        lanes = 4 * self.k.lanes // self.itemsize
        emit_map(self.k, self.problem, shape, [source], result, lambda x: x, lanes=lanes)

    def kernel(self) -> NativeKernel:
        work = Size(self.itemsize).times(size_of(*self.problem.operand(0).shape))
        return NativeKernel((Phase(self.k.name, shared(self.problem, work, GRAIN)),), self.k.text())


def build_copy(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """cast to the same type: the copy by which a value gets memory of its own."""
    c = Copier(problem, config, device)
    c.copy(problem.results[0].shape, c.at(0), c.at(1))
    return c.kernel()


def takes_reshape(problem: Problem, device: DeviceInfo) -> Verdict:
    if not problem.results[0].contiguous:
        return Reject("writes a contiguous result")
    return Accept()


def build_reshape(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    c = Copier(problem, config, device)
    shape = problem.operand(0).shape
    c.copy(shape, c.at(0), Tensor(c.at(1).pointer, row_major(shape)))
    return c.kernel()


def build_transpose(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    c = Copier(problem, config, device)
    source, perm = c.at(0), problem.attr("perm")
    assert isinstance(perm, tuple)
    c.copy(problem.results[0].shape, Tensor(source.pointer, tuple(source.strides[axis] for axis in perm)), c.at(1))
    return c.kernel()


def build_slice(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    c = Copier(problem, config, device)
    starts = problem.attr("starts")
    assert isinstance(starts, tuple)
    start = c.k.i64(0)
    for first, stride in zip(starts, strides_of(problem.operand(0)), strict=True):
        start = start + emit_size(c.k, problem, stride) * first
    c.copy(problem.results[0].shape, c.at(0, start), c.at(1))
    return c.kernel()


def build_split(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    c = Copier(problem, config, device)
    axis, stride = _axis(c.k, problem, problem.operand(0))
    start = c.k.i64(0)
    for i, piece in enumerate(problem.results):
        c.copy(piece.shape, c.at(0, start * stride), c.at(1 + i))
        start = start + emit_size(c.k, problem, size_of(piece.shape[axis]))
    return c.kernel()


def build_concat(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    c = Copier(problem, config, device)
    axis, stride = _axis(c.k, problem, problem.results[0])
    start = c.k.i64(0)
    for i in range(len(problem.operands)):
        piece = problem.operand(i)
        c.copy(piece.shape, c.at(i), c.at(len(problem.operands), start * stride))
        start = start + emit_size(c.k, problem, size_of(piece.shape[axis]))
    return c.kernel()


def _axis(k: KernelBuilder, problem: Problem, whole: TensorType) -> tuple[int, Value]:
    """The axis that is cut or joined, and its stride in `whole`."""
    axis = problem.attr("axis")
    assert isinstance(axis, int)
    return axis % whole.rank, emit_size(k, problem, strides_of(whole)[axis])
