"""Streams of dispatches that are recorded again and again: by the compiled loop as by Python."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest

from kernelforge.errors import DeviceError, KernelForgeWarning
from kernelforge.graph import Graph
from kernelforge.session import Session
from kernelforge_metal import recorder
from kernelforge_metal.executable import GpuExecutable
from kernelforge_metal.recorder import OFTEN, Recorder, Stream
from kernelforge_metal.recorder import _compile as compiled

Array = np.ndarray[Any, np.dtype[Any]]


def several_ops(session: Session) -> GpuExecutable:
    """Pipelines that change and stay, and sizes that are parameters."""
    g = Graph()
    x, y = (g.input(name, ("n", 40), "f32") for name in ("x", "y"))
    total = x + y
    g.output(g.silu(total + x) + y, "out")
    g.output(g.softmax(total), "shares")
    made = session.compile(g.text())
    assert isinstance(made, GpuExecutable)
    return made


def check(executable: GpuExecutable, rows: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, rows, 40)).astype(np.float32)
    out, shares = (np.asarray(found) for found in executable.run({"x": x, "y": y}))
    total = 2 * x + y
    np.testing.assert_allclose(out, total / (1 + np.exp(-total)) + y, rtol=1e-5, atol=1e-5)
    powers = np.exp(x + y)
    np.testing.assert_allclose(shares, powers / powers.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-6)


def stream_of(executable: GpuExecutable) -> Stream:
    (bound,) = vars(executable)["_bound"].values()
    (stream,) = bound.segments
    assert isinstance(stream, Stream)
    return stream


@pytest.mark.parametrize("fixture", ["gpu", "plain_gpu"])
def test_a_stream_that_is_recorded_often_is_walked_by_compiled_code(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    executable = several_ops(request.getfixturevalue(fixture))
    for seed in range(OFTEN + 4):
        check(executable, 3, seed)
    assert stream_of(executable).numbers is not None
    for rows in (70, 2):  # other grids; not more parameters
        check(executable, rows, rows)
        assert stream_of(executable).numbers is None
        for seed in range(OFTEN + 4):
            check(executable, rows, seed)
        assert stream_of(executable).numbers is not None


def test_python_records_where_nothing_can_be_compiled(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> object:
        raise RuntimeError("no memory may be executed")

    monkeypatch.setattr(recorder, "_compile", refuse)
    monkeypatch.setattr(gpu.device.gpu.queue, "_recorder", Recorder())  # type: ignore[attr-defined]  # of a GPU
    executable = several_ops(gpu)
    for seed in range(OFTEN - 1):  # one run is recorded ahead
        check(executable, 3, seed)
    with pytest.warns(KernelForgeWarning, match="cannot be compiled: Python records it, slower: no memory may be"):
        check(executable, 3, 1)
    for seed in range(4):
        check(executable, 3, seed)


def test_an_encoder_that_cannot_be_made_is_one_error(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> object:
        raise RuntimeError("no more encoders")

    said: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    queue, recorder = gpu.device.gpu.queue, Recorder()  # type: ignore[attr-defined]  # of a GPU
    recorder.libf = SimpleNamespace(wgpuDeviceCreateCommandEncoder=refuse)
    monkeypatch.setattr(queue, "_recorder", recorder)
    with pytest.raises(DeviceError, match="no more encoders"):
        queue.encoder()
    gc.collect()
    assert not said


def test_code_for_windows_is_in_the_object_format_that_llvm_links(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    made = llvm.create_mcjit_compiler

    def watched(module: Any, machine: Any) -> Any:
        found.append(machine.triple)
        return made(module, machine)

    monkeypatch.setattr(llvm, "create_mcjit_compiler", watched)
    monkeypatch.setattr("sys.platform", "win32")
    assert compiled("define void @record() { ret void }").get_function_address("record")
    assert found[0].endswith("-elf")
