"""`fuse-norm-quantize`: an RMS norm that is only read in 8 bits is written in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.matmuls import QUANTIZE, RMS_NORM, RMS_NORM_QUANTIZE
from kernelforge.passes.rewriting import Body


@dataclass(frozen=True)
class FuseNormQuantize(Pass):
    name: ClassVar[str] = "fuse-norm-quantize"

    def run(self, module: Module) -> None:
        body = Body(module)
        for quantize in body.walk(QUANTIZE):
            norm = body.feeder(quantize.operands[0], RMS_NORM)
            if norm is None or quantize.attrs["format"] != ACTIVATION_FORMAT:
                continue
            made = body.create(RMS_NORM_QUANTIZE, norm.operands, norm.attrs, before=quantize, of=[norm, quantize])
            body.replace(quantize, made)
            body.erase(norm)
