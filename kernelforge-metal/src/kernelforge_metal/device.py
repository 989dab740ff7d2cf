"""A GPU as a device: builds a plan's kernels, compiles their shaders, keeps its constants on the GPU."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge.errors import DeviceError, KernelForgeWarning, PluginError, UsageError
from kernelforge.faults import failed
from kernelforge.variant import DeviceInfo, config_key
from kernelforge_metal.adapters import SOFTWARE
from kernelforge_metal.buffer import GpuBuffer
from kernelforge_metal.errors import DeviceLost, OutOfMemory
from kernelforge_metal.executable import GpuExecutable
from kernelforge_metal.kernel import GpuKernel, HostKernel, fixed_parameters, is_read_only, parameter_names, shader
from kernelforge_metal.moving import misplaced, moved
from kernelforge_metal.rolled import rolled
from kernelforge_metal.store import ConstantStore, send

if TYPE_CHECKING:
    from kernelforge.backend import Catalog, TensorSource
    from kernelforge.plan import Plan, Step
    from kernelforge_metal.encoder import Region
    from kernelforge_metal.native import Gpu, Pipeline


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel whose dispatches have pipelines and whose tables are on the GPU."""

    kernel: GpuKernel | HostKernel
    pipelines: tuple[Pipeline, ...] = ()
    tables: tuple[Region, ...] = ()


class GpuDevice:
    """See `kernelforge.backend.Device`. Pipelines and packed constants are kept and shared by all its executables."""

    def __init__(self, info: DeviceInfo, gpu: Gpu) -> None:
        self._info, self._gpu = info, gpu
        self._kernels: dict[tuple[object, ...], CompiledKernel] = {}
        self._stores: dict[int, ConstantStore] = {}
        self._on_host: set[str] = set()

    @property
    def info(self) -> DeviceInfo:
        return self._info

    @property
    def gpu(self) -> Gpu:
        """What everything on it goes through."""
        return self._gpu

    def allocate(self, shape: tuple[int, ...], dtype: str) -> GpuBuffer:
        return GpuBuffer(self._gpu, shape, dtype)

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> GpuExecutable:
        """Build, compile and pack. Raises PluginError when a variant builds something that is no GPU kernel, or WGSL that does
        not compile; DeviceError when the constants do not fit."""
        store = self._store(constants)
        kernels = [self._compiled(step, plan, catalog) for step in plan.steps]
        self._say_what_runs_on_the_host(plan, kernels)
        regions: dict[tuple[int, int], Region] = {}
        arrays: dict[tuple[int, int], object] = {}
        for i, (step, compiled) in enumerate(zip(plan.steps, kernels, strict=True)):
            for k, operand in enumerate(step.operands):
                constant = None if operand is None else plan.values[operand].constant
                if constant is None:
                    continue
                if isinstance(compiled.kernel, HostKernel):
                    arrays[i, k] = store.array(constant, constants, catalog.ops)
                else:
                    regions[i, k] = store.get(constant, compiled.kernel.packs.get(k), constants, catalog.ops)
        return GpuExecutable(plan, kernels, regions, arrays, self._gpu, catalog)

    def _say_what_runs_on_the_host(self, plan: Plan, kernels: Sequence[CompiledKernel]) -> None:
        """Warn of each op once: its operands and results go over the bus, and the GPU waits. Who gives a config, as tuning
        does, has asked for the kernel."""
        ops = {
            step.problem.op
            for step, compiled in zip(plan.steps, kernels, strict=True)
            if isinstance(compiled.kernel, HostKernel) and step.config_source != "given"
        } - self._on_host
        if ops:
            text = f"{', '.join(sorted(ops))}: these steps run on the host, slowly"
            warnings.warn(
                KernelForgeWarning(f"{text}; `kernelforge why --target gpu` says why no GPU kernel was taken"),
                stacklevel=4,
            )
        self._on_host |= ops

    def _store(self, source: TensorSource) -> ConstantStore:
        """The packed constants of `source`, dropped with it."""
        key = id(source)
        if key not in self._stores:
            self._stores[key] = ConstantStore(self._gpu)
            weakref.finalize(source, self._stores.pop, key, None)
        return self._stores[key]

    def _compiled(self, step: Step, plan: Plan, catalog: Catalog) -> CompiledKernel:
        values = enumerate((*step.operands, *step.results))
        starts = {k: plan.values[v].offset for k, v in values if v is not None and plan.values[v].offset}
        apart = _apart(step, plan)
        key = step.variant, str(step.problem), config_key(step.config), tuple(starts.items()), apart
        if key not in self._kernels:
            self._kernels[key] = self._compile(step, starts, apart, catalog)
        return self._kernels[key]

    def _compile(
        self, step: Step, starts: Mapping[int, int], apart: Collection[int], catalog: Catalog
    ) -> CompiledKernel:
        """`starts`: where operands and results that are views start, in elements. `apart`: see `is_read_only`."""
        variant = catalog.variant(self._info.target, step.problem.op, step.variant)
        kernel = variant.build_kernel(step.problem, step.config, self._info)
        if isinstance(kernel, HostKernel):
            return CompiledKernel(kernel)
        if not isinstance(kernel, GpuKernel):
            raise PluginError(
                f"variant '{variant.key}' of {variant.provenance} built {type(kernel).__name__}",
                hint="a GPU variant's build returns kernelforge_metal.kernel.GpuKernel or HostKernel",
            )
        if wrong := misplaced(kernel, step.problem, starts):
            kernel = moved(kernel, step.problem, wrong)
        pipelines = []
        for dispatch in kernel.dispatches:
            fixed = fixed_parameters(step.problem, dispatch, starts)
            code = shader(step.problem, kernel, dispatch, immediates=self._gpu.immediates, fixed=fixed, apart=apart)
            if SOFTWARE in self._info.features:
                code = rolled(code)
            read_only = [is_read_only(step.problem, kernel, b.index, apart) for b in dispatch.bindings]
            nbytes = 4 * len(parameter_names(step.problem, dispatch)) if fixed is None else 0
            try:
                what = f"'{variant.name}' of {step.problem.op}"
                pipelines.append(self._gpu.pipeline(code, read_only, nbytes, checked=kernel.checked, what=what))
            except (OutOfMemory, DeviceLost):
                raise
            except DeviceError as error:
                what = f"does not compile for {step.problem}"
                raise failed(f"variant '{variant.key}'", variant.provenance, what, error) from error
        return CompiledKernel(
            kernel, tuple(pipelines), tuple(send(self._gpu, table, "table") for table in kernel.tables)
        )

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        """Raises UsageError: GPU kernels are WGSL."""
        raise UsageError("the gpu target has no LLVM IR: its kernels are WGSL", hint="use --target cpu")

    def close(self) -> None:
        """Executables keep what they need."""
        self._kernels.clear()


def _apart(step: Step, plan: Plan) -> tuple[int, ...]:
    """The operands of a step in whose buffers there is no result: intermediate values, inputs and outputs have buffers of their
    own. Inputs count as one: a caller may give one buffer as two of them."""
    written = {plan.values[plan.root(v)].place for v in step.results}
    return tuple(
        k
        for k, v in enumerate(step.operands)
        if v is not None and plan.values[plan.root(v)].place not in (*written, "constant")
    )
