"""What the dispatches of a plan are told of sizes and offsets, and how many workgroups each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge_metal.encoder import Region
from kernelforge_metal.kernel import HostKernel, is_value, size_of

if TYPE_CHECKING:
    from kernelforge.plan import Plan
    from kernelforge_metal.device import CompiledKernel
    from kernelforge_metal.native import Gpu

    Array = np.ndarray[Any, np.dtype[Any]]


class Parameters:
    """The numbers of all dispatches in a row: commands point into it, or, on devices without immediates, at their place in a
    buffer of uniforms."""

    def __init__(self, plan: Plan, kernels: Sequence[CompiledKernel], gpu: Gpu) -> None:
        self._plan, self._kernels, self._gpu = plan, kernels, gpu
        self.grids: list[list[tuple[int, int, int]]] = []
        """By step and dispatch."""
        self._starts: list[list[tuple[int, int]]] = []
        self._words = np.zeros(1, np.uint32)
        self._uniforms: tuple[Any, Any] | None = None

    def resize(self, dims: Mapping[str, int]) -> bool:
        """Write them for these sizes. Whether commands must be made anew, for what they point into has moved."""
        words: list[int] = []
        self._starts, self.grids = [], []
        for step, compiled in zip(self._plan.steps, self._kernels, strict=True):
            starts: list[tuple[int, int]] = []
            grids: list[tuple[int, int, int]] = []
            self._starts.append(starts)
            self.grids.append(grids)
            if isinstance(compiled.kernel, HostKernel):
                continue
            sizes = [dims[d] for d in step.dims]
            for dispatch, pipeline in zip(compiled.kernel.dispatches, compiled.pipelines, strict=True):
                values = [*sizes, *(size_of(size, sizes) for _, size in dispatch.parameters)]
                for b in dispatch.bindings if pipeline.parameter_bytes else ():
                    if is_value(step.problem, b.index):
                        value = (*step.operands, *step.results)[b.index]
                        assert value is not None
                        values.append(self._plan.values[value].offset)
                starts.append((len(words), 4 * len(values)))
                words += values + [0] * (-len(values) % (1 if self._gpu.immediates else 64))
                grids.append(dispatch.grid(sizes))
        fresh = np.array(words or [0], np.uint32)
        if not self._gpu.immediates and words:
            self._write_uniforms(fresh)
        moved = len(self._words) != len(fresh)
        if moved:
            self._words = fresh
        else:
            self._words[:] = fresh
        return moved

    def _write_uniforms(self, words: Array) -> None:
        if self._uniforms is None or self._uniforms[0].size < words.nbytes:
            buffer = self._gpu.allocate(words.nbytes + 256, "parameters")
            group = self._gpu.bind_group(self._gpu.uniform_layout, [Region(buffer, 0, 128)])
            self._uniforms = (buffer, group)
        self._gpu.queue.upload(self._uniforms[0], 0, words)

    @property
    def uniform_group(self) -> Any:
        """The C handle of the bind group of uniforms, on devices without immediates."""
        return None if self._uniforms is None else self._uniforms[1]._internal

    def of(self, step: int, dispatch: int) -> tuple[Any, int, int]:
        """The address of a dispatch's own, None where it has none; their bytes; and where they begin in the row, in bytes."""
        start, nbytes = self._starts[step][dispatch]
        return self._gpu.pointer(self._words[start:]) if nbytes else None, nbytes, 4 * start

    @property
    def memory(self) -> tuple[Any, ...]:
        """What must live as long as commands that were made of `of`."""
        return self._words, self._uniforms
