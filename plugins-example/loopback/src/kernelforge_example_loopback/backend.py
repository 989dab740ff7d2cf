"""A target that computes with the numpy reference and counts what it was asked for: proof that dispatch reaches a plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kernelforge.backend import Catalog, TensorSource
from kernelforge.errors import UsageError
from kernelforge.op import OpDef
from kernelforge.plan import Plan
from kernelforge.problem import Problem
from kernelforge.reference import HostBuffer, ReferenceBackend, ReferenceExecutable
from kernelforge.variant import Config, DeviceInfo, KernelVariant

INFO = DeviceInfo(target="loopback", name="numpy", fingerprint="loopback")


def variant(op: OpDef) -> KernelVariant:
    """What runs any op: its reference."""

    def build(problem: Problem, config: Config, device: DeviceInfo) -> OpDef:
        return op

    return KernelVariant("loopback", op.full_name, "loopback", build, summary="numpy in float64")


class LoopbackDevice:
    def __init__(self) -> None:
        self._numpy = ReferenceBackend().open()
        self.dispatched: Counter[str] = Counter()
        """How often each op was compiled for this device."""

    @property
    def info(self) -> DeviceInfo:
        return INFO

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return self._numpy.allocate(shape, dtype)

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> ReferenceExecutable:
        for step in plan.steps:
            chosen = catalog.variant(INFO.target, step.problem.op, step.variant)
            op: OpDef = chosen.build_kernel(step.problem, step.config, INFO)
            self.dispatched[op.full_name] += 1
        return self._numpy.compile(plan, constants, catalog)

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        raise UsageError("the loopback target has no LLVM IR: its kernels are numpy calls", hint="use --target cpu")

    def close(self) -> None:
        self._numpy.close()


class Loopback:
    def devices(self) -> Sequence[DeviceInfo]:
        return (INFO,)

    def open(self, device: str | None = None, *, threads: int | None = None) -> LoopbackDevice:
        if device not in (None, INFO.name):
            raise UsageError(f"the loopback target has no device '{device}'", hint=f"it has '{INFO.name}'")
        return LoopbackDevice()
