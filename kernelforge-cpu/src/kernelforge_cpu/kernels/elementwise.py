"""silu, gelu, add, mul and cast: one map over tensors of any layout, vectorised where the innermost axis is contiguous."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.activation import activate
from kernelforge_cpu.kernels.axes import broadcast_strides, shared, size_of
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.strided import FLOATS, Tensor, emit_map, tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Value

GRAIN = 16384
"""Elements below which another thread costs more than it saves."""


def map_kernel(
    problem: Problem, config: Config, device: DeviceInfo, body: Callable[..., Value], *, lanes: int = 0
) -> NativeKernel:
    """The kernel that applies `body(builder, *elements)` over the shape of the problem's result."""
    k = new_kernel(problem, config, device)
    out = problem.results[0]

    def text() -> str:
        sources = [
            Tensor(k.buffer(i, t.dtype), broadcast_strides(t, out.shape))
            for i, t in enumerate(problem.operands)
            if t is not None
        ]
        emit_map(
            k,
            problem,
            out.shape,
            sources,
            tensor(k, problem, len(problem.operands)),
            lambda *v: body(k, *v),
            lanes=lanes,
        )
        return k.text()

    return NativeKernel((Phase(k.name, shared(problem, size_of(*out.shape), GRAIN)),), text)


def build_silu(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return map_kernel(problem, config, device, lambda k, x: activate(k, "silu", k.convert(x, "f32")))


def build_gelu(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    name = "gelu_tanh" if problem.attr("approximate") == "tanh" else "gelu"
    return map_kernel(problem, config, device, lambda k, x: activate(k, name, k.convert(x, "f32")))


def build_add(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return map_kernel(problem, config, device, lambda k, a, b: k.convert(a, "f32") + k.convert(b, "f32"))


def build_mul(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return map_kernel(problem, config, device, lambda k, a, b: k.convert(a, "f32") * k.convert(b, "f32"))


def takes_cast(problem: Problem, device: DeviceInfo) -> Verdict:
    src, dst = problem.operand(0).dtype, problem.results[0].dtype
    if src != dst and not {src, dst} <= set(FLOATS):
        return Reject(f"converts between {', '.join(FLOATS)} and copies any type, not {src} to {dst}")
    return Accept()


def build_cast(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    src, dst = problem.operand(0), problem.results[0]
    if src.dtype == dst.dtype:
        from kernelforge_cpu.kernels.layout import build_copy

        return build_copy(problem, config, device)

    def convert(k: KernelBuilder, x: Value) -> Value:
        return k.convert(x, dst.dtype)

    return map_kernel(problem, config, device, convert)
