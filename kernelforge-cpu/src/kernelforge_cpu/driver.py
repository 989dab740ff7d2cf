"""The table of kernel calls that the compiled driver (driver.ll) runs, and the driver's functions."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from kernelforge.errors import UsageError
from kernelforge.locks import Once
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.jit import Library

Array = np.ndarray[Any, np.dtype[Any]]

FUNCTION, BUFFERS, DIMS, PARTS, BARRIER = range(5)
"""Fields of a step, 64 bits each."""

PAUSE = {
    "x86_64": ("call void @llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()"),
    "aarch64": ("call void @llvm.aarch64.isb(i32 15)", "declare void @llvm.aarch64.isb(i32)"),
}


class StepTable:
    """Kernel calls in order. Pointers, dims and parts may be changed in place between runs, never during one."""

    def __init__(
        self,
        functions: Sequence[int],
        buffers: Sequence[int],
        pointers: Array,
        dims: Sequence[int],
        dim_values: Array,
        barriers: Sequence[bool],
        keep: Any = None,
    ) -> None:
        """One entry a step: `functions` addresses; `buffers` and `dims` where the step's start in `pointers` (uint64)
        and `dim_values` (int64); `barriers` whether it must wait for all steps before it (False: only for those that
        the step before it waits for). `keep` lives as long as the table.

        All steps have one part; see `set_parts`. Raises UsageError for lists of different lengths, a null function,
        and arrays that are not contiguous or of another type.
        """
        n = len(functions)
        if not n == len(buffers) == len(dims) == len(barriers):
            counts = f"{len(buffers)} buffer lists, {len(dims)} dims, {len(barriers)} barriers"
            raise UsageError(f"a step table of {n} functions has {counts}")
        if not all(functions):
            raise UsageError(f"step {list(functions).index(0)} has no function")
        for name, array, dtype in (("pointers", pointers, np.uint64), ("dim_values", dim_values, np.int64)):
            if array.dtype != dtype or not array.flags.c_contiguous:
                raise UsageError(f"{name} must be contiguous {np.dtype(dtype)}, not {array.dtype}")
        self.pointers, self.dim_values, self.keep = pointers, dim_values, keep
        self._steps = np.zeros((n, 5), np.uint64)
        self._steps[:, FUNCTION] = functions
        self._steps[:, BUFFERS] = [pointers.ctypes.data + 8 * i for i in buffers]
        self._steps[:, DIMS] = [dim_values.ctypes.data + 8 * i for i in dims]
        self._steps[:, PARTS] = 1
        self._steps[:, BARRIER] = barriers
        self.address = self._steps.ctypes.data

    def __len__(self) -> int:
        return len(self._steps)

    def set_parts(self, step: int, parts: int) -> None:
        """Into how many parts the step's work is cut; 0 leaves it out. Raises UsageError for a negative number."""
        if parts < 0:
            raise UsageError(f"step {step} cannot have {parts} parts")
        self._steps[step, PARTS] = parts

    def parts(self, step: int) -> int:
        return int(self._steps[step, PARTS])

    def rows(self, first: int, last: int) -> Array:
        """Steps [first, last) as they are now: a copy, int64[last - first, 5]."""
        return self._steps[first:last].copy()


class Driver:
    """The native functions of driver.ll. All release the GIL."""

    def __init__(self, library: Library) -> None:
        self._library = library
        pointer, word = ctypes.c_void_p, ctypes.c_int64

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes.CFUNCTYPE(result, *arguments)(library.address(name))

        self.serial = function("kf_serial", None, pointer, word, word, word)
        self.run = function("kf_run", word, pointer, pointer, word, word, word)
        self.finish = function("kf_finish", None, pointer)
        self.work = function("kf_work", word, pointer, word)
        self.spin = function("kf_spin", None, word)
        self.touch = function("kf_touch", None, word)
        self.stamp = library.address("kf_stamp_windows" if sys.platform == "win32" else "kf_stamp_posix")
        """Address of a kernel that notes the time; see `stamps`."""


def driver_text(arch: str) -> str:
    """LLVM IR of the driver. Raises UsageError for an architecture without a spin hint."""
    if arch not in PAUSE:
        raise UsageError(f"no thread team for architecture {arch!r}", hint=f"there is one for {', '.join(PAUSE)}")
    call, declaration = PAUSE[arch]
    text = files("kernelforge_cpu").joinpath("driver.ll").read_text(encoding="utf-8")
    return text.replace("  PAUSE\n", f"  {call}\n") + declaration + "\n"


@Once
def driver() -> Driver:
    """The driver for the host, from the object cache or compiled now: one, whose code all workers stay in."""
    from kernelforge_cpu.objects import load_llvm

    return Driver(load_llvm(driver_text(host_target().arch)))
