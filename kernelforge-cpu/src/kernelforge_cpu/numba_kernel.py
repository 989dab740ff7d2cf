"""Kernels written as numba functions over arrays: `compile_kernel` puts the native signature around them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from numba import carray, cfunc, int64, njit, types
from numpy.lib.stride_tricks import as_strided

from kernelforge.dtype import to_numpy
from kernelforge.errors import PluginError

if TYPE_CHECKING:
    from kernelforge.problem import Attr, Problem, TensorType

SIGNATURE = types.void(types.CPointer(types.voidptr), types.CPointer(int64), int64, int64)


def compile_kernel(function: Callable[..., Any], problem: Problem, constants: Mapping[str, Attr]) -> Any:
    """The compiled callback, with its `address`, of `function(*operands, *results, part, parts, *constants)`.

    Arrays have the shapes and strides of the problem, sizes of dynamic dimensions taken at every call; absent operands are
    None. The parameters after `parts` are bound by name to `constants`. Raises PluginError when they do not fit.
    """
    tensors = (*problem.operands, *problem.results)
    parameters = list(inspect.signature(function).parameters)
    names = parameters[len(tensors) + 2 :]
    if len(parameters) < len(tensors) + 2 or set(names) != set(constants):
        arrays = [
            *(f"operand{i}" for i in range(len(problem.operands))),
            *(f"result{i}" for i in range(len(problem.results))),
        ]
        raise PluginError(
            f"kernel '{function.__name__}' of {problem.op} takes ({', '.join(parameters)})",
            hint=f"wants ({', '.join((*arrays, 'part', 'parts', *constants))}), the arrays by any name",
        )
    # The arrays' shapes and layouts must be in the code: numba types a tuple's length, an array's rank and contiguity.
    scope: dict[str, Any] = {"carray": carray, "as_strided": as_strided}
    scope["run"] = njit(error_model="numpy", fastmath={"contract"})(function)
    arguments: list[str] = []
    for i, t in enumerate(tensors):
        arguments.append("None" if t is None else _array(i, t, problem.dims))
        scope[f"dtype{i}"] = None if t is None else to_numpy(t.dtype)
    for name in names:
        scope[f"constant_{name}"] = constants[name]
        arguments.append(f"constant_{name}")
    arguments[len(tensors) : len(tensors)] = ["part", "parts"]
    exec(f"def call(buffers, dims, part, parts):\n    run({', '.join(arguments)})\n", scope)
    return cfunc(SIGNATURE, error_model="numpy")(scope["call"])


def _array(index: int, t: TensorType, dims: tuple[str, ...]) -> str:
    """The expression that makes buffer `index` an array."""
    sizes = [str(dim) if isinstance(dim, int) else f"dims[{dims.index(dim)}]" for dim in t.shape]
    shape = f"({''.join(f'{size}, ' for size in sizes)})"
    if t.contiguous:
        return f"carray(buffers[{index}], {shape}, dtype{index})"
    strides = tuple(step * t.itemsize for step in t.element_strides())
    return f"as_strided(carray(buffers[{index}], (1,), dtype{index}), {shape}, {strides})"
