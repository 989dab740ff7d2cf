"""A compiled plan: one table of native calls, run by the thread team with one native call per thread."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.backend import Buffer, Timing
from kernelforge.dtype import to_numpy
from kernelforge.errors import UsageError
from kernelforge.reference import HostBuffer, bind_inputs, check_out, output_array
from kernelforge_cpu.driver import StepTable
from kernelforge_cpu.kernel import NativeKernel, PythonKernel
from kernelforge_cpu.layout import Layout
from kernelforge_cpu.stamps import StampedTable
from kernelforge_cpu.store import quick_address

if TYPE_CHECKING:
    from kernelforge.backend import Catalog
    from kernelforge.explanation import Explanation
    from kernelforge.plan import Plan
    from kernelforge_cpu.jit import Library
    from kernelforge_cpu.team import Team

Array = np.ndarray[Any, np.dtype[Any]]

SHORT_RUN_S = 2e-4
"""Runs shorter than this are timed several at a time, so that the clock's and the call's cost do not show."""


@dataclass(frozen=True)
class LinkedKernel:
    """A kernel whose phases have addresses."""

    kernel: NativeKernel | PythonKernel
    addresses: tuple[int, ...]
    library: Library | None
    """Owns the code behind the addresses."""


@dataclass(frozen=True)
class _Row:
    """One row of the driver's table: a phase of a step."""

    step: int
    phase: int
    barrier: bool


class CpuExecutable:
    """See `kernelforge.backend.Executable`. Threads that use one take turns, as its memory is used by one run at a time, and a
    Python kernel cannot run the one that runs it; several executables may share a team."""

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[LinkedKernel],
        constants: Mapping[tuple[int, int], Array],
        team: Team,
        catalog: Catalog,
    ) -> None:
        """`kernels`: one a step. `constants`: the packed array of (step, operand index) for every constant operand."""
        self._plan, self._kernels, self._team, self._catalog = plan, kernels, team, catalog
        self._constants = dict(constants)
        self._lock = threading.RLock()
        self._in_python = False
        _executables.add(self)
        self._rows = self._make_rows()
        self._layout = layout = Layout(plan, [linked.kernel for linked in kernels], self._constants, team.threads)
        self._table = StepTable(
            functions=[self._kernels[r.step].addresses[r.phase] for r in self._rows],
            buffers=[layout.starts[r.step] for r in self._rows],
            pointers=layout.pointers,
            dims=[layout.dim_starts[r.step] for r in self._rows],
            dim_values=layout.dim_values,
            barriers=[r.barrier for r in self._rows],
        )
        self._segments = self._make_segments()
        self._output_specs: list[tuple[int, int, str, np.dtype[Any], tuple[int, ...]]] = []
        self._input_specs: list[tuple[int, str, np.dtype[Any], tuple[int, ...], bool]] = []

    @property
    def plan(self) -> Plan:
        return self._plan

    # --- layout, once ---

    def _make_rows(self) -> list[_Row]:
        rows: list[_Row] = []
        group = -1
        for i, (step, linked) in enumerate(zip(self._plan.steps, self._kernels, strict=True)):
            for phase in range(len(linked.addresses)):
                rows.append(_Row(i, phase, phase > 0 or step.group != group))
                group = step.group
        return rows

    def _make_segments(self) -> list[tuple[int, int] | int]:
        """Ranges of table rows, cut at Python steps (given by their index)."""
        segments: list[tuple[int, int] | int] = []
        row = first = 0
        for i, linked in enumerate(self._kernels):
            if isinstance(linked.kernel, PythonKernel):
                if row > first:
                    segments.append((first, row))
                segments.append(i)
                first = row
            row += len(linked.addresses)
        if row > first:
            segments.append((first, row))
        return segments

    # --- sizes, when they change ---

    def _resize(self, dims: dict[str, int]) -> None:
        if dims == self._layout.dims:
            return
        self._layout.forget()  # kernels of plugins may raise here, and Ctrl-C may come
        self._input_specs = [
            (i, v.name, to_numpy(v.type.dtype), v.type.array_shape(dims), v.donated)
            for i, v in ((i, self._plan.values[i]) for i in self._plan.inputs)
        ]
        self._output_specs = [
            (
                i,
                self._plan.root(i),
                v.name if v.place == "output" else "",
                to_numpy(v.type.dtype),
                v.type.array_shape(dims),
            )
            for i, v in ((i, self._plan.values[i]) for i in self._plan.outputs)
        ]
        for row_index, row in enumerate(self._rows):
            kernel = self._kernels[row.step].kernel
            assert isinstance(kernel, NativeKernel)
            sizes = [dims[d] for d in self._plan.steps[row.step].dims]
            self._table.set_parts(row_index, max(1, kernel.phases[row.phase].parts(sizes, self._team.threads)))
        self._layout.resize(dims)

    # --- running ---

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        with self._lock:
            memory, outputs = self._bind(inputs, out)
            self._execute(memory)
            return outputs

    def bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> Callable[[], tuple[Array | Buffer, ...]]:
        layout = self._layout
        with self._lock:
            memory, outputs = self._bind(inputs, out)
            dims, changes = layout.dims or {}, layout.changes

        def call() -> tuple[Array | Buffer, ...]:
            nonlocal changes
            with self._lock:
                self._check_turn()
                if layout.changes != changes:  # something else was run meanwhile
                    self._resize(dims)
                    for root, array in memory.items():
                        layout.place(root, quick_address(array))
                    changes = layout.changes
                self._execute(memory)
            return outputs

        return call

    def measure(self, inputs: Mapping[str, Array | Buffer], *, repeats: int) -> Timing:
        with self._lock:
            memory, _ = self._bind(inputs, None)
            once = self._timed(lambda: self._execute(memory))
            inner = max(1, min(1000, int(SHORT_RUN_S / once)))
            whole = self._segments[0] if len(self._segments) == 1 else None

            def call() -> None:
                if isinstance(whole, tuple):
                    self._team.run(self._table, *whole, repeats=inner)
                else:
                    for _ in range(inner):
                        self._execute(memory)

            return Timing(tuple(self._timed(call) / inner for _ in range(repeats)), "host-clock")

    def explain(self, inputs: Mapping[str, Array | Buffer] | None = None, *, repeats: int = 9) -> Explanation:
        # What it takes costs every start that explains nothing.
        from kernelforge.explanation import explain_plan

        if inputs is None:
            return explain_plan(self._plan, self._catalog)
        with self._lock:
            memory, seconds = self._stamped(inputs, repeats)
        return explain_plan(self._plan, self._catalog, self._layout.dims, seconds, memory)

    def _stamped(self, inputs: Mapping[str, Array | Buffer], repeats: int) -> tuple[Mapping[int, Array], list[float]]:
        """The memory of a run and the time of each of its steps."""
        from statistics import median

        memory, _ = self._bind(inputs, None)
        tables = [None if isinstance(s, int) else StampedTable(self._table, self._spans(*s)) for s in self._segments]
        samples = [self._step_seconds(memory, tables) for _ in range(repeats + 1)][1:]
        return memory, [median(times[i] for times in samples) for i in range(len(self._kernels))]

    def _spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """The rows of each step between two rows of the table."""
        starts = [i for i in range(first, last) if self._rows[i].phase == 0]
        return list(pairwise([*starts, last]))

    def _step_seconds(self, memory: Mapping[int, Array], tables: Sequence[StampedTable | None]) -> dict[int, float]:
        """Run once; the time of each step."""
        times = dict.fromkeys(range(len(self._kernels)), 0.0)
        for segment, table in zip(self._segments, tables, strict=True):
            if isinstance(segment, int):
                times[segment] = self._timed(partial(self._run_python, segment, memory))
            elif table is not None:
                self._team.run(table)
                steps = [row.step for row in self._rows[slice(*segment)] if row.phase == 0]
                times.update(zip(steps, table.seconds(), strict=True))
        return times

    def _bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None
    ) -> tuple[dict[int, Array], tuple[Array | Buffer, ...]]:
        """Write the addresses of inputs and outputs. Returns their arrays by value, which must live through the run, and
        what the run returns."""
        self._check_turn()
        memory = self._plain_inputs(inputs)
        if memory is None:
            memory = self._checked_inputs(inputs)
        for i, array in memory.items():
            self._layout.place(i, quick_address(array))
        if out:
            check_out(out, inputs, {spec[2] for spec in self._output_specs})
        returned: list[Array | Buffer] = []
        for i, root, name, dtype, shape in self._output_specs:
            if name:
                array, given = np.empty(shape, dtype), None
                if out is not None and name in out:
                    given = out[name]
                    array = output_array(given, name, array)
                memory[i] = array
                self._layout.place(i, quick_address(array))
                returned.append(given if isinstance(given, HostBuffer) else array)
            else:
                given = inputs[self._plan.values[root].name]
                returned.append(given if isinstance(given, HostBuffer) else memory[root])
        return memory, tuple(returned)

    def _plain_inputs(self, inputs: Mapping[str, Array | Buffer]) -> dict[int, Array] | None:
        """The arrays when nothing has to be checked, copied or sized, which is what happens in a loop; otherwise None."""
        if self._layout.dims is None or len(inputs) != len(self._input_specs):
            return None
        memory: dict[int, Array] = {}
        for i, name, dtype, shape, donated in self._input_specs:
            given = inputs.get(name)
            array = given.array if type(given) is HostBuffer else None if donated else given
            if type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype:
                return None
            flags = array.flags
            if not (flags.c_contiguous and flags.aligned):
                return None
            memory[i] = array
        return memory

    def _checked_inputs(self, inputs: Mapping[str, Array | Buffer]) -> dict[int, Array]:
        arrays, dims = bind_inputs(self._plan, inputs)
        for i, array in arrays.items():
            value = self._plan.values[i]
            if value.donated and not isinstance(inputs[value.name], HostBuffer):
                arrays[i] = array.copy(order="C")
            elif not array.flags.c_contiguous or not array.flags.aligned:
                arrays[i] = np.array(array, order="C")
        self._resize(dims)
        return arrays

    def _check_turn(self) -> None:
        """Raises UsageError within a Python step: the run that it belongs to goes on with the same memory."""
        if self._in_python:
            raise UsageError("an executable cannot be run by a kernel of its own")

    def _execute(self, memory: Mapping[int, Array]) -> None:
        for segment in self._segments:
            if isinstance(segment, int):
                self._run_python(segment, memory)
            else:
                self._team.run(self._table, *segment)

    @staticmethod
    def _timed(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    # --- Python steps ---

    def _run_python(self, index: int, memory: Mapping[int, Array]) -> None:
        step, kernel = self._plan.steps[index], self._kernels[index].kernel
        assert isinstance(kernel, PythonKernel)
        operands = [
            None
            if v is None
            else self._constants[index, k]
            if (index, k) in self._constants
            else self._layout.view(v, memory)
            for k, v in enumerate(step.operands)
        ]
        results = [self._layout.view(v, memory) for v in step.results]
        self._in_python = True
        try:
            kernel.call(operands, results)
        finally:
            self._in_python = False


_executables: weakref.WeakSet[CpuExecutable] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child, which has none of the threads that had their turn."""
    for executable in _executables:
        executable._lock, executable._in_python = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
