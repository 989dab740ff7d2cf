"""What every kernel starts with."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

from kernelforge.variant import config_key

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo
    from kernelforge_cpu.emit import KernelBuilder


def new_kernel(problem: Problem, config: Config, device: DeviceInfo) -> KernelBuilder:
    """A builder for the device's vector width; the name is the op's with a hash of problem and config."""
    from kernelforge_cpu.emit import KernelBuilder
    from kernelforge_cpu.isa import host_target

    target = host_target()
    if width := device.limit("vector_bytes"):
        target = replace(target, lanes=width // 4)
    digest = sha256(f"{problem}{config_key(config)}".encode()).hexdigest()[:16]
    return KernelBuilder(f"{problem.op.partition('.')[2]}_{digest}", target)
