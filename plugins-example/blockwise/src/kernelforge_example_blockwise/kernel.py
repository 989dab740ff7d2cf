"""`silu(x) = x / (1 + exp(-x))`, shared between threads in blocks."""

from __future__ import annotations

import math
from typing import Any

from numba import carray, cfunc, float32, int64, types

from kernelforge.problem import Problem
from kernelforge.variant import Accept, Config, ConfigSpace, DeviceInfo, Reject, Verdict
from kernelforge_cpu.kernel import NativeKernel, Phase

Sizes = types.CPointer(int64)
KERNEL = types.void(types.CPointer(types.CPointer(float32)), Sizes, int64, int64)


def supports(problem: Problem, device: DeviceInfo) -> Verdict:
    x = problem.operand(0)
    return Accept() if x.dtype == "f32" and x.contiguous and x.static else Reject(f"wants packed static f32, not {x}")


def space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return ConfigSpace((("block", (4096, 1024, 16384)),))


def build(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    size, block = problem.operand(0).size(), int(config["block"])

    def silu(buffers: Any, dims: Any, part: int, parts: int) -> None:
        table = carray(buffers, 2)
        x, out = carray(table[0], size), carray(table[1], size)
        for start in range(part * block, size, parts * block):
            for i in range(start, min(start + block, size)):
                out[i] = x[i] / (float32(1) + math.exp(-x[i]))

    compiled = cfunc(KERNEL)(silu)
    return NativeKernel((Phase(compiled.address),), keep=compiled)
