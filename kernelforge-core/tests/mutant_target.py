"""A target whose kernels are Python functions that write into the memory they are given: where mutants live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kernelforge import builtin
from kernelforge.backend import Buffer, Catalog, TensorSource
from kernelforge.descriptors import BackendSpec, DialectSpec, PassSpec, TunerSpec
from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge.hookspecs import hookimpl
from kernelforge.op import OpDef
from kernelforge.plan import Plan, Step
from kernelforge.plugins import load_registry
from kernelforge.problem import Attr, Problem
from kernelforge.reference import HostBuffer, ReferenceExecutable
from kernelforge.registry import Registry
from kernelforge.variant import Accept, Config, ConfigSpace, DeviceInfo, KernelVariant, Verdict

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Call:
    """One call of a kernel."""

    op: OpDef
    problem: Problem
    operands: Sequence[Array | None]
    results: Sequence[Array]
    config: Config
    info: DeviceInfo
    state: dict[Any, Any]
    """What the kernel keeps between calls."""
    instead: list[Array] | None = None
    """What the executable returns in place of its outputs."""

    def operand(self, index: int) -> Array:
        found = self.operands[index]
        assert found is not None
        return found

    def evaluate(self, changed: Mapping[int, Array | None] | None = None, **attrs: Attr) -> tuple[Array, ...]:
        """The right results, for other operands or attributes if so wanted."""
        operands = [(changed or {}).get(i, a) for i, a in enumerate(self.operands)]
        merged = tuple(sorted({**dict(self.problem.attrs), **attrs}.items()))
        return self.op.evaluate(replace(self.problem, attrs=merged), operands)

    def write(self, outputs: Sequence[Array]) -> None:
        with np.errstate(all="ignore"):
            for result, output in zip(self.results, outputs, strict=True):
                result[...] = output.astype(result.dtype)


Kernel = Callable[[Call], None]


def honest(call: Call) -> None:
    call.write(call.evaluate())


def accept(problem: Problem, device: DeviceInfo) -> Verdict:
    return Accept()


def variant(
    name: str, op: str, kernel: Kernel, supports: Callable[[Problem, DeviceInfo], Verdict] = accept, **more: Any
) -> KernelVariant:
    def build(problem: Problem, config: Config, device: DeviceInfo) -> tuple[Kernel, Config, DeviceInfo]:
        return kernel, config, device

    return KernelVariant(name, op, "mutant", build, supports=supports, **more)


TILES = ConfigSpace((("tile", (4, 8)),))


class MutantExecutable(ReferenceExecutable):
    def __init__(self, plan: Plan, constants: TensorSource, catalog: Catalog, info: DeviceInfo) -> None:
        super().__init__(plan, constants, catalog)
        found = [catalog.variant("mutant", s.problem.op, s.variant) for s in plan.steps]
        self._built = {id(s): v.build_kernel(s.problem, s.config, info) for v, s in zip(found, plan.steps, strict=True)}
        self._state: dict[Any, Any] = {}
        self._instead: list[Array] | None = None

    def _step(self, op: OpDef, step: Step, memory: Mapping[int, Array], dims: Mapping[str, int]) -> None:
        kernel, config, info = self._built[id(step)]
        operands = [None if v is None else self._array(v, memory, dims) for v in step.operands]
        results = [self._array(v, memory, dims) for v in step.results]
        call = Call(op, step.problem, operands, results, config, info, self._state)
        kernel(call)
        self._instead = call.instead

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        outputs = super().run(inputs, out)
        return outputs if self._instead is None else tuple(self._instead)


class MutantDevice:
    def __init__(self, threads: int | None) -> None:
        count = 2 if threads is None else threads
        limits = (("vector_bytes", 32),)
        self.info = DeviceInfo("mutant", "numpy", f"mutant-{count}", limits=limits, threads=count)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(np.zeros(shape, to_numpy(dtype)))

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> MutantExecutable:
        return MutantExecutable(plan, constants, catalog, self.info)

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        raise UsageError("the mutant target has no LLVM IR")

    def close(self) -> None:
        """Nothing is held."""


class MutantBackend:
    device: type[MutantDevice] = MutantDevice

    def devices(self) -> Sequence[DeviceInfo]:
        return (self.device(None).info,)

    def open(self, device: str | None = None, *, threads: int | None = None) -> MutantDevice:
        if device not in (None, "numpy"):
            raise UsageError(f"the mutant target has no device '{device}'")
        return self.device(threads)


def fallback(op: OpDef) -> KernelVariant:
    return variant("numpy", op.full_name, honest, priority=-1)


@dataclass
class Plugin:
    """A plugin of one's own, registered as "Plugin"."""

    kernels: Sequence[KernelVariant] = ()
    passes: Sequence[PassSpec] = ()
    tuners: Sequence[TunerSpec] = ()
    dialects: Sequence[DialectSpec] = ()
    backend: type[MutantBackend] = field(default=MutantBackend)

    @hookimpl
    def kernelforge_kernels(self) -> Sequence[KernelVariant]:
        return self.kernels

    @hookimpl
    def kernelforge_passes(self) -> Sequence[PassSpec]:
        return self.passes

    @hookimpl
    def kernelforge_tuners(self) -> Sequence[TunerSpec]:
        return self.tuners

    @hookimpl
    def kernelforge_dialects(self) -> Sequence[DialectSpec]:
        return self.dialects

    @hookimpl
    def kernelforge_backends(self) -> Sequence[BackendSpec]:
        return [BackendSpec("mutant", self.backend, fallback=fallback)]


def registry(plugin: Plugin) -> Registry:
    return load_registry(entry_points=[], extra_plugins=[builtin, plugin])
