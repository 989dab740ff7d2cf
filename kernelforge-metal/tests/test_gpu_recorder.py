"""Streams of dispatches that are recorded again and again: by the compiled loop as by Python."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
    bound, *_ = vars(vars(executable)["_bindings"])["_kept"].values()
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


class Sums:
    """total + x * x, whose result stays on the GPU and is the total of the run after."""

    def __init__(self, session: Session, rows: int) -> None:
        g = Graph()
        total, x = (g.input(name, ("n", 40), "f32") for name in ("total", "x"))
        g.output(total + x * x, "out")
        made = session.compile(g.text())
        assert isinstance(made, GpuExecutable)
        self.executable = made
        self.device = session.device
        self.x = np.random.default_rng(rows).integers(0, 4, (rows, 40)).astype(np.float32)
        self.bind(rows)

    def bind(self, rows: int) -> None:
        """To buffers of this many rows of x."""
        self.buffers = [self.device.allocate((rows, 40), "f32") for _ in range(2)]
        self.calls = [
            self.executable.bind({"total": self.buffers[i], "x": self.x[:rows]}, {"out": self.buffers[1 - i]})
            for i in range(2)
        ]
        self.runs = 0

    def run(self, times: int) -> None:
        for _ in range(times):
            self.calls[self.runs % 2]()
            self.runs += 1

    def check(self) -> None:
        rows = self.buffers[0].shape[0]
        np.testing.assert_array_equal(self.buffers[self.runs % 2].numpy(), self.runs * self.x[:rows] ** 2)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each command buffer that is made by one call."""
    found: list[threading.Thread] = []
    made = Recorder.recording

    def watched(self: Recorder, *args: Any) -> Callable[[], Any] | None:
        call = made(self, *args)

        def record() -> Any:
            assert call is not None
            found.append(threading.current_thread())
            return call()

        return record if call is not None else None

    monkeypatch.setattr(Recorder, "recording", watched)
    return found


@pytest.mark.parametrize("fixture", ["gpu", "plain_gpu"])
def test_a_run_whose_outputs_stay_is_recorded_ahead_by_another_thread(
    fixture: str, request: pytest.FixtureRequest, recorders: list[threading.Thread]
) -> None:
    sums = Sums(request.getfixturevalue(fixture), 5)
    sums.run(2 * OFTEN + 1)
    sums.check()
    ahead = len(recorders)
    sums.run(40)
    sums.check()
    assert abs(len(recorders) - ahead - 40) <= 1  # the last may not have begun
    assert threading.main_thread() not in recorders
    for rows in (3, 5, 2):  # what is under way for other sizes is thrown away
        sums.bind(rows)
        sums.run(9)
        sums.check()


def test_what_goes_wrong_in_that_thread_is_an_error_of_the_run(
    gpu: Session, recorders: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: object) -> object:
        raise RuntimeError("no memory for commands")

    sums = Sums(gpu, 4)
    sums.run(2 * OFTEN + 2)
    recorder = vars(gpu.device.gpu.queue)["_recorder"]  # type: ignore[attr-defined]  # of a GPU
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_whole", lost)
        with pytest.raises(DeviceError, match="cannot record commands: RuntimeError: no memory for commands"):
            sums.run(3)
    sums.run(5)
    sums.check()


def test_ctrl_c_while_a_recording_is_awaited_ends_the_run_alone(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = Sums(gpu, 4)
    sums.run(2 * OFTEN + 2)
    recorder = vars(gpu.device.gpu.queue)["_recorder"]  # type: ignore[attr-defined]  # of a GPU
    made, go_on = vars(recorder)["_whole"], threading.Event()

    def slow(*args: object) -> object:
        assert go_on.wait(60)
        return made(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "_whole", slow)
        main = threading.main_thread().ident
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            sums.run(3)
        go_on.set()
    sums.run(5)
    sums.check()


def test_a_thread_that_outlives_the_main_one_records_by_itself(gpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the main thread ends, so do those of pools."""
    sums = Sums(gpu, 4)
    sums.run(2 * OFTEN + 2)
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(gpu.device.gpu.queue, "_threads", ended)  # type: ignore[attr-defined]  # of a GPU
    sums.run(5)
    sums.check()


def test_wgpu_raises_in_any_thread(gpu: Session) -> None:
    sums = Sums(gpu, 4)
    sums.run(2 * OFTEN + 2)
    stream = stream_of(sums.executable)
    wrong = Stream([replace(c, grid=(1 << 30, 1, 1)) for c in stream.commands], times=stream.times)
    wait = gpu.device.gpu.queue.record(wrong, None)  # type: ignore[attr-defined]  # of a GPU
    with pytest.raises(DeviceError, match="dispatch"):
        wait()


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
