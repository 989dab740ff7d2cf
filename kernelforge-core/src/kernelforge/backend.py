"""What a backend implements: devices, buffers and executables. Structural types; nothing here needs to be inherited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kernelforge.errors import PluginError
from kernelforge.variant import DeviceInfo

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.explanation import Explanation
    from kernelforge.op import OpDef
    from kernelforge.plan import Plan
    from kernelforge.variant import KernelVariant

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Timing:
    """Measured seconds of repeated runs. A sample that is not positive is refused: no path can report 0.0 ms."""

    samples: tuple[float, ...]
    """Seconds of one run, one entry a repeat."""
    source: str
    """How they were taken: "host-clock", "timestamp-query", "host-slope"."""

    def __post_init__(self) -> None:
        if not self.samples or min(self.samples) <= 0.0:
            raise PluginError(f"a timing needs positive samples, got {self.samples}")


@runtime_checkable
class TensorSource(Protocol):
    """Named constant tensors, read when they are needed: a checkpoint, random weights, a dict of arrays."""

    def names(self) -> Sequence[str]: ...

    def tensor(self, name: str) -> Array:
        """The array, read-only. Raises AssetError for an unknown name."""
        ...


@runtime_checkable
class PackedSource(TensorSource, Protocol):
    """A source that also holds constants in the layouts that kernels read, so that they need not be made again."""

    def packed(self, constant: str, layout: str, nbytes: int) -> Array | None:
        """The bytes of a constant (`kernelforge.constant`, its key) in a layout (a backend's name for it), C-contiguous and
        64-byte aligned; None when the source does not have exactly so many."""
        ...

    def keep(self, constant: str, layout: str, array: Array) -> Array:
        """What was packed because `packed` did not have it. Returns the array to be used: a source that writes it down may
        return its own."""
        ...


class Catalog(Protocol):
    """Ops and kernel variants by name; the plugin registry is one."""

    @property
    def ops(self) -> Mapping[str, OpDef]:
        """By full name."""
        ...

    def variant(self, target: str, op: str, name: str) -> KernelVariant:
        """Raises UsageError when there is none of that name."""
        ...


class Buffer(Protocol):
    """Memory on a device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def numpy(self) -> Array:
        """The contents as an array on the host."""
        ...

    def fetch(self, *index: int) -> Callable[[], Array]:
        """The contents, or their part at `index` of the first axes, as all that was run so far leaves them, taken to the host
        meanwhile: the first call of the result waits for them, not for what is run later."""
        ...

    def write(self, array: Array) -> None:
        """Replace the contents. Raises UsageError when shape or dtype differ."""
        ...


class Executable(Protocol):
    """A compiled plan."""

    @property
    def plan(self) -> Plan: ...

    def run(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> tuple[Array | Buffer, ...]:
        """Run once. `inputs` by name, any strides; a Buffer is read where it is, a donated one is updated in place. `out`
        names arrays (C-contiguous) and Buffers that outputs are written to; the others are new arrays. A Buffer of `out` is
        no input of the same run.

        Returns the outputs in the function's order: arrays, the Buffer of `out`, or the Buffer itself for an output that is
        a donated input. When all of them are Buffers, the run need not be over yet: reading one waits for it, and so the
        output of one run can be the input of the next before the host has seen it (`ASYNCHRONOUS` of
        `kernelforge.variant`). Raises UsageError for a missing or unknown name, or a shape or dtype that does not fit.
        """
        ...

    def bind(
        self, inputs: Mapping[str, Array | Buffer], out: Mapping[str, Array | Buffer] | None = None
    ) -> Callable[[], tuple[Array | Buffer, ...]]:
        """`run`, checked once and not yet done: each call of the result runs on the same memory, inputs as they are then,
        and returns the same outputs, overwritten. For loops in which a dispatch must cost little. Raises as `run` does."""
        ...

    def measure(self, inputs: Mapping[str, Array | Buffer], *, repeats: int) -> Timing:
        """Run `repeats` times back to back and time each run, without the cost of moving inputs and outputs."""
        ...

    def explain(self, inputs: Mapping[str, Array | Buffer] | None = None, *, repeats: int = 9) -> Explanation:
        """What runs each step and where it comes from. With `inputs` the steps are timed, too: medians of `repeats`
        runs of the whole after one that does not count. Donated inputs are written, as by `run`."""
        ...


class Device(Protocol):
    """An opened device."""

    @property
    def info(self) -> DeviceInfo: ...

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A zeroed buffer."""
        ...

    def compile(self, plan: Plan, constants: TensorSource, catalog: Catalog) -> Executable:
        """Build every kernel of the plan, pack its constants. Packed constants are shared between executables that are
        compiled with the same `constants` object."""
        ...

    def emit_llvm(self, plan: Plan, catalog: Catalog) -> str:
        """The LLVM IR of the plan's kernels, to be read. Raises UsageError when its kernels are no LLVM IR."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A target: what `BackendSpec.load` resolves to (an instance, or a class without arguments)."""

    def devices(self) -> Sequence[DeviceInfo]:
        """The devices that are here; empty when there is none."""
        ...

    def open(self, device: str | None = None, *, threads: int | None = None) -> Device:
        """Open a device by name or the default one. Raises DeviceError when there is none, UsageError for a bad name."""
        ...
