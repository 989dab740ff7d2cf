"""The layouts that matrix products pack constant right-hand sides into, by operand: `KernelVariant.layouts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernelforge_cpu.kernels.matmul.config import lanes
from kernelforge_cpu.kernels.matmul.geometry import geometry
from kernelforge_cpu.kernels.matmul.groups import Groups
from kernelforge_cpu.kernels.matmul.panels import Panels
from kernelforge_cpu.kernels.matmul.words import Words

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo


def panels(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    """Of `vectorized`."""
    g = geometry(problem)
    layout = Panels(int(config["vectors"]), lanes(device), problem.operand(g.rhs[0]).dtype)
    return {i: layout.name(g.transpose_rhs) for i in g.rhs if problem.operand(i).constant}


def groups(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    """Of `quantised`."""
    g = geometry(problem)
    dtype = problem.operand(g.rhs[0]).dtype
    layout = Groups(dtype, int(config["vectors"]), lanes(device), int(g.columns), int(g.inner))
    return dict.fromkeys(g.rhs, layout.name)


def words(problem: Problem, config: Config, device: DeviceInfo) -> Mapping[int, str]:
    """Of the `integer` variants."""
    g = geometry(problem)
    layout = Words(problem.operand(g.rhs[0]).dtype, lanes(device), int(g.columns), int(g.inner))
    return dict.fromkeys(g.rhs, layout.name)
