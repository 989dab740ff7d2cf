"""The `reference` target: every plan step run by its op's numpy reference in float64. Slow and obvious; the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge.backend import Buffer, Catalog, TensorSource, Timing
from kernelforge.constant import evaluate
from kernelforge.dtype import from_numpy, to_numpy
from kernelforge.errors import UsageError
from kernelforge.op import OpDef
from kernelforge.problem import Problem, TensorType
from kernelforge.variant import Config, DeviceInfo, KernelVariant

if TYPE_CHECKING:
    from kernelforge.explanation import Explanation
    from kernelforge.plan import Plan, Step

Array = np.ndarray[Any, np.dtype[Any]]

INFO = DeviceInfo(target="reference", name="numpy", fingerprint="reference")


def variant(op: OpDef) -> KernelVariant:
    """The variant of the reference target for `op`."""

    def build(problem: Problem, config: Config, device: DeviceInfo) -> OpDef:
        return op

    return KernelVariant("reference", op.full_name, "reference", build, summary="numpy in float64")


class HostBuffer:
    """A numpy array as a device buffer: the memory of the targets that run on the host."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        return from_numpy(self.array.dtype)

    def numpy(self) -> Array:
        return self.array

    def fetch(self, *index: int) -> Callable[[], Array]:
        array = np.array(self.array[index])
        return lambda: array

    def write(self, array: Array) -> None:
        if array.shape != self.array.shape or array.dtype != self.array.dtype:
            raise UsageError(
                f"cannot write {array.dtype}{list(array.shape)} into a {self.array.dtype}{list(self.array.shape)} buffer"
            )
        self.array[...] = array


def bind_inputs(plan: Plan, inputs: Mapping[str, Array | Buffer]) -> tuple[dict[int, Array], dict[str, int]]:
    """Check `inputs` against the plan; the arrays by value id, and the sizes of the dynamic dimensions.

    Donated inputs given as Buffer come back as the buffer's own memory; all others are never written. Raises UsageError
    for a missing or unknown name, a wrong shape or dtype, or two sizes for one dimension.
    """
    names = {plan.values[i].name for i in plan.inputs}
    if unknown := set(inputs) - names:
        raise UsageError(f"unknown input '{min(unknown)}'", hint=f"the inputs are: {', '.join(sorted(names))}")
    arrays: dict[int, Array] = {}
    dims: dict[str, int] = {}
    for i in plan.inputs:
        value = plan.values[i]
        if value.name not in inputs:
            raise UsageError(f"input '{value.name}' is missing", hint=f"it is {value.type}")
        given = inputs[value.name]
        array = given.array if isinstance(given, HostBuffer) else np.asarray(given)
        if array.dtype != to_numpy(value.type.dtype):
            raise UsageError(f"input '{value.name}' has dtype {array.dtype}, wants {value.type.dtype}")
        if array.ndim != value.type.rank:
            raise UsageError(f"input '{value.name}' has shape {array.shape}, wants {list(value.type.array_dims)}")
        for have, want in zip(array.shape, value.type.array_dims, strict=True):
            size = dims.setdefault(want, have) if isinstance(want, str) else want
            if have != size:
                raise UsageError(
                    f"input '{value.name}' has shape {array.shape}, wants {list(value.type.array_dims)} ({want}={size})"
                )
        arrays[i] = array
    return arrays, dims


def check_out(out: Mapping[str, Array | Buffer], inputs: Mapping[str, Array | Buffer], names: Collection[str]) -> None:
    """Raises UsageError for an output that there is not, and for a buffer that the same run reads or writes otherwise."""
    if unknown := out.keys() - names:
        raise UsageError(f"there is no output '{min(unknown)}' to write to")
    used = {id(given) for given in inputs.values()}
    for name, target in out.items():
        if isinstance(target, HostBuffer) and id(target) in used:
            raise UsageError(f"output '{name}' cannot be written to a buffer that is in use in the same run")
        used.add(id(target))


def output_array(given: Array | Buffer, name: str, like: Array) -> Array:
    """The caller's array, or its buffer's, for an output that must be as `like`. Raises UsageError when it is not."""
    if isinstance(given, HostBuffer):
        given = given.array
    if not isinstance(given, np.ndarray):
        raise UsageError(
            f"output '{name}' cannot be written to a {type(given).__name__}",
            hint="give a numpy array, or a buffer of this device",
        )
    fits = given.shape == like.shape and given.dtype == like.dtype
    if not fits or not given.flags.c_contiguous or not given.flags.writeable:
        raise UsageError(
            f"output '{name}' cannot be written to a {given.dtype}{list(given.shape)} array",
            hint=f"give a writable, C-contiguous {like.dtype}{list(like.shape)} array",
        )
    return given


class ReferenceExecutable:
    def __init__(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> None:
        self._plan, self._catalog = plan, catalog
        self._ops = [catalog.ops[step.problem.op] for step in plan.steps]
        used = {plan.root(v) for step in plan.steps for v in step.operands if v is not None}
        used |= {plan.root(v) for v in plan.outputs}
        self._constants = {
            i: np.ascontiguousarray(evaluate(v.constant, constants, catalog.ops))
            for i, v in enumerate(plan.values)
            if v.constant is not None and i in used
        }

    @property
    def plan(self) -> Plan:
        return self._plan

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        memory, dims = self._memory(inputs, out)
        for op, step in zip(self._ops, self._plan.steps, strict=True):
            self._step(op, step, memory, dims)
        outputs: list[Array | Buffer] = []
        for i in self._plan.outputs:
            root = self._plan.values[self._plan.root(i)]
            known = {"input": inputs, "output": out or {}}.get(root.place, {})
            buffer = known.get(root.name)
            outputs.append(buffer if isinstance(buffer, HostBuffer) else self._array(i, memory, dims))
        return tuple(outputs)

    def _memory(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[dict[int, Array], dict[str, int]]:
        """Where every value that is no view lives, and the sizes of the dynamic dimensions."""
        bound, dims = bind_inputs(self._plan, inputs)
        if out:
            check_out(out, inputs, {self._plan.values[i].name for i in self._plan.outputs})
        memory: dict[int, Array] = dict(self._constants)
        for i, array in bound.items():
            given = inputs[self._plan.values[i].name]
            owned = not self._plan.values[i].donated or isinstance(given, HostBuffer)
            memory[i] = array if owned else array.copy()
        for i, value in enumerate(self._plan.values):
            if value.place in ("arena", "output"):
                memory[i] = np.empty(value.type.array_shape(dims), to_numpy(value.type.dtype))
            if value.place == "output" and out is not None and value.name in out:
                memory[i] = output_array(out[value.name], value.name, memory[i])
        return memory, dims

    def bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> Callable[[], tuple[Array | Buffer, ...]]:
        memory, _ = self._memory(inputs, out)
        kept: dict[str, Array | Buffer] = {
            v.name: memory[i] for i, v in enumerate(self._plan.values) if v.place == "output"
        }
        kept |= out or {}
        return lambda: self.run(inputs, kept)

    def _array(self, i: int, memory: Mapping[int, Array], dims: Mapping[str, int]) -> Array:
        value = self._plan.values[i]
        if value.place != "view":
            return memory[i]
        base = (
            np.ascontiguousarray(memory[value.base])
            if not memory[value.base].flags.c_contiguous
            else memory[value.base]
        )
        if value.type.quantised:  # never but whole
            return base
        flat = base.reshape(-1)[value.offset :]
        shape = value.type.static_shape(dims)
        strides = tuple(s * value.type.itemsize for s in value.type.element_strides())
        return as_strided(flat, shape, strides)

    def _step(self, op: OpDef, step: Step, memory: Mapping[int, Array], dims: Mapping[str, int]) -> None:
        arrays = [None if v is None else self._array(v, memory, dims) for v in step.operands]
        for result, array in zip(step.results, op.evaluate(step.problem, arrays), strict=True):
            self._array(result, memory, dims)[...] = array

    def measure(self, inputs: Mapping[str, Array | Buffer], *, repeats: int) -> Timing:
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.run(inputs)
            samples.append(time.perf_counter() - start)
        return Timing(tuple(samples), "host-clock")

    def explain(self, inputs: Mapping[str, Array | Buffer] | None = None, *, repeats: int = 9) -> Explanation:
        # What it takes costs every start that explains nothing.
        from statistics import median

        from kernelforge.explanation import explain_plan

        if inputs is None:
            return explain_plan(self._plan, self._catalog)
        memory, dims = self._memory(inputs)
        samples: list[list[float]] = [[] for _ in self._ops]
        for _ in range(repeats + 1):
            for op, step, times in zip(self._ops, self._plan.steps, samples, strict=True):
                start = time.perf_counter()
                self._step(op, step, memory, dims)
                times.append(time.perf_counter() - start)
        seconds = [median(times[1:]) for times in samples]
        return explain_plan(self._plan, self._catalog, dims, seconds, memory)


class ReferenceDevice:
    @property
    def info(self) -> DeviceInfo:
        return INFO

    def allocate(self, shape: tuple[int, ...], dtype: str) -> HostBuffer:
        return HostBuffer(np.zeros(TensorType(shape, dtype).array_shape(), to_numpy(dtype)))

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> ReferenceExecutable:
        return ReferenceExecutable(plan, constants, catalog)

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        """Raises UsageError: there is none."""
        raise UsageError("the reference target has no LLVM IR: its kernels are numpy calls", hint="use --target cpu")

    def close(self) -> None:
        """Nothing is held."""


class ReferenceBackend:
    def devices(self) -> Sequence[DeviceInfo]:
        return (INFO,)

    def open(self, device: str | None = None, *, threads: int | None = None) -> ReferenceDevice:
        """The numpy device. Raises UsageError for another name."""
        if device not in (None, INFO.name):
            raise UsageError(f"the reference target has no device '{device}'", hint=f"it has '{INFO.name}'")
        return ReferenceDevice()
