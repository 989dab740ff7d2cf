"""`fuse-norm-matmul`: an RMS norm, a quantisation to 8 bits, or both become part of the product that alone reads the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import GLU_MATMUL, MATMUL, QUANTIZE, RMS_NORM, RMS_NORM_QUANTIZE
from kernelforge.passes.rewriting import Body


@dataclass(frozen=True)
class FuseNormMatmul(Pass):
    """Targets without a kernel for the whole, or for as many rows, run its parts one after the other."""

    name: ClassVar[str] = "fuse-norm-matmul"

    def run(self, module: Module) -> None:
        body = Body(module)
        for product in body.walk(MATMUL, GLU_MATMUL):
            x, rhs, *others = product.operands
            feeder = body.feeder(x, RMS_NORM, QUANTIZE, RMS_NORM_QUANTIZE)
            attrs = dict(product.attrs)
            if feeder is None or rhs is None or not body.is_constant(rhs) or attrs.pop("transpose_lhs", False):
                continue
            if body.is_constant(feeder.result):
                continue  # computed once, when the module is compiled
            attrs |= feeder.attrs
            if attrs.pop("format", ACTIVATION_FORMAT) != ACTIVATION_FORMAT:
                continue
            fused = f"{feeder.name}_{product.definition.name}"
            made = body.create(fused, [*feeder.operands, rhs, *others], attrs, before=product, of=[feeder, product])
            body.replace(product, made)
            body.erase(feeder)
