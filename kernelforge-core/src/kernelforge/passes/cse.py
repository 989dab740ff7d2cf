"""`cse`: MLIR's own common subexpression elimination. All ops take part: none has side effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kernelforge.passes import Pass

if TYPE_CHECKING:
    from kernelforge.module import Module


@dataclass(frozen=True)
class Cse(Pass):
    name: ClassVar[str] = "cse"

    def run(self, module: Module) -> None:
        from kernelforge.mlir import run_pipeline

        run_pipeline(module.mlir, "builtin.module(cse)")
