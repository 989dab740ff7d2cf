"""The shortest way to a GPU kernel: a `.wgsl` file and a few lines.

    from pathlib import Path

    from kernelforge.hookspecs import hookimpl
    from kernelforge_metal.authoring import kernel

    fast_silu = kernel(Path(__file__).with_name("fast_silu.wgsl"), op="transformer.silu", dtypes=("f32",), threads=(256, 64))

    @hookimpl
    def kernelforge_kernels():
        return [fast_silu]

with, in the file,

    @compute @workgroup_size(THREADS)
    fn main(ids: Ids) {
      let i = element(ids);
      if (i >= out_size()) { return; }
      let x = load_x(i);
      store_out(i, x / (1.0 + exp(-x)));
    }

`fast_silu` is now a `KernelVariant`, named after the file. In front of the file's text is put what it can use:

- for each operand and result, by the op's name for it, `load_NAME(i) -> f32` and, for results, `store_NAME(i, value)`: element
  `i` in row-major order, whatever dtype and strides the tensor has; `NAME_size()`, the number of its elements, `NAME_row()`,
  that of its last axis, and `NAME_dim0()`, `NAME_dim1()`, ..., its sizes (u32, some known only when the plan runs). Where an
  optional operand is absent there are none: refuse such problems by `supports`.
- the op's attributes that are numbers or booleans, and the config's parameters, as constants in capitals: `EPS`, `THREADS`.
- `struct Ids`, with `ids.group`, `ids.groups` and `ids.thread`; `element(ids)`, the number of the thread, and `row(ids)`, that of
  the workgroup, in grids of any size.
- `bf16_pair(word)`, `bf16_bits(x)` and `f16_bits(v)`; see `kernelforge_metal.wgsl` for more, which is Python that writes WGSL.

A kernel that needs more (packed weights, tables, scratch, several dispatches) is a `KernelVariant` whose `build` returns a
`kernelforge_metal.kernel.GpuKernel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kernelforge.errors import PluginError
from kernelforge.lazy import Ref, resolve
from kernelforge.variant import ConfigSpace, KernelVariant, Reject, accept_all
from kernelforge_metal.dtypes import DTYPES

if TYPE_CHECKING:
    from kernelforge.op import OpDef
    from kernelforge.problem import Attr, Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernel import GpuKernel
    from kernelforge_metal.kernels.tensors import Tensor


def kernel(
    file: Path,
    *,
    op: str,
    dtypes: Sequence[str],
    grid: Literal["elements", "rows"] = "elements",
    threads: Sequence[int] = (64,),
    space: Mapping[str, Sequence[int]] | None = None,
    attrs: Mapping[str, Attr] | None = None,
    supports: Ref = accept_all,
    priority: int = 0,
    summary: str = "",
) -> KernelVariant:
    """Make a `KernelVariant` of a WGSL file (read when the kernel is built).

    `op` is a full name. `dtypes` are the element types that operands and results may have, of f32, f16, bf16 and i32; `attrs`
    are the attributes that a problem must have. `grid` starts a thread for each element of the first result, or a workgroup
    for each of its rows. `threads` are the sizes of a workgroup to be tuned over, the default first, `space` more parameters of
    that kind. `supports` narrows further what is taken. Runtime checks of wgpu stay on: they cost a little, and a slip cannot
    overwrite other memory.

    Raises PluginError for a dtype that shaders cannot load.
    """
    if unknown := set(dtypes) - set(DTYPES):
        raise PluginError(f"GPU kernels take {', '.join(DTYPES)}, not {', '.join(sorted(unknown))}")
    fixed = dict(attrs or {})
    made = ConfigSpace((("threads", tuple(threads)), *((name, tuple(v)) for name, v in (space or {}).items())))

    def takes(problem: Problem, device: DeviceInfo) -> Verdict:
        from kernelforge_metal.kernels.tensors import takes as takes_tensors

        for key, value in fixed.items():
            if (have := dict(problem.attrs).get(key)) != value:
                return Reject(f"takes {key}={value}, not {have}")
        for t in (*problem.operands, *problem.results):
            if t is not None and t.dtype not in dtypes:
                return Reject(f"takes {', '.join(dtypes)}, not {t.dtype}")
        verdict = takes_tensors(problem, device)
        if isinstance(verdict, Reject):
            return verdict
        found: Verdict = resolve(supports)(problem, device)
        return found

    def fitting(problem: Problem, device: DeviceInfo) -> ConfigSpace:
        most = device.limit("max-compute-invocations-per-workgroup", 256)
        fits = tuple(n for n in threads if n <= most) or (min(threads),)
        return ConfigSpace((("threads", fits), *made.parameters[1:]))

    def build(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
        return _build(file, grid, problem, config, device)

    said = summary or f"WGSL, {grid} in parallel"
    version = _version(file)
    return KernelVariant(file.stem, op, "gpu", build, said, takes, fitting, priority=priority, version=version)


def _version(file: Path) -> str:
    """Changes with the file: records of another text are not used."""
    try:
        return sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        return "missing"


def _build(file: Path, grid: str, problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    from kernelforge_metal import wgsl
    from kernelforge_metal.kernel import Dispatch, GpuKernel
    from kernelforge_metal.kernels.tensors import count

    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PluginError(f"cannot read {file}: {error.strerror or error}") from error
    tensors = _tensors(problem, device)
    size = count(problem, problem.results[0].shape)
    rows = count(problem, problem.results[0].shape[:-1])
    groups = wgsl.blocks(size, int(config["threads"])) if grid == "elements" else rows
    code = "\n".join(
        [
            wgsl.IDS,
            wgsl.HALVES,
            *_constants(problem, config),
            *(line for t in tensors for line in _accessors(problem, t)),
            f"fn element(ids: Ids) -> u32 {{ return {wgsl.FLAT} * THREADS + ids.thread; }}",
            f"fn row(ids: Ids) -> u32 {{ return {wgsl.FLAT}; }}",
            text,
        ]
    )
    return GpuKernel((Dispatch(code, tuple(t.binding for t in tensors), wgsl.grid(groups)),), checked=True)


def _tensors(problem: Problem, device: DeviceInfo) -> list[Tensor]:
    """The operands that are there and the results, under the op's names."""
    from kernelforge.registry import default_registry
    from kernelforge_metal.kernels.tensors import tensor

    op: OpDef = default_registry().ops[problem.op]
    names = [o.name for o in op.operands]
    if op.variadic:
        names = names[:-1] + [f"{names[-1]}{i}" for i in range(len(problem.operands) - len(names) + 1)]
    results = [f"{op.results[0][1:]}{i}" if op.variadic_results else op.results[i] for i in range(len(problem.results))]
    present = [t is not None for t in problem.operands] + [True] * len(results)
    found = zip((*names, *results), present, strict=True)
    return [tensor(problem, i, f"{name}_", device) for i, (name, there) in enumerate(found) if there]


def _constants(problem: Problem, config: Config) -> list[str]:
    lines = [f"const {name.upper()} = {value}u;" for name, value in config.items()]
    for name, value in problem.attrs:
        if isinstance(value, bool):
            lines.append(f"const {name.upper()} = {str(value).lower()};")
        elif isinstance(value, int | float):
            lines.append(f"const {name.upper()} = {value!r};")
    return lines


def _accessors(problem: Problem, t: Tensor) -> list[str]:
    from kernelforge_metal.kernels.tensors import dim_text, offsets, product_text

    name, number = t.name[:-1], "i32" if t.type.dtype == "i32" else "f32"
    setup, (place,) = offsets(problem, t.type.shape, [t.type], "i")
    lines = [
        f"fn {name}_size() -> u32 {{ return {product_text(problem, t.type.shape)}; }}",
        f"fn {name}_row() -> u32 {{ return {dim_text(problem, t.type.shape[-1]) if t.type.rank else '1u'}; }}",
        *(f"fn {name}_dim{i}() -> u32 {{ return {dim_text(problem, d)}; }}" for i, d in enumerate(t.type.shape)),
    ]
    if t.writes:
        return [*lines, f"fn store_{name}(i: u32, value: {number}) {{ {setup} {t.store(place, 'value')} }}"]
    return [*lines, f"fn load_{name}(i: u32) -> {number} {{ {setup} return {t.load(place)}; }}"]
