"""The CPU as a device: builds a plan's kernels, links their objects, packs its constants."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kernelforge.dtype import to_numpy
from kernelforge.errors import PluginError, UsageError
from kernelforge.faults import failed
from kernelforge.plan_cache import code_stamp, plan_key
from kernelforge.problem import Problem, TensorType
from kernelforge.reference import HostBuffer
from kernelforge.registry import Registry
from kernelforge.variant import DeviceInfo, config_key
from kernelforge_cpu.executable import CpuExecutable, LinkedKernel
from kernelforge_cpu.kernel import NativeKernel, PythonKernel
from kernelforge_cpu.store import ConstantStore, aligned_zeros

if TYPE_CHECKING:
    from kernelforge.backend import Catalog, TensorSource
    from kernelforge.plan import Plan, Step
    from kernelforge.variant import KernelVariant
    from kernelforge_cpu.store import Array
    from kernelforge_cpu.team import Team


class CpuDevice:
    """See `kernelforge.backend.Device`. Kernels and packed constants are kept and shared by all its executables."""

    def __init__(self, info: DeviceInfo, team: Team) -> None:
        self._info, self._team = info, team
        self._kernels: dict[tuple[str, str, str], LinkedKernel] = {}
        self._stores: dict[int, ConstantStore] = {}

    @property
    def info(self) -> DeviceInfo:
        return self._info

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        t = TensorType(shape, dtype)
        return HostBuffer(aligned_zeros(t.nbytes()).view(to_numpy(dtype)).reshape(t.array_shape()))

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> CpuExecutable:
        """Build, link and pack. Raises PluginError when a variant builds something that is not a CPU kernel."""
        store = self._store(constants)
        kernels = self._link(plan.steps, catalog)
        packed: dict[tuple[int, int], Array] = {}
        for i, (step, linked) in enumerate(zip(plan.steps, kernels, strict=True)):
            packs = linked.kernel.packs if isinstance(linked.kernel, NativeKernel) else {}
            for k, operand in enumerate(step.operands):
                constant = None if operand is None else plan.values[operand].constant
                if constant is not None:
                    packed[i, k] = store.get(constant, packs.get(k), constants, catalog.ops)
        return CpuExecutable(plan, kernels, packed, self._team, catalog)

    def _store(self, source: TensorSource) -> ConstantStore:
        """The packed constants of `source`, dropped with it."""
        key = id(source)
        if key not in self._stores:
            self._stores[key] = ConstantStore()
            weakref.finalize(source, self._stores.pop, key, None)
        return self._stores[key]

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        """LLVM IR of the plan's distinct native kernels."""
        from kernelforge_cpu.jit import llvm_ir

        kernels = {self._key(s): self._build(s, catalog) for s in plan.steps}
        texts = dict.fromkeys(k.text for k in kernels.values() if isinstance(k, NativeKernel) and k.mlir)
        return "\n".join(llvm_ir(text) for text in texts)

    def close(self) -> None:
        """Executables keep what they need; the team stays for other sessions."""
        self._kernels.clear()

    @staticmethod
    def _key(step: Step) -> tuple[str, str, str]:
        return step.variant, str(step.problem), config_key(step.config)

    def _build(self, step: Step, catalog: Catalog) -> NativeKernel | PythonKernel:
        variant = catalog.variant(self._info.target, step.problem.op, step.variant)
        kernel = variant.build_kernel(step.problem, step.config, self._info)
        if not isinstance(kernel, NativeKernel | PythonKernel):
            raise PluginError(
                f"variant '{variant.key}' of {variant.provenance} built {type(kernel).__name__}",
                hint="a CPU variant's build returns kernelforge_cpu.kernel.NativeKernel or PythonKernel",
            )
        if variant.layouts is not None:
            self._check_layouts(variant, step, kernel)
        return kernel if isinstance(kernel, NativeKernel) else _guarded(kernel, variant, step.problem)

    def _check_layouts(self, variant: KernelVariant, step: Step, kernel: NativeKernel | PythonKernel) -> None:
        """Raises PluginError when the kernel packs otherwise than its variant told the plan."""
        packs = kernel.packs if isinstance(kernel, NativeKernel) else {}
        have, told = {i: p.key for i, p in packs.items()}, variant.packed_layouts(step.problem, step.config, self._info)
        if have != told:
            raise PluginError(
                f"variant '{variant.key}' of {variant.provenance} packs {have}, its layouts say {dict(told)}"
            )

    def _link(self, steps: Sequence[Step], catalog: Catalog) -> list[LinkedKernel]:
        """Kernels of all steps; those that are new are compiled or loaded from the object cache, all together."""
        from kernelforge_cpu.objects import load_objects

        keys = [self._key(s) for s in steps]
        fresh = {key: s for key, s in zip(keys, steps, strict=True) if key not in self._kernels}
        built = {key: self._build(step, catalog) for key, step in fresh.items()}
        written = [k for k in built.values() if isinstance(k, NativeKernel) and k.mlir]
        try:
            library = None
            if written:
                texts = [k.mlir for k in written if isinstance(k.mlir, str)]
                # One text is written sooner than a list is kept.
                name = self._name(list(fresh), texts, catalog) if len(texts) < len(written) > 1 else None
                library = load_objects(lambda: [k.text for k in written], threads=self._info.threads, name=name)
        except Exception:
            self._blame(fresh, built, catalog)
            raise
        for key, kernel in built.items():
            addresses: list[int] = []
            for phase in kernel.phases if isinstance(kernel, NativeKernel) else ():
                if isinstance(phase.function, int):
                    addresses.append(phase.function)
                elif library is None:
                    raise UsageError(f"kernel '{key[0]}' names function '{phase.function}' but has no MLIR text")
                else:
                    addresses.append(library.address(phase.function))
            self._kernels[key] = LinkedKernel(kernel, tuple(addresses), library)
        return [self._kernels[key] for key in keys]

    def _name(self, keys: Sequence[tuple[str, str, str]], texts: Sequence[str], catalog: Catalog) -> str | None:
        """The hash of all that decides the texts of these kernels, of which some are written; None when that cannot be told."""
        code = code_stamp(catalog) if isinstance(catalog, Registry) else None
        if code is None:
            return None
        info = self._info
        return plan_key(code, info.fingerprint, sorted(info.features), info.limits, info.threads, keys, *texts)

    def _blame(
        self,
        steps: Mapping[tuple[str, str, str], Step],
        built: Mapping[tuple[str, str, str], NativeKernel | PythonKernel],
        catalog: Catalog,
    ) -> None:
        """Raises PluginError for the kernel whose text does not compile, if one of them alone does not."""
        from kernelforge_cpu.objects import load_objects

        for key, kernel in built.items():
            try:
                if isinstance(kernel, NativeKernel) and kernel.mlir:
                    load_objects([kernel.text])
            except Exception as error:
                step = steps[key]
                variant = catalog.variant(self._info.target, step.problem.op, step.variant)
                what = f"does not compile for {step.problem}"
                raise failed(f"variant '{variant.key}'", variant.provenance, what, error) from error


def _guarded(kernel: PythonKernel, variant: KernelVariant, problem: Problem) -> PythonKernel:
    """The kernel as it is run: told apart from what calls it when it fails, and kept from writing to its operands."""

    def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
        seen = [None if operand is None else operand.view() for operand in operands]
        for view in seen:
            if view is not None:
                view.flags.writeable = False
        try:
            kernel.call(seen, results)
        except MemoryError:
            raise
        except Exception as error:
            raise failed(f"variant '{variant.key}'", variant.provenance, f"fails on {problem}", error) from error

    return PythonKernel(call)
