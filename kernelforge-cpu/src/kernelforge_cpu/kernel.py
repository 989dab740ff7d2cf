"""What a CPU kernel variant builds: native functions, the layouts of its constants, its scratch; or a Python callable.

Every native function has one signature:

    void kernel(void** buffers, int64_t* dims, int64_t part, int64_t parts)

`buffers` holds the operands (null where an optional one is absent), the results, the kernel's tables, then its scratch.
`dims` holds the problem's dynamic dimensions in order of first appearance. A call does part `part` of `parts` of the work:
any `parts` >= 1 must be right, parts run in any order and concurrently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.problem import TensorType

    Array = np.ndarray[Any, np.dtype[Any]]

Count = Callable[[Sequence[int], int], int]
"""`(dims, threads) -> number`: how many parts, or how many bytes, for these dynamic dimensions and this many threads."""


def one_part(dims: Sequence[int], threads: int) -> int:
    """Work too small to share."""
    return 1


def part_per_thread(dims: Sequence[int], threads: int) -> int:
    """Work of which every part costs the same."""
    return threads


def no_scratch(dims: Sequence[int], threads: int) -> int:
    """Of a kernel that needs no memory of its own."""
    return 0


@dataclass(frozen=True)
class Pack:
    """The layout in which a kernel reads a constant operand; done once when compiling, shared by equal keys."""

    key: str
    """Names the layout with everything that shapes it ("panel16:f32"): equal key and equal constant, one packed array."""
    pack: Callable[[Array], Array]
    nbytes: Callable[[TensorType], int] | None = None
    """Bytes of a packed constant of this type, for checking those that come from a file; None: they are not taken."""


@dataclass(frozen=True)
class Phase:
    """One native function of a kernel. All parts of a phase end before the next one starts."""

    function: str | int
    """A symbol of the kernel's MLIR text, or the address of a foreign function with the same signature."""
    parts: Count = part_per_thread


@dataclass(frozen=True)
class NativeKernel:
    """Native code for one problem."""

    phases: tuple[Phase, ...]
    mlir: str | Callable[[], str] = ""
    """A module with the functions that the phases name. Symbols carry a hash of problem and config, so that the kernels of
    one plan may be linked together. Text that takes long to write comes from a function: it is called only when no object is
    known for this problem, config and device. The code of the variant's plugin must decide all else that it writes."""
    packs: Mapping[int, Pack] = field(default_factory=dict)
    """By operand index; only constants can be packed."""
    tables: tuple[Array, ...] = ()
    """Constant buffers of the kernel's own (RoPE cosines)."""
    scratch: Count = no_scratch
    """Bytes of one buffer shared by all parts and phases, 64-byte aligned, undefined when the first phase starts."""
    keep: Any = None
    """Kept alive as long as the kernel (the owner of a foreign address)."""

    @cached_property
    def text(self) -> str:
        """The module, written now if it was not yet."""
        return self.mlir if isinstance(self.mlir, str) else self.mlir()


@dataclass(frozen=True)
class PythonKernel:
    """A Python callable `(operands, results) -> None` on numpy arrays; the step runs on the calling thread, under the GIL.
    Operands cannot be written to. What it raises becomes a PluginError that names the variant's plugin.

    It cannot run the executable that it is part of. On its own thread that is an error. It must not wait for another thread
    that does: that one waits for the end of this run, as any thread that shares the executable may, so no error can be told."""

    call: Callable[[Sequence[Array | None], Sequence[Array]], None]
