"""What a run is given, checked against the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge.reference import output_array
from kernelforge_metal.buffer import GpuBuffer

if TYPE_CHECKING:
    from kernelforge.backend import Buffer
    from kernelforge.plan import Plan

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Given:
    """Inputs by value id, and the sizes of the dynamic dimensions that they have."""

    arrays: dict[int, Array]
    """On the host: to be sent before each run."""
    buffers: dict[int, GpuBuffer]
    """Donated, on the GPU: written in place."""
    dims: dict[str, int]


def check_inputs(plan: Plan, inputs: Mapping[str, Array | Buffer]) -> Given:
    """Raises UsageError for a missing or unknown name, a wrong shape or dtype, or two sizes for one dimension."""
    given = Given({}, {}, {})
    if len(inputs) > len(plan.inputs):
        names = {plan.values[i].name for i in plan.inputs}
        unknown = min(set(inputs) - names)
        raise UsageError(f"unknown input '{unknown}'", hint=f"the inputs are: {', '.join(sorted(names))}")
    for i in plan.inputs:
        value = plan.values[i]
        found = inputs.get(value.name)
        if found is None:
            raise UsageError(f"input '{value.name}' is missing", hint=f"it is {value.type}")
        if isinstance(found, GpuBuffer):
            shape, dtype = found.shape, to_numpy(found.dtype)
            if value.donated:
                given.buffers[i] = found
            else:
                given.arrays[i] = found.numpy()
        else:
            array = found if isinstance(found, np.ndarray) else np.asarray(found)
            shape, dtype = array.shape, array.dtype
            given.arrays[i] = array
        if dtype != to_numpy(value.type.dtype):
            raise UsageError(f"input '{value.name}' has dtype {dtype}, wants {value.type.dtype}")
        fits = len(shape) == value.type.rank
        if fits:
            for have, want in zip(shape, value.type.array_dims, strict=True):
                fits &= have == (given.dims.setdefault(want, have) if isinstance(want, str) else want)
        if not fits:
            raise UsageError(
                f"input '{value.name}' has shape {shape}, wants {list(value.type.array_dims)}{_sizes(given.dims)}"
            )
    return given


def _sizes(dims: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{name}={size}' for name, size in dims.items())})" if dims else ""


def check_out(
    out: Mapping[str, Array], wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> dict[str, Array]:
    """The arrays that outputs are written to. Raises UsageError for an unknown name or an array that does not fit."""
    if unknown := out.keys() - wanted.keys():
        raise UsageError(f"there is no output '{min(unknown)}' to write to")
    return {name: output_array(array, name, np.empty(*wanted[name])) for name, array in out.items()}
