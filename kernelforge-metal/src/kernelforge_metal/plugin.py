"""What kernelforge-metal registers."""

from __future__ import annotations

from collections.abc import Iterable

from kernelforge.descriptors import BackendSpec
from kernelforge.hookspecs import hookimpl
from kernelforge.variant import KernelVariant
from kernelforge_metal.kernels.catalog import VARIANTS


@hookimpl
def kernelforge_backends() -> Iterable[BackendSpec]:
    return (
        BackendSpec(
            "gpu",
            "kernelforge_metal.backend:GpuBackend",
            "GPUs through Metal, Vulkan or DirectX 12.",
            fallback="kernelforge_metal.kernels.host:variant",
            roofline="kernelforge_metal.roofline:measure",
            flushes_subnormals=True,  # https://www.w3.org/TR/WGSL/#differences-from-ieee754; NVIDIA's GPUs and SwiftShader do
        ),
    )


@hookimpl
def kernelforge_kernels() -> Iterable[KernelVariant]:
    return VARIANTS
