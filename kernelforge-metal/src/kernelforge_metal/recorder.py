"""Dispatches on their way into a compute pass.

A call from Python to wgpu costs more than what wgpu then does. A stream that is recorded over and over, as a decoder's steps are,
is therefore written down as numbers that a compiled loop walks over: one call for all its dispatches.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import KernelForgeWarning

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

OFTEN = 32
"""Recordings of a stream after which the loop is compiled: that takes as long as it saves in some hundreds of them. It then
serves all streams that are recorded again."""

FIELDS = 8
"""Of a dispatch in the loop's numbers: pipeline (0 where it stays) and bind group, x and y in one, z, the address and bytes of
its parameters, their offset in the uniform buffer, and one that fills a cache line."""


@dataclass
class Command:
    """One dispatch, ready to be encoded: C handles, and what they refer to."""

    pipeline: Any
    group: Any
    grid: tuple[int, int, int]
    parameters: Any
    """Pointer to the words of its parameters, or NULL."""
    nbytes: int
    """Of its parameters."""
    offset: int
    """Of its parameters in the uniform buffer, on devices without immediates."""
    keep: Any
    """The objects behind the handles."""


@dataclass
class Stream:
    """Dispatches that are recorded together, and again."""

    commands: list[Command]
    times: int = 0
    """They were recorded."""
    numbers: Array | None = field(default=None, repr=False)
    """What the loop walks over, int64 [dispatches, FIELDS]."""

    def changed(self) -> None:
        """Commands are others than before, or their grids."""
        self.times, self.numbers = 0, None


class Recorder:
    """Encodes dispatches for one device."""

    def __init__(self) -> None:
        from wgpu.backends.wgpu_native import _api, ffi, lib

        self.ffi, self.lib, self.libf = ffi, lib, _api.libf
        """wgpu's C functions; those of `libf` raise what goes wrong."""
        self._loop: Any = None
        self._whole: Any = None
        self._engine: Any = None  # keeps the code of both
        self._refused = False

    def encode(self, handle: Any, commands: Sequence[Command] | Stream, uniforms: Any) -> None:
        """Into the compute pass of a C handle. `uniforms`: the C handle of the bind group of parameters, on devices without
        immediates, else None."""
        if not isinstance(commands, Stream):
            self._encode_each(handle, commands, uniforms)
            return
        commands.times += 1
        if self._is_walked(commands):
            self._loop(handle, *self._arguments(commands, uniforms))
        else:
            self._encode_each(handle, commands.commands, uniforms)

    def recording(self, device: Any, stream: Stream, uniforms: Any) -> Callable[[], Any] | None:
        """What makes a whole command buffer of the stream and returns its C handle, for any thread: nearly all of it is one call
        of C. It raises what wgpu raises. None where Python would have to make the calls."""
        if not self._is_walked(stream):
            return None
        arguments, commands = self._arguments(stream, uniforms), stream.commands

        def record() -> Any:
            _ = commands  # kept: the loop has addresses of what they refer to
            return self.ffi.gc(self._whole(device._internal, *arguments), self.lib.wgpuCommandBufferRelease)

        return record

    def _is_walked(self, stream: Stream) -> bool:
        """Whether the loop takes the stream."""
        if stream.times <= (OFTEN if self._loop is None else 1) or not self._compiled():
            return False
        if stream.numbers is None:
            stream.numbers = self._numbers(stream.commands)
        return True

    def _arguments(self, stream: Stream, uniforms: Any) -> tuple[Any, ...]:
        assert stream.numbers is not None
        rows = self.ffi.from_buffer(stream.numbers)  # which it keeps
        return self.ffi.NULL if uniforms is None else uniforms, rows, len(stream.numbers)

    def _encode_each(self, handle: Any, commands: Sequence[Command], uniforms: Any) -> None:
        lib, ffi = self.lib, self.ffi
        set_pipeline, set_group = lib.wgpuComputePassEncoderSetPipeline, lib.wgpuComputePassEncoderSetBindGroup
        set_words, dispatch = lib.wgpuComputePassEncoderSetImmediates, lib.wgpuComputePassEncoderDispatchWorkgroups
        null, current = ffi.NULL, None
        for c in commands:
            if c.pipeline is not current:
                current = c.pipeline
                set_pipeline(handle, current)
            set_group(handle, 0, c.group, 0, null)
            if c.nbytes:
                if uniforms is None:
                    set_words(handle, 0, c.parameters, c.nbytes)
                else:
                    set_group(handle, 1, uniforms, 1, ffi.new("uint32_t[]", [c.offset]))
            dispatch(handle, *c.grid)

    def _numbers(self, commands: Sequence[Command]) -> Array:
        def address(pointer: Any) -> int:
            return 0 if pointer is None else int(self.ffi.cast("intptr_t", pointer))

        found = np.zeros((len(commands), FIELDS), np.int64)
        current = None
        for row, c in zip(found, commands, strict=True):
            x, y, z = c.grid
            pipeline = None if c.pipeline is current else c.pipeline
            parameters = address(c.parameters), c.nbytes, c.offset
            row[:7] = address(pipeline), address(c.group), x | y << 32, z, *parameters
            current = c.pipeline
        return found

    def _compiled(self) -> bool:
        """Whether there is a loop; compiles it at the first call."""
        if self._loop is None and not self._refused:
            try:
                self._engine = _compile(self._text())
            except Exception as error:
                self._refused = True
                text = f"the loop that records the GPU's work cannot be compiled: Python records it, slower: {error}"
                warnings.warn(KernelForgeWarning(text), stacklevel=2)
                return False
            loop, whole = map(self._engine.get_function_address, ("record", "record_whole"))
            self._loop = self.ffi.cast("void (*)(void *, void *, void *, int64_t)", loop)
            native = self.ffi.cast("void *(*)(void *, void *, void *, int64_t)", whole)
            self._whole = self.libf._make_proxy_func("record_whole", native)
        return self._loop is not None

    def _text(self) -> str:
        """The loop, and a whole command buffer made with it, in LLVM IR."""

        def function(name: str) -> str:
            return f"inttoptr (i64 {int(self.ffi.cast('intptr_t', getattr(self.lib, f'wgpu{name}')))} to ptr)"

        calls = ("SetPipeline", "SetBindGroup", "SetImmediates", "DispatchWorkgroups")
        pipeline, group, words, dispatch = (function(f"ComputePassEncoder{name}") for name in calls)
        loads = "\n  ".join(
            f"%at{i} = getelementptr i64, ptr %row, i64 {i}\n  %f{i} = load i64, ptr %at{i}" for i in range(FIELDS - 1)
        )
        return f"""
define void @record(ptr %pass, ptr %uniforms, ptr %rows, i64 %count) {{
entry:
  %immediate = icmp eq ptr %uniforms, null
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %next, %done ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %end
body:
  %row = getelementptr [{FIELDS} x i64], ptr %rows, i64 %i
  {loads}
  %pipeline = inttoptr i64 %f0 to ptr
  %group = inttoptr i64 %f1 to ptr
  %words = inttoptr i64 %f4 to ptr
  %x = trunc i64 %f2 to i32
  %high = lshr i64 %f2, 32
  %y = trunc i64 %high to i32
  %z = trunc i64 %f3 to i32
  %stays = icmp eq i64 %f0, 0
  br i1 %stays, label %bind, label %switch
switch:
  call void {pipeline}(ptr %pass, ptr %pipeline)
  br label %bind
bind:
  call void {group}(ptr %pass, i32 0, ptr %group, i64 0, ptr null)
  %none = icmp eq i64 %f5, 0
  br i1 %none, label %done, label %parameters
parameters:
  br i1 %immediate, label %inline, label %uniform
inline:
  call void {words}(ptr %pass, i32 0, ptr %words, i64 %f5)
  br label %done
uniform:
  call void {group}(ptr %pass, i32 1, ptr %uniforms, i64 1, ptr %at6)
  br label %done
done:
  call void {dispatch}(ptr %pass, i32 %x, i32 %y, i32 %z)
  %next = add i64 %i, 1
  br label %head
end:
  ret void
}}

define ptr @record_whole(ptr %device, ptr %uniforms, ptr %rows, i64 %count) {{
  %encoder = call ptr {function("DeviceCreateCommandEncoder")}(ptr %device, ptr null)
  %pass = call ptr {function("CommandEncoderBeginComputePass")}(ptr %encoder, ptr null)
  call void @record(ptr %pass, ptr %uniforms, ptr %rows, i64 %count)
  call void {function("ComputePassEncoderEnd")}(ptr %pass)
  call void {function("ComputePassEncoderRelease")}(ptr %pass)
  %made = call ptr {function("CommandEncoderFinish")}(ptr %encoder, ptr null)
  call void {function("CommandEncoderRelease")}(ptr %encoder)
  ret ptr %made
}}
"""


def _compile(text: str) -> Any:
    """An engine with the functions of this IR."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_process_triple()
    if sys.platform == "win32":
        module.triple += "-elf"  # LLVM's linker may end the process over Windows' own object files
    machine = llvm.Target.from_triple(module.triple).create_target_machine(opt=2)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine
