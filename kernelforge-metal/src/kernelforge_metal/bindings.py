"""The dispatches of a plan, bound to the buffers that runs are given."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge_metal.encoder import Region
from kernelforge_metal.kernel import HostKernel
from kernelforge_metal.recorder import Command, Stream

if TYPE_CHECKING:
    from kernelforge.plan import Plan
    from kernelforge_metal.buffer import GpuBuffer
    from kernelforge_metal.device import CompiledKernel
    from kernelforge_metal.encoder import Recorded
    from kernelforge_metal.inputs import Given
    from kernelforge_metal.kernel import Below, Dispatch
    from kernelforge_metal.layout import Layout
    from kernelforge_metal.native import Gpu
    from kernelforge_metal.parameters import Parameters

Segment = Stream | int
"""Dispatches of consecutive steps, or the number of a step that runs on the host."""

MAX_BOUND = 8
"""Sets of donated buffers whose bind groups are kept."""

Known = frozenset[tuple[int, int]]
"""Values of a plan, and bounds that all their numbers are below."""


@dataclass
class Bound:
    """The dispatches of a plan for certain buffers, as far as they run with what is known of the inputs."""

    known: Known
    steps: list[list[Command]]
    segments: list[Segment]
    watched: tuple[weakref.ref[GpuBuffer], ...]
    """The buffers, which take this along when they go: their ids may be others' then."""
    ran: bool = False
    """With the present sizes."""
    recorded: Callable[[], Recorded] | None = None
    """Hands out what the next run submits, if that is recorded ahead; once."""


class Bindings:
    """Bind groups and commands are made once for the same buffers, and kept for the latest few of those that live."""

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[CompiledKernel],
        constants: Mapping[tuple[int, int], Region],
        layout: Layout,
        parameters: Parameters,
        gpu: Gpu,
    ) -> None:
        self._plan, self._kernels, self._constants = plan, kernels, constants
        self._layout, self._parameters, self._gpu = layout, parameters, gpu
        self._kept: dict[tuple[Known, tuple[tuple[int, int], ...]], Bound] = {}
        self._asked = frozenset(
            self._fact(i, below)
            for i, compiled in enumerate(kernels)
            if not isinstance(compiled.kernel, HostKernel)
            for dispatch in compiled.kernel.dispatches
            for below in (dispatch.only, dispatch.unless)
            if below is not None
        )

    def clear(self) -> None:
        """Memory that they bind, or parameters that they point into, have moved."""
        self._kept.clear()

    def resized(self) -> None:
        """Parameters were written for other sizes."""
        for bound in list(self._kept.values()):
            bound.ran, bound.recorded = False, None
            for i, row in enumerate(bound.steps):
                for command, (k, _) in zip(row, self._dispatches(i, bound.known), strict=True):
                    command.grid = self._parameters.grids[i][k]
            for segment in bound.segments:
                if isinstance(segment, Stream):
                    segment.changed()

    def forget_recorded(self) -> None:
        """Nothing that was recorded ahead is submitted any more."""
        for bound in list(self._kept.values()):
            bound.recorded = None

    def of(self, given: Given) -> Bound:
        """For the buffers that were given."""
        known = self._known(given)
        key = known, given.places
        if (found := self._kept.get(key)) is not None:
            return found
        if len(self._kept) >= MAX_BOUND:
            self._kept.pop(next(iter(self._kept)))
        made = [self._bind_step(i, given, known) for i in range(len(self._kernels))]
        own = weakref.ref(self)

        def forget(_: weakref.ref[GpuBuffer]) -> None:
            if (bindings := own()) is not None:
                bindings._kept.pop(key, None)

        watched = tuple(weakref.ref(b, forget) for b in given.buffers.values())
        self._kept[key] = Bound(known, made, self._segments(made), watched)
        return self._kept[key]

    def _fact(self, i: int, below: Below) -> tuple[int, int]:
        """What a kernel of step `i` asks, of a value of the plan."""
        value = self._plan.steps[i].operands[below.index]
        assert value is not None
        return value, below.bound

    def _known(self, given: Given) -> Known:
        """What holds of all that kernels ask."""
        return frozenset(
            (value, bound)
            for value, bound in self._asked
            if (array := given.arrays.get(value)) is not None and max(array.ravel().tolist(), default=-1) < bound
        )

    def _dispatches(self, i: int, known: Known) -> Iterator[tuple[int, Dispatch]]:
        """Those of step `i` that run, and their numbers."""
        kernel = self._kernels[i].kernel
        for k, dispatch in enumerate(() if isinstance(kernel, HostKernel) else kernel.dispatches):
            left_out = dispatch.only is not None and self._fact(i, dispatch.only) not in known
            if not left_out and (dispatch.unless is None or self._fact(i, dispatch.unless) not in known):
                yield k, dispatch

    def _bind_step(self, i: int, given: Given, known: Known) -> list[Command]:
        step, compiled = self._plan.steps[i], self._kernels[i]
        values = (*step.operands, *step.results)
        made: list[Command] = []
        for k, dispatch in self._dispatches(i, known):
            regions = []
            for b in dispatch.bindings:
                if b.index >= len(values):
                    extra = b.index - len(values)
                    tables = compiled.tables
                    regions.append(
                        tables[extra] if extra < len(tables) else self._layout.scratch(i, extra - len(tables))
                    )
                elif (i, b.index) in self._constants:
                    whole = self._constants[i, b.index]
                    regions.append(Region(whole.buffer, b.start, b.nbytes or whole.nbytes - b.start))
                else:
                    value = values[b.index]
                    assert value is not None
                    regions.append(self._layout.region(self._plan.root(value), given))
            pipeline = compiled.pipelines[k]
            group = self._gpu.bind_group(pipeline.layout, regions)
            address, nbytes, start = self._parameters.of(i, k)
            made.append(
                Command(
                    pipeline.pipeline._internal,
                    group._internal,
                    self._parameters.grids[i][k],
                    address,
                    nbytes,
                    start,
                    (pipeline, group, *self._parameters.memory),
                )
            )
        return made

    def _segments(self, steps: Sequence[list[Command]]) -> list[Segment]:
        """Runs of steps on the GPU, and steps on the host between them."""
        segments: list[Segment] = []
        for i, commands in enumerate(steps):
            if isinstance(self._kernels[i].kernel, HostKernel):
                segments.append(i)
            elif segments and isinstance(segments[-1], Stream):
                segments[-1].commands += commands
            else:
                segments.append(Stream(list(commands)))
        return segments
