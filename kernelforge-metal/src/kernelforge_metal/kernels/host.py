"""The variant that runs an op's numpy reference on the host: takes every problem of every dialect, slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import KernelVariant
from kernelforge_metal.kernel import HostKernel

if TYPE_CHECKING:
    from kernelforge.op import OpDef
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_metal.kernel import Array


def variant(op: OpDef) -> KernelVariant:
    """The `reference` variant of `op`, after all others."""

    def build(problem: Problem, config: Config, device: DeviceInfo) -> HostKernel:
        def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
            for result, made in zip(results, op.evaluate(problem, operands), strict=True):
                result[...] = made

        return HostKernel(call)

    return KernelVariant("reference", op.full_name, "gpu", build, "numpy in float64, on the host", priority=-100)
