from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernelforge import interruption
from kernelforge.interruption import ending, held_back, interrupt_on_sigterm, own_interruptions


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """What Python does with Ctrl-C, also when the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    reached: list[str] = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("end of the block")
        reached.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_comes_first() -> None:
    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_done_in_other_threads() -> None:
    ran: list[bool] = []

    def work() -> None:
        with held_back():
            ran.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


def test_without_ctrl_c_nothing_happens() -> None:
    with held_back():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_stays_held_back_after_ctrl_c_as_a_block_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, set_handler = signal.getsignal(signal.SIGINT), signal.signal
    came = iter([True])

    def late(number: int, handler: signal._HANDLER) -> signal._HANDLER:
        if next(came, False):
            raise KeyboardInterrupt
        return set_handler(number, handler)

    monkeypatch.setattr(signal, "signal", late)
    with pytest.raises(KeyboardInterrupt), held_back():
        pytest.fail("the block must not begin")
    assert interruption._holding is None
    assert signal.getsignal(signal.SIGINT) is usual


# SIGTERM.


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background of a shell"])
def sigterm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM as the command has it, which does not hang on what Ctrl-C does."""
    signal.signal(signal.SIGINT, request.param)
    monkeypatch.setattr(interruption, "_terminated", None)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    told: list[int] = []
    monkeypatch.setattr(interruption, "_watch", told.append)  # which would end the process of the tests
    interrupt_on_sigterm()
    yield
    for pipe in (signal.set_wakeup_fd(-1), *told):
        if pipe != -1:
            os.close(pipe)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
def test_sigterm_is_an_interruption_with_a_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "REPEAT_S", math.inf)  # of a machine that is slow between the two
    assert ending() == ("interrupted", 130)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert ending() == ("terminated", 143)
    signal.raise_signal(signal.SIGTERM)  # that of the group
    monkeypatch.setattr(interruption, "REPEAT_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("sigterm")
def test_sigterm_waits_for_the_end_of_the_outermost_block() -> None:
    reached: list[str] = []

    def work() -> None:
        with held_back():
            with held_back():
                signal.raise_signal(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")
        reached.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["inner", "outer"]


@pytest.mark.usefixtures("sigterm")
def test_sigterm_is_not_taken_for_an_interruption_of_a_plugins_own() -> None:
    with pytest.raises(KeyboardInterrupt), own_interruptions():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        interrupt_on_sigterm()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


IN_EXEC = """
import signal, sys
from kernelforge import interruption
interruption.interrupt_on_sigterm()
try:
    exec("signal.raise_signal(signal.SIGTERM)")
except KeyboardInterrupt:
    sys.exit(interruption.ending()[1])
"""


def test_the_exit_code_is_the_same_where_code_of_a_string_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "in_exec.py").write_text(IN_EXEC)
    assert subprocess.run([sys.executable, "-m", "in_exec"], cwd=tmp_path, check=False).returncode == 143


FORKING = """
import os, signal, time
from kernelforge import interruption
interruption.PATIENCE_S = 0.1
interruption.interrupt_on_sigterm()
ready, begun = os.pipe()
if (child := os.fork()) == 0:
    HANDLER
    os.write(begun, b"!")
    time.sleep(30)
    os._exit(0)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
time.sleep(0.5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("handler", "code"), [("", -signal.SIGTERM), ("signal.signal(signal.SIGTERM, lambda *_: os._exit(7))", 7)]
)
def test_sigterm_ends_a_forked_child_alone(handler: str, code: int) -> None:
    script = FORKING.replace("HANDLER", handler)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore:This process", "-c", script], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{code}\n", "")


STUCK = """
import ctypes
from kernelforge import interruption
interruption.PATIENCE_S = 0.1
interruption.interrupt_on_sigterm()
lock, native = ctypes.create_string_buffer(256), ctypes.CDLL(None)
native.pthread_mutex_init(lock, None)
native.pthread_mutex_lock(lock)
with interruption.held_back():  # SIGTERM may come before it is
    print("stuck", flush=True)
    native.pthread_mutex_lock(lock)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no other process can send SIGTERM there")
def test_sigterm_ends_a_process_that_is_stuck_in_native_code() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        process.terminate()
        try:
            assert process.wait(120) == 143
        finally:
            process.kill()
