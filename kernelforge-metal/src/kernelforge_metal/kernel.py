"""What a GPU variant builds: compute shaders with their bindings, their grids, and how constants are laid out.

A `Dispatch` is WGSL text that defines `main`, without declarations of buffers and parameters: those are written by
`shader`, from the bindings, so that one text serves devices with and without immediates.

- Every buffer is a runtime-sized array under its binding's name in group 0, in the order of the bindings. Constants and tables
  are read-only, and so are operands in whose buffer there is no result: WebGPU allows no dispatch to have both in one buffer, and
  intermediate values share one. The rest is read_write.
- `p.<name>_at` is where the value of binding `<name>` starts in its array, in elements of the value's dtype (bf16 counts as
  16 bits, whatever the array's elements are). Constants, tables and scratch start at 0 and have none.
- `p.d0`, `p.d1`, ... are the sizes of the problem's dynamic dimensions, then come the dispatch's own parameters; all are u32.
- The end of an array is the end of a memory range, not of the value: a shader checks its own bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kernelforge.errors import PluginError

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.problem import Problem

    Array = np.ndarray[Any, np.dtype[Any]]

Size = int | Callable[[Sequence[int]], int]
"""A number, or computed from the sizes of the problem's dynamic dimensions."""

Grid = tuple[int, int, int] | Callable[[Sequence[int]], tuple[int, int, int]]
"""Workgroups along x, y and z, each at most 65535 (`kernelforge_metal.wgsl.grid` folds more into two axes)."""

MAX_PARAMETERS = 32
"""Words of parameters: 128 bytes of immediates is what every device with immediates has."""

WORDS = {"f32": 1, "u32": 1, "i32": 1, "f16": 0.5}
"""Scalars of WGSL, and how many words one takes."""
VECTORS = {f"vec{n}<{scalar}>": n * words for scalar, words in WORDS.items() for n in (2, 4)}
"""Vectors of WGSL, and how many words one takes."""


@dataclass(frozen=True)
class Pack:
    """The layout in which a kernel reads a constant operand; done once when compiling, shared by equal keys."""

    key: str
    """Names the layout with everything that shapes it ("q4-rows"): equal key and equal constant, one packed buffer."""
    pack: Callable[[Array], Array]
    """Gets the constant as numpy has it; the bytes of what it returns, in row-major order, go to the device."""


@dataclass(frozen=True)
class Binding:
    """A buffer of a dispatch."""

    name: str
    """Of the WGSL variable."""
    index: int
    """Into operands, then results, then the kernel's tables, then its scratch buffers."""
    element: str = "f32"
    """WGSL type of the array's elements: "f32", "vec4<f32>", "f16", "u32" (two bf16), ..."""
    start: int = 0
    """Of a constant: first byte of what is bound, a multiple of 256. For those larger than a binding may be."""
    nbytes: int = 0
    """Of a constant: how many bytes are bound; 0: up to its end."""

    @property
    def alignment(self) -> int:
        """Bytes of an element of the array: a value that starts elsewhere is moved before the kernel runs."""
        return int(4 * (VECTORS.get(self.element) or WORDS.get(self.element, 1)))


@dataclass(frozen=True)
class Below:
    """What the host may know when it starts a run: that all numbers of an operand are less than a bound. It does where the
    operand is an input of the plan that is given as an array."""

    index: int
    """Of the operand, i32."""
    bound: int


@dataclass(frozen=True)
class Dispatch:
    """One compute shader run over a grid of workgroups."""

    code: str
    bindings: tuple[Binding, ...]
    workgroups: Grid
    parameters: tuple[tuple[str, Size], ...] = ()
    """Names and values of what the shader reads as `p.<name>`, besides sizes and starts. Dispatches whose text and bindings'
    names and elements are equal share a pipeline: what differs between them belongs here."""
    only: Below | None = None
    """Only runs of which this is known have the dispatch."""
    unless: Below | None = None
    """Runs of which this is known leave it out."""

    def grid(self, dims: Sequence[int]) -> tuple[int, int, int]:
        return self.workgroups(dims) if callable(self.workgroups) else self.workgroups


@dataclass(frozen=True)
class GpuKernel:
    """GPU code for one problem: dispatches that run one after the other; which of them may depend on values (`Below`)."""

    dispatches: tuple[Dispatch, ...]
    packs: Mapping[int, Pack] = field(default_factory=dict)
    """By operand index; only constants can be packed."""
    tables: tuple[Array, ...] = ()
    """Constant buffers of the kernel's own (RoPE frequencies)."""
    scratch: tuple[Size, ...] = ()
    """Bytes of each scratch buffer; undefined when the first dispatch starts."""
    checked: bool = False
    """Keep wgpu's bounds and loop checks. Without them a shader that leaves its arrays may write anywhere."""


@dataclass(frozen=True)
class HostKernel:
    """A Python callable `(operands, results) -> None` on numpy arrays: the step runs on the host, its operands are read back
    and its results sent. For ops that have no GPU kernel."""

    call: Callable[[Sequence[Array | None], Sequence[Array]], None]


def size_of(size: Size, dims: Sequence[int]) -> int:
    """`size` for these dynamic dimensions."""
    return size(dims) if callable(size) else size


def is_read_only(problem: Problem, kernel: GpuKernel, index: int, apart: Collection[int] = ()) -> bool:
    """Whether the buffer of a binding's `index` is a constant, a table, or one of the operands `apart`, in whose buffers there
    is no result."""
    operands, values = len(problem.operands), len(problem.operands) + len(problem.results)
    if index < operands:
        operand = problem.operands[index]
        return operand is not None and (operand.constant or index in apart)
    return values <= index < values + len(kernel.tables)


def is_value(problem: Problem, index: int) -> bool:
    """Whether the buffer of a binding's `index` is an operand or result that is computed when the plan runs."""
    if index < len(problem.operands):
        operand = problem.operands[index]
        return operand is not None and not operand.constant
    return index < len(problem.operands) + len(problem.results)


def parameter_names(problem: Problem, dispatch: Dispatch) -> tuple[str, ...]:
    """The fields of `p`, in order. Raises PluginError when there are too many."""
    sizes = [f"d{i}" for i in range(len(problem.dims))]
    starts = [f"{b.name}_at" for b in dispatch.bindings if is_value(problem, b.index)]
    names = (*sizes, *(name for name, _ in dispatch.parameters), *starts)
    if len(names) > MAX_PARAMETERS:
        raise PluginError(
            f"a kernel for {problem.op} has {len(names)} parameters", hint=f"{MAX_PARAMETERS} is the limit"
        )
    return names


def fixed_parameters(problem: Problem, dispatch: Dispatch, starts: Mapping[int, int]) -> tuple[int, ...] | None:
    """The values of all fields of `p` if no run changes them and only starts are among them, else None. `starts`: where operands
    and results start that are views, in elements."""
    if problem.dims or dispatch.parameters:
        return None
    return tuple(starts.get(b.index, 0) for b in dispatch.bindings if is_value(problem, b.index))


def shader(
    problem: Problem,
    kernel: GpuKernel,
    dispatch: Dispatch,
    *,
    immediates: bool,
    fixed: Sequence[int] | None = None,
    apart: Collection[int] = (),
) -> str:
    """The whole text of a dispatch's shader. `fixed`: its parameters, which are then no parameters but constants. `apart`: see
    `is_read_only`."""
    lines = extensions(dispatch.code, _elements(dispatch))
    if names := parameter_names(problem, dispatch):
        fields = ", ".join(f"{name}: u32" for name in names)
        place = "var<immediate> p" if immediates else "@group(1) @binding(0) var<uniform> p"
        declared = f"{place}: Parameters;"
        if fixed is not None:
            declared = f"const p = Parameters({', '.join(f'{value}u' for value in fixed)});"
        lines += [f"struct Parameters {{ {fields} }}", declared]
    for i, b in enumerate(dispatch.bindings):
        access = "read" if is_read_only(problem, kernel, b.index, apart) else "read_write"
        lines.append(f"@group(0) @binding({i}) var<storage, {access}> {b.name}: array<{b.element}>;")
    return "\n".join([*lines, dispatch.code])


def extensions(code: str, elements: str = "") -> list[str]:
    """The lines that a shader must begin with; `elements`: of its arrays."""
    lines = ["enable f16;"] if "f16" in elements or _uses_f16(code) else []
    return [*lines, *(["enable wgpu_cooperative_matrix;"] if "coop_mat" in code else [])]


def _elements(dispatch: Dispatch) -> str:
    return " ".join(b.element for b in dispatch.bindings)


def _uses_f16(code: str) -> bool:
    return "f16(" in code.replace("2x16f", "") or "<f16" in code or ": f16" in code
