"""A kernel for `transformer.rms_norm` on the target `gpu`: a workgroup a row."""

from __future__ import annotations

from pathlib import Path

from kernelforge.hookspecs import hookimpl
from kernelforge.variant import KernelVariant
from kernelforge_metal.authoring import kernel

rowwise = kernel(
    Path(__file__).with_name("rowwise.wgsl"),
    op="transformer.rms_norm",
    dtypes=("f32", "f16", "bf16"),
    grid="rows",
    threads=(128, 32, 256),
    priority=-10,
    summary="WGSL, a workgroup of a tuned size a row",
)


@hookimpl
def kernelforge_kernels() -> list[KernelVariant]:
    return [rowwise]
