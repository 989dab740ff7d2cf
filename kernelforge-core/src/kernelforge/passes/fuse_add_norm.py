"""`fuse-add-norm`: a sum and its RMS norm become one op with both results, which need not read the sum again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import Body, available

ADD = "transformer.add"
ADD_RMS_NORM = "transformer.add_rms_norm"
RMS_NORM = "transformer.rms_norm"


@dataclass(frozen=True)
class FuseAddNorm(Pass):
    name: ClassVar[str] = "fuse-add-norm"

    def run(self, module: Module) -> None:
        body = Body(module)
        for norm in body.walk(RMS_NORM):
            x, weight = norm.operands
            add = body.producer(x, ADD)
            if add is None or weight is None:
                continue
            a, b = add.operands
            # The new op stands where the sum stood, before all users of the sum: its weight must be known there.
            if a is None or b is None or not a.type == b.type == add.result.type or not available(weight, at=add):
                continue
            total, normed = body.create(ADD_RMS_NORM, [a, b, weight], norm.attrs, before=add, of=[add, norm])
            body.replace(norm, [normed])
            body.replace(add, [total])
