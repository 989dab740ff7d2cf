"""Registers a kernel for `transformer.silu` on the target `cpu`."""

from __future__ import annotations

from kernelforge.hookspecs import hookimpl
from kernelforge.variant import KernelVariant


@hookimpl
def kernelforge_kernels() -> list[KernelVariant]:
    here = "kernelforge_example_blockwise.kernel"
    return [
        KernelVariant(
            "blockwise",
            op="transformer.silu",
            target="cpu",
            build=f"{here}:build",
            supports=f"{here}:supports",
            space=f"{here}:space",
            summary="numba, blocks of a size that is tuned",
        )
    ]
