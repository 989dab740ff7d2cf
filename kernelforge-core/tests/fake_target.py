"""A target whose kernels are Python functions and whose clock is scripted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernelforge import builtin
from kernelforge.backend import Buffer, Catalog, TensorSource, Timing
from kernelforge.cli.output import Output
from kernelforge.constant import evaluate
from kernelforge.descriptors import BackendSpec
from kernelforge.errors import UsageError
from kernelforge.hookspecs import hookimpl
from kernelforge.plan import Plan
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem
from kernelforge.reference import HostBuffer, bind_inputs
from kernelforge.registry import Registry
from kernelforge.session import Session
from kernelforge.tune.records import RecordStore
from kernelforge.variant import Config, ConfigSpace, DeviceInfo, KernelVariant

Array = np.ndarray[Any, np.dtype[Any]]
Outputs = tuple[Array, ...]
Compute = Callable[[Problem, Sequence[Array | None], Outputs], Outputs]
"""Gets the operands and the right results; returns what the kernel makes of them, NaN where it writes nothing."""

INFO = DeviceInfo("fake", "fake device", "fake-0", threads=2)


def right(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
    return results


@dataclass
class Kernel:
    compute: Compute = right
    seconds: float = 1e-3
    on_measure: Callable[[], None] = lambda: None
    runs: int = field(default=0)


def variant(
    name: str,
    kernel: Callable[[Config], Kernel] = lambda config: Kernel(),
    op: str = "transformer.matmul",
    space: ConfigSpace | None = None,
    **more: Any,
) -> KernelVariant:
    def build(problem: Problem, config: Config, device: DeviceInfo) -> Kernel:
        return kernel(config)

    return KernelVariant(name, op, "fake", build, space=lambda problem, device: space or ConfigSpace(), **more)


class FakeExecutable:
    def __init__(self, plan: Plan, constants: TensorSource, catalog: Catalog, info: DeviceInfo) -> None:
        *_, step = plan.steps  # those before are the same
        self._plan, self._step, self._op = plan, step, catalog.ops[step.problem.op]
        found = catalog.variant("fake", step.problem.op, step.variant)
        self.kernel: Kernel = found.build_kernel(step.problem, step.config, info)
        self._constants = {
            i: evaluate(v.constant, constants, catalog.ops) for i, v in enumerate(plan.values) if v.constant is not None
        }

    @property
    def plan(self) -> Plan:
        return self._plan

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        bound, _ = bind_inputs(self._plan, inputs)
        memory = {**self._constants, **bound}
        operands = [None if v is None else self._array(v, memory) for v in self._step.operands]
        results = self._op.evaluate(self._step.problem, operands)
        self.kernel.runs += 1
        outputs: list[Array | Buffer] = []
        expected = [result.copy() for result in results]
        made = self.kernel.compute(self._step.problem, operands, results)
        for i, array, stale in zip(self._step.results, made, expected, strict=True):
            given = inputs.get(self._plan.values[i].name)
            if isinstance(given, HostBuffer):
                given.array[...] = array
                outputs.append(given)
            else:
                # Memory that nobody poisoned may hold what an earlier run left there: the right results.
                written = (out or {}).get(self._plan.values[i].name, stale)
                assert isinstance(written, np.ndarray)
                np.copyto(written, array, where=~np.isnan(array))
                outputs.append(written)
        return tuple(outputs)

    def bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> Callable[[], tuple[Array | Buffer, ...]]:
        return lambda: self.run(inputs, out)

    def _array(self, value: int, memory: Mapping[int, Array]) -> Array:
        found = self._plan.values[value]
        if found.place != "view":
            return memory[value]
        strides = [s * found.type.itemsize for s in found.type.element_strides()]
        return np.lib.stride_tricks.as_strided(memory[found.base], found.type.static_shape(), strides)

    def measure(self, inputs: Mapping[str, Array | Buffer], *, repeats: int) -> Timing:
        self.kernel.on_measure()
        return Timing((len(self._plan.steps) * self.kernel.seconds,) * repeats, "scripted")


class FakeDevice:
    def __init__(self, info: DeviceInfo) -> None:
        self.info = info

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        from kernelforge.dtype import to_numpy

        return HostBuffer(np.zeros(shape, to_numpy(dtype)))

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> FakeExecutable:
        return FakeExecutable(plan, constants, catalog, self.info)

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        raise UsageError("no LLVM IR")

    def close(self) -> None:
        """Nothing is held."""


class FakeBackend:
    def devices(self) -> Sequence[DeviceInfo]:
        return (INFO,)

    def open(self, device: str | None = None, *, threads: int | None = None) -> FakeDevice:
        return FakeDevice(INFO)


@dataclass
class FakePlugin:
    variants: Sequence[KernelVariant]

    @hookimpl
    def kernelforge_backends(self) -> list[BackendSpec]:
        return [BackendSpec("fake", FakeBackend)]

    @hookimpl
    def kernelforge_kernels(self) -> Sequence[KernelVariant]:
        return self.variants


class FakeOutput(Output):
    """A run of a verb with plugins of one's own."""

    def __init__(self, registry: Registry, target: str = "fake") -> None:
        super().__init__("verb", target=target)
        self._registry = registry

    @property
    def registry(self) -> Registry:
        return self._registry


def registry(*variants: KernelVariant) -> Registry:
    return load_registry(entry_points=[], extra_plugins=[builtin, FakePlugin(variants)])


def session(store: RecordStore, *variants: KernelVariant) -> Session:
    return Session("fake", registry=registry(*variants), records=store, pipeline="")
