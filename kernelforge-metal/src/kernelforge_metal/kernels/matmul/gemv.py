"""A few rows times a packed weight: which problems. `gemv_configs` has configs, `gemv_kernel` and `gemv_products` the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.variant import Accept, Reject
from kernelforge_metal.kernel import GpuKernel
from kernelforge_metal.kernels.matmul.common import takes_products, without_dot4
from kernelforge_metal.kernels.matmul.gemv_configs import kernel_of
from kernelforge_metal.kernels.matmul.gemv_products import ByteGemv, FloatGemv, IntegerGemv, QuantisingGemv
from kernelforge_metal.kernels.matmul.geometry import product_of, rhs_of
from kernelforge_metal.kernels.matmul.weights import pieces
from kernelforge_metal.wgsl import SUBGROUP

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernels.matmul.gemv_kernel import Gemv

MAX_ROWS = 8
"""With more, tiles in workgroup memory are faster."""


def takes_gemv(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    if problem.operand(0).quantised:
        return Reject(f"takes rows of floats, not {problem.operand(0).dtype}")
    return _takes_few_rows(problem, device)


def _takes_few_rows(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_products(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    g = product_of(problem)
    if not all(problem.operand(i).constant for i in g.rhs):
        return Reject("takes a constant right-hand side")
    if g.static_rows is None or g.batches:
        return Reject("takes one matrix with a known number of rows")
    if not g.columns:
        return Reject("takes at least one column")
    if g.gain is not None and not g.inner:
        return Reject("takes rows of at least one element")
    if not 0 < g.static_rows <= MAX_ROWS:
        return Reject(f"takes 1 to {MAX_ROWS} rows, not {g.static_rows}")
    return Accept()


def takes_gemv_subgroups(problem: Problem, device: DeviceInfo) -> Verdict:
    return _takes_subgroups(device) or takes_gemv(problem, device)


def takes_integers(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    return _takes_integers(problem, device) or takes_gemv(problem, device)


def takes_integers_subgroups(problem: Problem, device: DeviceInfo) -> Verdict:
    return _takes_integers(problem, device) or takes_gemv_subgroups(problem, device)


def takes_bytes(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    return _takes_bytes(problem, device) or _takes_few_rows(problem, device)


def takes_bytes_subgroups(problem: Problem, device: DeviceInfo) -> Verdict:
    return _takes_bytes(problem, device) or _takes_subgroups(device) or _takes_few_rows(problem, device)


def takes_quantising(problem: Problem, device: DeviceInfo) -> Verdict:
    """Where it does not run, the parts of its op do."""
    return _takes_integers(problem, device) or takes_gemv_subgroups(problem, device)


def _takes_bytes(problem: Problem, device: DeviceInfo) -> Reject | None:
    if problem.operand(0).dtype != ACTIVATION_FORMAT:
        return Reject(f"takes rows of {ACTIVATION_FORMAT}, not {problem.operand(0).dtype}")
    return _takes_integers(problem, device)


def _takes_subgroups(device: DeviceInfo) -> Reject | None:
    return None if SUBGROUP in device.features else Reject("the device has no subgroups")


def _takes_integers(problem: Problem, device: DeviceInfo) -> Reject | None:
    weight = problem.operand(rhs_of(problem)[0])
    if not weight.quantised:
        return Reject(f"takes weights of q8 or q4, not {weight.dtype}")
    return without_dot4(device)


def build_gemv(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(FloatGemv, problem, config, device, subgroups=False)


def build_gemv_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(FloatGemv, problem, config, device, subgroups=True)


def build_integers(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(IntegerGemv, problem, config, device, subgroups=False)


def build_integers_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(IntegerGemv, problem, config, device, subgroups=True)


def build_bytes(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(ByteGemv, problem, config, device, subgroups=False)


def build_bytes_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(ByteGemv, problem, config, device, subgroups=True)


def build_quantising(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return _build(QuantisingGemv, problem, config, device, subgroups=True)


def _build(kind: type[Gemv], problem: Problem, config: Config, device: DeviceInfo, *, subgroups: bool) -> GpuKernel:
    kernel = kernel_of(kind, product_of(problem), config, device, subgroups=subgroups)
    pack = kernel.weights.packs(transposed=kernel.product.transpose_rhs)
    dispatches = tuple(kernel.dispatch(piece) for piece in pieces(kernel.weights, device))
    return GpuKernel(dispatches, {} if pack is None else dict.fromkeys(kernel.product.rhs, pack))
