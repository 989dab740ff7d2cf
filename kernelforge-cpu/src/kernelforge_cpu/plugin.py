"""What kernelforge-cpu registers."""

from __future__ import annotations

from collections.abc import Iterable

from kernelforge.descriptors import BackendSpec
from kernelforge.hookspecs import hookimpl
from kernelforge.variant import KernelVariant
from kernelforge_cpu.kernels.catalog import VARIANTS


@hookimpl
def kernelforge_backends() -> Iterable[BackendSpec]:
    return (
        BackendSpec(
            "cpu",
            "kernelforge_cpu.backend:CpuBackend",
            "The processor, with compiled kernels.",
            fallback="kernelforge_cpu.kernels.reference:variant",
            roofline="kernelforge_cpu.roofline:measure",
        ),
    )


@hookimpl
def kernelforge_kernels() -> Iterable[KernelVariant]:
    return VARIANTS
