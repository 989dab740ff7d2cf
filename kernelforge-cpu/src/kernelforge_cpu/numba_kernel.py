"""Kernels written as numba functions over arrays: `compile_kernel` puts the native signature around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import carray, cfunc, int64, njit, types
from numpy.lib.stride_tricks import as_strided

from kernelforge.dtype import to_numpy
from kernelforge.errors import PluginError

if TYPE_CHECKING:
    from kernelforge.problem import Attr, Problem, TensorType
    from kernelforge_cpu.kernel import Array

SIGNATURE = types.void(types.CPointer(types.voidptr), types.CPointer(int64), int64, int64)


def compile_kernel(function: Callable[..., Any], problem: Problem, constants: Mapping[str, Attr]) -> tuple[Any, Array]:
    """The compiled callback, with its `address`, of `function(*operands, *results, part, parts, *constants)`, and the table
    of sizes that it reads after the results' buffers: problems that differ in sizes alone share their code.

    Arrays have the shapes and strides of the problem; absent operands are None. The parameters after `parts` are bound by
    name to `constants`. Raises PluginError when they do not fit.
    """
    tensors = (*problem.operands, *problem.results)
    names = _constant_names(function, problem, constants)
    sizes: list[int] = []
    arguments: list[str] = []
    for i, t in enumerate(tensors):
        arguments.append("None" if t is None else _array(i, t, len(sizes)))
        if t is not None:
            sizes += [d if isinstance(d, int) else -1 - problem.dims.index(d) for d in t.shape]
            sizes += [] if t.contiguous else t.element_strides()
    given = ", ".join((*arguments, "part", "parts", *(f"constant_{name}" for name in names)))
    text = (
        "def call(buffers, dims, part, parts):\n"
        f"    sizes = carray(buffers[{len(tensors)}], ({len(sizes)},), int64)\n"
        f"    run({given})\n"
    )
    dtypes = tuple("" if t is None else t.dtype for t in tensors)
    compiled = _compiled(function, text, dtypes, tuple((name, constants[name]) for name in names))
    return compiled, np.array(sizes, np.int64)


def _constant_names(function: Callable[..., Any], problem: Problem, constants: Mapping[str, Attr]) -> list[str]:
    """The parameters after the arrays, `part` and `parts`."""
    operands, results = len(problem.operands), len(problem.results)
    parameters = list(inspect.signature(function).parameters)
    names = parameters[operands + results + 2 :]
    if len(parameters) < operands + results + 2 or set(names) != set(constants):
        arrays = [*(f"operand{i}" for i in range(operands)), *(f"result{i}" for i in range(results))]
        raise PluginError(
            f"kernel '{function.__name__}' of {problem.op} takes ({', '.join(parameters)})",
            hint=f"wants ({', '.join((*arrays, 'part', 'parts', *constants))}), the arrays by any name",
        )
    return names


def _array(index: int, t: TensorType, at: int) -> str:
    """The expression that makes buffer `index` an array: its sizes, then strides if it has gaps, stand at `at`."""
    shape = "".join(f"size(sizes, dims, {at + axis}), " for axis in range(t.rank))
    if t.contiguous:
        return f"carray(buffers[{index}], ({shape}), dtype_{index})"
    strides = "".join(f"{t.itemsize} * sizes[{at + t.rank + axis}], " for axis in range(t.rank))
    return f"as_strided(carray(buffers[{index}], (1,), dtype_{index}), ({shape}), ({strides}))"


def _entry(sizes: Any, dims: Any, at: int) -> Any:
    """A size of the table: itself, or the dynamic dimension that it names."""
    return sizes[at] if sizes[at] >= 0 else dims[-1 - sizes[at]]


_size: Any = njit(error_model="numpy")(_entry)


@lru_cache(256)
def _compiled(
    function: Callable[..., Any], text: str, dtypes: tuple[str, ...], constants: tuple[tuple[str, Attr], ...]
) -> Any:
    # Text, as numba compiles the length of a tuple, and the rank and contiguity of an array, into the code.
    scope: dict[str, Any] = {"as_strided": as_strided, "carray": carray, "int64": np.int64, "size": _size}
    scope["run"] = njit(error_model="numpy", fastmath={"contract"})(function)
    scope.update({f"dtype_{i}": to_numpy(dtype) for i, dtype in enumerate(dtypes) if dtype})
    scope.update({f"constant_{name}": value for name, value in constants})
    exec(text, scope)
    return cfunc(SIGNATURE, error_model="numpy")(scope["call"])
