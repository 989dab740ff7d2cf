"""A compiled plan on the GPU: one stream of dispatches a run, in one compute pass, with bind groups made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kernelforge.errors import DeviceError
from kernelforge.explanation import Explanation, explain_plan
from kernelforge_metal.bindings import Bindings, Bound
from kernelforge_metal.encoder import Recorded, Region
from kernelforge_metal.inputs import Given, check_inputs, take_out
from kernelforge_metal.kernel import HostKernel
from kernelforge_metal.layout import Layout
from kernelforge_metal.parameters import Parameters
from kernelforge_metal.recorder import Command, Stream
from kernelforge_metal.timing import measure, measure_on_host, step_seconds

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Catalog, Timing
    from kernelforge.plan import Plan
    from kernelforge_metal.buffer import GpuBuffer
    from kernelforge_metal.device import CompiledKernel
    from kernelforge_metal.native import Gpu

Array = np.ndarray[Any, np.dtype[Any]]


class GpuExecutable:
    """See `kernelforge.backend.Executable`. Threads that use one device take turns."""

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[CompiledKernel],
        constants: Mapping[tuple[int, int], Region],
        arrays: Mapping[tuple[int, int], Any],
        gpu: Gpu,
        catalog: Catalog,
    ) -> None:
        """`kernels`: one a step. `constants` and `arrays`: of (step, operand index), on the GPU and, for steps that run on the
        host, there."""
        self._plan, self._kernels, self._arrays = plan, kernels, arrays
        self._gpu, self._catalog = gpu, catalog
        self._layout = Layout(plan, kernels, gpu)
        self._dims: dict[str, int] | None = None
        self._parameters = Parameters(plan, kernels, gpu)
        self._bindings = Bindings(plan, kernels, constants, self._layout, self._parameters, gpu)

    @property
    def plan(self) -> Plan:
        return self._plan

    # --- what a run does ---

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        with self._gpu.lock:
            given = self._take(inputs)
            targets = self._targets(given, out)
            self._send(given)
            self._execute(given)
            return self._results(given, targets)

    def bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> Callable[[], tuple[Array | Buffer, ...]]:
        with self._gpu.lock:
            given = self._take(inputs)
        targets = self._targets(given, out)
        for name, (i, spec) in self._layout.outputs(given.dims).items():
            if i not in given.buffers:
                targets.setdefault(name, np.empty(*spec))
        kept = self._kept(given)

        def call() -> tuple[Array | Buffer, ...]:
            with self._gpu.lock:
                self._resize(given.dims)
                self._send(given)
                self._execute(given)
                return kept or self._results(given, targets)

        return call

    def measure(self, inputs: Mapping[str, Array | Buffer], *, repeats: int) -> Timing:
        with self._gpu.lock:
            given = self._take(inputs)
            self._send(given)
            segments = self._bindings.of(given).segments
            commands = [c for s in segments if isinstance(s, Stream) for c in s.commands]
            if all(isinstance(s, Stream) for s in segments):
                return measure(self._gpu, commands, self._parameters.uniform_group, repeats)
            return measure_on_host(
                self._gpu, lambda: self._execute(given), commands, self._parameters.uniform_group, repeats
            )

    def explain(self, inputs: Mapping[str, Array | Buffer] | None = None, *, repeats: int = 9) -> Explanation:
        if inputs is None:
            return explain_plan(self._plan, self._catalog)
        with self._gpu.lock:
            given = self._take(inputs)
            self._send(given)
            steps: list[list[Command] | Callable[[], None]] = []
            for i, commands in enumerate(self._bindings.of(given).steps):
                host = isinstance(self._kernels[i].kernel, HostKernel)
                steps.append(partial(self._run_on_host, i, given) if host else commands)
            seconds = step_seconds(self._gpu, steps, self._parameters.uniform_group, repeats)
        return explain_plan(self._plan, self._catalog, given.dims, seconds)

    # --- inputs and outputs ---

    def _take(self, inputs: Mapping[str, Array | Buffer]) -> Given:
        given = check_inputs(self._plan, inputs)
        self._resize(given.dims)
        return given

    def _targets(self, given: Given, out: Mapping[str, Array | Buffer] | None) -> dict[str, Array]:
        return take_out(given, out, self._layout.outputs(given.dims)) if out else {}

    def _send(self, given: Given) -> None:
        """The host's arrays go to the GPU, small ones with one call."""
        self._layout.send(given.arrays)

    def _kept(self, given: Given) -> tuple[GpuBuffer, ...]:
        """The buffers of all outputs, if each has one that was given; else none."""
        buffers = [given.buffers.get(self._plan.root(i)) for i in self._plan.outputs]
        found = tuple(b for b in buffers if b is not None)
        return found if len(found) == len(buffers) else ()

    def _results(self, given: Given, targets: Mapping[str, Array]) -> tuple[Array | Buffer, ...]:
        """Read the outputs back, but for those that stay on the GPU."""
        fresh = self._layout.read(given)
        results: list[Array | Buffer] = []
        for i in self._plan.outputs:
            value = self._plan.values[i]
            if i in fresh:
                array = fresh[i]
                if (target := targets.get(value.name)) is not None:
                    target[...] = array
                    array = target
                results.append(array)
                continue
            root = self._plan.root(i)
            buffer = given.buffers.get(root)
            results.append(buffer if buffer is not None else self._layout.array(root, given))
        return tuple(results)

    # --- sizes ---

    def _resize(self, dims: dict[str, int]) -> None:
        """Write the parameters for these sizes; make room if there is not enough."""
        if dims == self._dims:
            return
        self._dims = None
        if self._layout.fit(dims):
            self._bindings.clear()
        if self._parameters.resize(dims):
            self._bindings.clear()
        self._dims = dict(dims)
        self._bindings.resized()

    # --- commands ---

    def _execute(self, given: Given) -> None:
        """Submit a run, the copy of its outputs included.

        Steps of a decoder are the same commands each time: while the GPU works on one, what comes next on these buffers is
        recorded. The host is then done before the GPU is.
        """
        bound = self._bindings.of(given)
        segments = bound.segments
        if len(segments) == 1 and isinstance(segments[0], Stream):
            stream = segments[0]
            recorded = self._take_recorded(bound) or self._record(stream, given)

            def ahead() -> None:
                if bound.ran and self._dims == given.dims:
                    bound.recorded = self._record_ahead(stream, given)
                bound.ran = True

            self._gpu.queue.submit_soon(recorded, ahead)
            return
        for segment in segments:
            if isinstance(segment, int):
                self._run_on_host(segment, given)
            else:
                self._gpu.queue.submit(self._record(segment, given))
        if not segments or not isinstance(segments[-1], Stream):
            self._gpu.queue.submit(self._record(Stream([]), given))

    def _take_recorded(self, bound: Bound) -> Recorded | None:
        """What was recorded ahead. Where that went wrong, what was begun for other buffers is no use either."""
        take, bound.recorded = bound.recorded, None
        try:
            return take() if take is not None else None
        except DeviceError:
            self._bindings.forget_recorded()
            raise

    def _record_ahead(self, stream: Stream, given: Given) -> Callable[[], Recorded]:
        """In a thread of its own where it can be: outputs that are read back are copied by this one."""
        if not self._layout.copies_outputs(given):
            begun = self._gpu.queue.record(stream, self._parameters.uniform_group)
            if begun is not None:
                return begun
        recorded = self._record(stream, given)
        return lambda: recorded

    def _record(self, stream: Stream, given: Given) -> Recorded:
        encoder = self._gpu.queue.encoder()
        self._gpu.encode(encoder, stream, self._parameters.uniform_group)
        self._layout.copy_outputs(encoder, given)
        return self._gpu.finish(encoder)

    # --- steps on the host ---

    def _run_on_host(self, i: int, given: Given) -> None:
        step, kernel = self._plan.steps[i], self._kernels[i].kernel
        assert isinstance(kernel, HostKernel)
        memory: dict[int, Array] = {}

        def view(value: int) -> Array:
            root = self._plan.root(value)
            if root not in memory:
                memory[root] = self._layout.array(root, given)
            return strided(memory[root], self._plan.values[value], given.dims)

        operands = [
            None if v is None else self._arrays[i, k] if (i, k) in self._arrays else view(v)
            for k, v in enumerate(step.operands)
        ]
        kernel.call(operands, [view(v) for v in step.results])
        for root in {self._plan.root(v) for v in step.results}:
            region = self._layout.region(root, given)
            if memory[root].size:
                self._gpu.queue.upload(region.buffer, region.offset, memory[root])


def strided(memory: Array, value: Any, dims: Mapping[str, int]) -> Array:
    """The array of a plan's value in the memory of its root."""
    flat, t = memory.reshape(-1), value.type
    if t.quantised:  # it has no views
        return memory
    if t.strides is None:
        return flat[value.offset : value.offset + t.size(dims)].reshape(t.array_shape(dims))
    strides = tuple(s * flat.dtype.itemsize for s in t.strides)
    return as_strided(flat[value.offset :], t.static_shape(dims), strides)
