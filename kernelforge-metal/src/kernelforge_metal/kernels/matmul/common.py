"""What all matmul kernels ask of a problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.errors import UsageError
from kernelforge.variant import Accept, Reject
from kernelforge_metal.adapters import DOT4
from kernelforge_metal.kernel import is_value
from kernelforge_metal.kernels.matmul.geometry import product_of, rhs_of
from kernelforge_metal.kernels.matmul.result import stored_columns

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import DeviceInfo, Verdict

FLOATS = ("f32", "f16", "bf16")


def start_of(problem: Problem, index: int, name: str) -> str:
    """Where an operand starts in its array. Quantised values have no views."""
    return f"p.{name}_at" if is_value(problem, index) and not problem.operand(index).quantised else "0u"


def without_dot4(device: DeviceInfo) -> Reject | None:
    """Why kernels of bytes do not run, if so."""
    if DOT4 in device.features:
        return None
    return Reject("the device has no dot products of bytes: made of other instructions they are slower than floats")


def takes_products(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of kernels that store several columns at once, and read packed weights."""
    verdict = takes_any_product(problem, device)
    if isinstance(verdict, Reject):
        return verdict
    if stored_columns(product_of(problem)) is None:
        return Reject("takes results of 16 bits only where rows are a multiple of four columns")
    return Accept()


def takes_any_product(problem: Problem, device: DeviceInfo) -> Verdict:
    """Whether dtypes and strides are such that any of the kernels can read them."""
    rhs = rhs_of(problem)
    for i, t in enumerate((*problem.operands, *problem.results)):
        if t is None:
            continue
        if t.quantised and i in rhs:
            if not t.constant or t.rank > 2:
                return Reject(f"takes quantised weights that are constant and of rank 2, not {t}")
        elif t.dtype == ACTIVATION_FORMAT and i == 0:
            continue  # beside it the right-hand sides are quantised
        elif t.dtype not in FLOATS:
            return Reject(f"takes {', '.join(FLOATS)}, not {t.dtype}")
    try:
        product_of(problem)
    except UsageError as error:
        return Reject(f"takes sizes and strides that are known when it is built: {error}")
    return Accept()
