"""Descriptors of the variants of all ops. Cheap to import: builders are named, not loaded."""

from __future__ import annotations

from kernelforge.lazy import Ref
from kernelforge.variant import KernelVariant, no_choices

HERE = "kernelforge_metal.kernels"
TAKES = f"{HERE}.tensors:takes"


def _wgsl(op: str, build: str, supports: Ref = TAKES, *, summary: str, space: Ref = no_choices) -> KernelVariant:
    name = f"{HERE}.{build}"
    return KernelVariant("wgsl", f"transformer.{op}", "gpu", name, summary, supports, space, priority=10)


VARIANTS = (
    _wgsl("silu", "elementwise:build_unary", summary="any layout"),
    _wgsl("gelu", "elementwise:build_unary", summary="any layout"),
    _wgsl("add", "elementwise:build_add", summary="any layout and broadcasting"),
    _wgsl("mul", "elementwise:build_mul", summary="any layout and broadcasting"),
    _wgsl("cast", "elementwise:build_cast", summary="any layout"),
)
