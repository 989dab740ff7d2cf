"""Random programs: every pass, the default pipeline and pipelines in any order keep what a program computes."""

from __future__ import annotations

import random

import pytest
from pass_checks import as_module, check

from kernelforge.passes import DEFAULT
from kernelforge.testing.programs import Program

PASSES = [
    "canonicalize",
    "cse",
    "fuse-add-norm",
    "fuse-epilogue",
    "fuse-epilogue{residual=false}",
    "fuse-glu",
    "fuse-norm-matmul",
    "fuse-norm-quantize",
    "fuse-qkv",
    "fuse-rope-attention",
    "fuse-rope-cache",
]


@pytest.mark.parametrize("seed", range(30))
def test_default_pipeline(seed: int) -> None:
    check(Program(seed).grow(16), DEFAULT)


@pytest.mark.parametrize("seed", range(40, 60))
def test_passes_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    module = as_module(Program(seed).grow(16))
    for name in rng.choices(PASSES, k=6):
        module = check(module, name, again=name != "cse")  # MLIR's own finds more dead code each time
