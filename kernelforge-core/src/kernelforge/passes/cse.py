"""`cse`: MLIR's own common subexpression elimination. All ops take part: none has side effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import run_upstream


@dataclass(frozen=True)
class Cse(Pass):
    name: ClassVar[str] = "cse"

    def run(self, module: Module) -> None:
        run_upstream(module, "cse")
