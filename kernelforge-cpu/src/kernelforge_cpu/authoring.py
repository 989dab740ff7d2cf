"""The shortest way to a CPU kernel: a decorated function.

    from kernelforge.hookspecs import hookimpl
    from kernelforge_cpu.authoring import kernel

    @kernel(op="transformer.silu", dtypes=("f32",))
    def half_tanh(x):
        import numpy as np
        return x * (0.5 + 0.5 * np.tanh(0.5 * x))

    @hookimpl
    def kernelforge_kernels():
        return [half_tanh]

`half_tanh` is now a `KernelVariant`; the function itself is `half_tanh.build.__wrapped__`. It runs when the kernel is built or
called, so imports of what is heavy belong inside of it. It is written in one of three languages:

- `numpy`: `function(*operands, **attributes, **config) -> result or results`. Operands are arrays of any layout, None where an
  optional one is absent; a result must have the shape that the op infers, and is rounded to its dtype.
- `numba`: `function(*operands, *results, part, parts, **attributes, **config)`, compiled when it is built, writes part `part` of
  `parts` of the results: any number of parts, in any order, at once. It sees arrays of any layout, raises nothing, and refers
  to nothing but arguments, modules and numbers.
- `mlir`: `function(k, problem, **config)` writes the kernel with `k`, a `kernelforge_cpu.emit.KernelBuilder`, or returns MLIR
  text that defines the function `k.name` with the signature that `kernelforge_cpu.kernel` describes. Attributes are read with
  `problem.attr(name)`; tensors have no gaps.

A kernel that needs more (packed weights, scratch, several phases) is a `KernelVariant` whose `build` returns a `NativeKernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Literal

from kernelforge.dtype import DTYPES
from kernelforge.errors import PluginError
from kernelforge.lazy import Ref, resolve
from kernelforge.variant import ConfigSpace, KernelVariant, Reject, accept_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernelforge.problem import Attr, Dim, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Value
    from kernelforge_cpu.kernel import Array, NativeKernel, PythonKernel

Language = Literal["numpy", "numba", "mlir"]
"""What a kernel's function is written in; see above."""

Function = Callable[..., Any]
"""The function of a kernel, whose parameters are those of its language."""

NUMBA_DTYPES = ("f64", "f32", "i64", "i32", "i8")
"""What numba can compute with on a CPU."""

_NUMBERS = "biufV"
"""Kinds of numpy dtypes that become a result; those of ml_dtypes and of quantised groups are V."""


def kernel(
    *,
    op: str,
    dtypes: Sequence[str],
    language: Language = "numpy",
    target: str = "cpu",
    attrs: Mapping[str, Attr] | None = None,
    supports: Ref = accept_all,
    space: Mapping[str, Sequence[int | str]] | Ref | None = None,
    default: Ref | None = None,
    priority: int = 0,
) -> Callable[[Function], KernelVariant]:
    """Make a `KernelVariant` of a function: its name is the variant's, the first line of its docstring the summary.

    `op` is a full name. `dtypes` are the element types that operands and results may have; `attrs` are the attributes that a
    problem must have, and which the function is not given. `supports` narrows further what is taken. `space` holds the values
    of each config parameter, the default first, or is a `KernelVariant.space`; the function gets each parameter as a keyword.
    `target` is one that runs CPU kernels.

    Raises PluginError for an unknown language or a dtype that it does not have.
    """
    fixed = dict(attrs or {})
    if language not in _BUILDERS:
        raise PluginError(f"kernel language '{language}' is unknown", hint=f"one of: {', '.join(_BUILDERS)}")
    if isinstance(dtypes, str) or (unknown := [name for name in dtypes if name not in DTYPES]):
        told = f"{dtypes!r}, which is one word" if isinstance(dtypes, str) else ", ".join(unknown)
        raise PluginError(f"dtypes of a kernel are some of {', '.join(DTYPES)}, not {told}")
    if language == "numba" and not set(dtypes) <= set(NUMBA_DTYPES):
        raise PluginError(f"numba kernels take {', '.join(NUMBA_DTYPES)}, not {', '.join(dtypes)}")

    def decorate(function: Function) -> KernelVariant:
        def takes(problem: Problem, device: DeviceInfo) -> Verdict:
            have = dict(problem.attrs)
            for key, value in fixed.items():
                if key not in have:
                    raise PluginError(
                        f"kernel '{function.__name__}' asks for attribute '{key}', which {op} does not have"
                    )
                if have[key] != value:
                    return Reject(f"takes {key}={value}, not {have[key]}")
            for t in (*problem.operands, *problem.results):
                if t is not None and t.dtype not in dtypes:
                    return Reject(f"takes {', '.join(dtypes)}, not {t.dtype}")
                if t is not None and language == "mlir" and not t.contiguous:
                    return Reject(f"takes tensors without gaps, not {t}")
            verdict: Verdict = resolve(supports)(problem, device)
            return verdict

        def build(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel | PythonKernel:
            given = {key: value for key, value in problem.attrs if key not in fixed}
            return _BUILDERS[language](function, problem, given, config, device)

        return KernelVariant(
            function.__name__,
            op,
            target,
            update_wrapper(build, function),  # records and plans are of the code of the plugin's module
            summary=(function.__doc__ or "").strip().partition("\n")[0],
            supports=takes,
            space=_space(space),
            default=default,
            priority=priority,
        )

    return decorate


def _space(given: Mapping[str, Sequence[int | str]] | Ref | None) -> Ref:
    if given is None:
        made = ConfigSpace()
    elif isinstance(given, Mapping):
        made = ConfigSpace(tuple((name, tuple(values)) for name, values in given.items()))
    else:
        return given

    def space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
        return made

    return space


def extent(k: KernelBuilder, problem: Problem, *dims: Dim) -> Value:
    """The product of some sizes of the problem's tensors (i64): a number, or computed where a dimension is dynamic."""
    from kernelforge_cpu.kernels.axes import emit_size, size_of

    return emit_size(k, problem, size_of(*dims))


def _numpy(
    function: Function, problem: Problem, attrs: Mapping[str, Attr], config: Config, device: DeviceInfo
) -> PythonKernel:
    from kernelforge_cpu.kernel import PythonKernel

    def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
        import numpy as np

        with np.errstate(all="ignore"):
            made = function(*operands, **attrs, **config)
            values = [np.asarray(value) for value in (made if isinstance(made, tuple) else (made,))]
            who = f"kernel '{function.__name__}' of {problem.op} returned"
            if len(values) != len(results):
                raise PluginError(f"{who} {len(values)} results, it has {len(results)}")
            for result, value in zip(results, values, strict=True):
                if value.dtype.kind not in _NUMBERS:
                    what = type(made).__name__ if value.dtype == object else value.dtype
                    raise PluginError(f"{who} {what}, its result has {result.dtype} numbers")
                if value.shape != result.shape:
                    raise PluginError(f"{who} shape {list(value.shape)}, its result has {list(result.shape)}")
                result[...] = value

    return PythonKernel(call)


def _numba(
    function: Function, problem: Problem, attrs: Mapping[str, Attr], config: Config, device: DeviceInfo
) -> NativeKernel:
    from kernelforge_cpu.kernel import NativeKernel, Phase
    from kernelforge_cpu.numba_kernel import compile_kernel

    compiled, sizes = compile_kernel(function, problem, {**attrs, **config})
    return NativeKernel((Phase(compiled.address),), tables=(sizes,), keep=compiled)


def _mlir(
    function: Function, problem: Problem, attrs: Mapping[str, Attr], config: Config, device: DeviceInfo
) -> NativeKernel:
    from kernelforge_cpu.kernel import NativeKernel, Phase
    from kernelforge_cpu.kernels.common import new_kernel

    k = new_kernel(problem, config, device)
    k.name = f"{function.__name__}_{k.name}"
    text = function(k, problem, **config)
    return NativeKernel((Phase(k.name),), text or k.text())


_BUILDERS: dict[str, Callable[..., NativeKernel | PythonKernel]] = {"numpy": _numpy, "numba": _numba, "mlir": _mlir}
