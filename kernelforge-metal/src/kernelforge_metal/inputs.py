"""What a run is given, checked against the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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
    """On the GPU, read and written where they are; outputs among them (`take_out`)."""
    dims: dict[str, int]

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Which buffer each value is in; asked for when all are there."""
        return tuple((value, id(buffer)) for value, buffer in self.buffers.items())


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
            given.buffers[i] = found
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


Spec = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and dtype."""


def take_out(
    given: Given, out: Mapping[str, Array | Buffer], wanted: Mapping[str, tuple[int, Spec]]
) -> dict[str, Array]:
    """The arrays that outputs are written to by the host; buffers become part of `given`.

    `wanted`: value id and spec of each output, by name. Raises UsageError for an unknown name, or one that does not fit.
    """
    if unknown := out.keys() - wanted.keys():
        raise UsageError(f"there is no output '{min(unknown)}' to write to")
    arrays: dict[str, Array] = {}
    for name, target in out.items():
        i, (shape, dtype) = wanted[name]
        if not isinstance(target, GpuBuffer):
            arrays[name] = output_array(target, name, np.empty(shape, dtype))
            continue
        if target.shape != shape or to_numpy(target.dtype) != dtype:
            raise UsageError(
                f"output '{name}' cannot be written to a {target.dtype}{list(target.shape)} buffer",
                hint=f"give a {dtype}{list(shape)} buffer",
            )
        if target in given.buffers.values():
            raise UsageError(f"output '{name}' cannot be written to a buffer that is in use in the same run")
        given.buffers[i] = target
    return arrays
