"""Where the values of a plan are on the GPU: inputs, the arena, outputs and scratch, a buffer each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import to_numpy
from kernelforge_metal.encoder import Encoder, Region
from kernelforge_metal.kernel import HostKernel, size_of

if TYPE_CHECKING:
    from kernelforge.plan import Plan
    from kernelforge_metal.device import CompiledKernel
    from kernelforge_metal.inputs import Given, Spec
    from kernelforge_metal.native import Gpu

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = 1 << 16
"""Bytes up to which inputs are gathered on the host to be sent with one call."""


class Layout:
    """Memory for the largest sizes seen so far: bindings cover it all, so that they stay when sizes shrink."""

    def __init__(self, plan: Plan, kernels: Sequence[CompiledKernel], gpu: Gpu) -> None:
        self._plan, self._kernels, self._gpu = plan, kernels, gpu
        self._bounds: dict[str, int] | None = None
        self._regions: dict[int, Region] = {}
        self._scratch: dict[tuple[int, int], Region] = {}
        self._output_ids = [i for i in plan.outputs if plan.values[i].place == "output"]

    def fit(self, dims: Mapping[str, int]) -> bool:
        """Make room for these sizes. Whether anything moved."""
        known = self._bounds if self._bounds is not None else dict(self._plan.max_dims)
        grown = {d: max(n, known.get(d, 0)) for d, n in dims.items()}
        if grown == self._bounds:
            return False
        self._bounds, self._regions, self._scratch = None, {}, {}  # as long as memory may run out
        packed = self._plan.pack(grown, alignment=self._gpu.alignment)
        if packed.offsets:
            arena = self._gpu.allocate(packed.nbytes, "intermediate values")
            for value, offset in packed.offsets.items():
                self._regions[value] = Region(arena, offset, self._padded(value, grown))
        sent = [i for i in self._plan.inputs if not self._plan.values[i].donated]
        self._inputs, self._input_bytes = self._row(sent, grown, "inputs")
        self._outputs, self._output_bytes = self._row(self._output_ids, grown, "outputs")
        self._readable = self._gpu.queue.readable(self._output_bytes) if self._output_ids else None
        self._staging = np.zeros(min(self._input_bytes, SMALL), np.uint8)
        self._place_scratch(grown)
        self._bounds = grown
        return True

    def _padded(self, value: int, dims: Mapping[str, int]) -> int:
        return max(16, -(-self._plan.values[value].type.nbytes(dims) // 16) * 16)

    def _row(self, values: Sequence[int], dims: Mapping[str, int], what: str) -> tuple[dict[int, int], int]:
        """Place values one after the other in a buffer of their own; their offsets and the bytes in use."""
        offsets: dict[int, int] = {}
        used = 0
        for value in values:
            offsets[value] = used
            used += -(-self._padded(value, dims) // self._gpu.alignment) * self._gpu.alignment
        if values:
            buffer = self._gpu.allocate(used, what)
            for value, offset in offsets.items():
                self._regions[value] = Region(buffer, offset, self._padded(value, dims))
        return offsets, used

    def _place_scratch(self, dims: Mapping[str, int]) -> None:
        """All steps use the same memory: they run one after the other."""
        needs: dict[tuple[int, int], tuple[int, int]] = {}
        largest = 0
        for i, (step, compiled) in enumerate(zip(self._plan.steps, self._kernels, strict=True)):
            if isinstance(compiled.kernel, HostKernel):
                continue
            used = 0
            for k, size in enumerate(compiled.kernel.scratch):
                nbytes = max(16, size_of(size, [dims[d] for d in step.dims]))
                needs[i, k] = used, -(-nbytes // 16) * 16
                used += -(-nbytes // 256) * 256
            largest = max(largest, used)
        if needs:
            buffer = self._gpu.allocate(largest, "scratch memory")
            self._scratch = {key: Region(buffer, start, nbytes) for key, (start, nbytes) in needs.items()}

    def scratch(self, step: int, number: int) -> Region:
        return self._scratch[step, number]

    def region(self, root: int, given: Given) -> Region:
        """The memory of a value that is no view."""
        buffer = given.buffers.get(root)
        return buffer.region if buffer is not None else self._regions[root]

    # --- to and from the host ---

    def outputs(self, dims: Mapping[str, int]) -> dict[str, tuple[int, Spec]]:
        """Value id, shape and dtype of each output that is no donated input, by name."""
        values = [(i, self._plan.values[i]) for i in self._output_ids]
        return {v.name: (i, (v.type.array_shape(dims), to_numpy(v.type.dtype))) for i, v in values}

    def send(self, arrays: Mapping[int, Array]) -> None:
        """Write the inputs. A strided array is made contiguous."""
        small = self._input_bytes <= SMALL
        staged = -1
        for i, array in arrays.items():
            if not array.size:
                continue
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            if small and i in self._inputs:
                start = self._inputs[staged := i]
                self._staging[start : start + raw.size] = raw
            else:
                if i not in self._regions:  # donated, and not given as a buffer
                    nbytes = self._padded(i, self._bounds or {})
                    self._regions[i] = Region(self._gpu.allocate(nbytes, "an input"), 0, nbytes)
                region = self._regions[i]
                self._gpu.queue.upload(region.buffer, region.offset, raw)
        if staged >= 0:
            self._gpu.queue.upload(self._regions[staged].buffer, 0, self._staging)

    def copies_outputs(self, given: Given) -> bool:
        """Whether any is read back."""
        start, end = self._read_range(given)
        return end > start

    def copy_outputs(self, encoder: Encoder, given: Given) -> None:
        """Encode the copy of the outputs to where `read` takes them from."""
        start, end = self._read_range(given)
        if end > start:
            buffer = self._regions[self._output_ids[0]].buffer
            encoder.copy(Region(buffer, start, end - start), self._readable)

    def _read_range(self, given: Given) -> tuple[int, int]:
        """The start of the first output that is read back, the end of the last."""
        wanted = [i for i in self._output_ids if i not in given.buffers]
        if not wanted:
            return 0, 0
        return self._outputs[wanted[0]], self._outputs[wanted[-1]] + self._plan.values[wanted[-1]].type.nbytes(
            given.dims
        )

    def read(self, given: Given) -> dict[int, Array]:
        """Wait, then the outputs as new arrays, but for those that stay on the GPU: when all do, nothing waits."""
        first, end = self._read_range(given)
        kept = [i for i in self._output_ids if i in given.buffers]
        if end == first and not kept:
            self._gpu.queue.wait()
        data = self._gpu.queue.read(self._readable, end - first) if end > first else np.empty(0, np.uint8)
        made = {}
        for i in self._output_ids:
            if i not in given.buffers:
                t, start = self._plan.values[i].type, self._outputs[i] - first
                nbytes = t.nbytes(given.dims)
                made[i] = data[start : start + nbytes].view(to_numpy(t.dtype)).reshape(t.array_shape(given.dims))
        return made

    def array(self, root: int, given: Given) -> Array:
        """The memory of a value that is no view, read back."""
        t = self._plan.values[root].type
        region = self.region(root, given)
        data = self._gpu.queue.download(Region(region.buffer, region.offset, t.nbytes(given.dims)))
        return data.view(to_numpy(t.dtype)).reshape(t.array_shape(given.dims))
