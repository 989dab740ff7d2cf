"""`fuse-norm-matmul`: an RMS norm whose one reader is a product with a constant becomes part of that product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import GLU_MATMUL, MATMUL, RMS_NORM_GLU_MATMUL, RMS_NORM_MATMUL
from kernelforge.passes.rewriting import Body

RMS_NORM = "transformer.rms_norm"
FUSED = {MATMUL: RMS_NORM_MATMUL, GLU_MATMUL: RMS_NORM_GLU_MATMUL}


@dataclass(frozen=True)
class FuseNormMatmul(Pass):
    """Targets without a kernel for the whole, or for as many rows, run norm and product one after the other."""

    name: ClassVar[str] = "fuse-norm-matmul"

    def run(self, module: Module) -> None:
        body = Body(module)
        for product in body.walk(*FUSED):
            x, rhs, *others = product.operands
            norm = body.feeder(x, RMS_NORM)
            attrs = dict(product.attrs)
            if norm is None or rhs is None or not body.is_constant(rhs) or attrs.pop("transpose_lhs", False):
                continue
            if body.is_constant(norm.result):
                continue  # computed once, when the module is compiled
            operands, attrs = [*norm.operands, rhs, *others], {**attrs, **norm.attrs}
            made = body.create(FUSED[product.name], operands, attrs, before=product, of=[norm, product])
            body.replace(product, made)
            body.erase(norm)
