"""Compiling in several processes: same code, whatever becomes of a helper, and none is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernelforge.errors import UsageError
from kernelforge_cpu import helpers, jit
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import host_target

HOST = host_target()


def text(value: int) -> str:
    k = KernelBuilder(f"store{value}", HOST)
    k.buffer(0, "i64").store(value)
    return k.text()


TEXTS = [text(value) for value in range(6)]


@pytest.fixture(autouse=True)
def no_spare() -> Iterator[None]:
    helpers._end_spare()
    yield
    helpers._end_spare()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "helper_count", lambda texts, threads: 2)


def compiled(texts: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    helpers.compile_each(texts, HOST, found.__setitem__, threads=3)
    return found


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 120
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_a_helper_compiles_the_same_code_and_helps_again() -> None:
    pids = set()
    for texts in (TEXTS[:4], TEXTS[4:]):
        done: deque[tuple[str, bytes]] = deque()
        helper = helpers.Helper(deque(texts), done, HOST)
        helper.thread.join()
        helper.stop()
        assert dict(done) == {t: jit.compile_object(t) for t in texts}
        (spare,) = helpers._spare
        assert spare.poll() is None
        pids.add(spare.pid)
    assert len(pids) == 1


@pytest.mark.usefixtures("two")
def test_every_text_is_compiled_once() -> None:
    kept: list[str] = []
    helpers.compile_each(TEXTS, HOST, lambda t, code: kept.append(t), threads=3)
    assert sorted(kept) == sorted(TEXTS)
    assert compiled(TEXTS) == {t: jit.compile_object(t) for t in TEXTS}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    "boot",
    [
        "import os; os._exit(3)",
        "import pickle, sys; pickle.load(sys.stdin.buffer)",
        "print('hello' * 99)",
        "import time; time.sleep(1000)",
    ],
    ids=["ends at once", "takes a text and ends", "talks", "hangs"],
)
def test_what_a_helper_does_not_deliver_is_compiled_here(monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = helpers._start

    def noted() -> subprocess.Popen[bytes] | None:
        process = start()
        assert process is not None
        started.append(process)
        return process

    monkeypatch.setattr(helpers, "_start", noted)
    monkeypatch.setattr(helpers, "BOOT", boot)
    monkeypatch.setattr(helpers, "PATIENCE_S", 0.2)
    assert compiled(TEXTS) == {t: jit.compile_object(t) for t in TEXTS}
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
    assert not helpers._spare


@pytest.mark.usefixtures("two")
def test_without_threads_to_feed_helpers_all_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = helpers._start

    def noted() -> subprocess.Popen[bytes] | None:
        process = start()
        assert process is not None
        started.append(process)
        return process

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers, "_start", noted)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert set(compiled(TEXTS)) == set(TEXTS)
    (process,) = started
    assert process.poll() is not None


@pytest.mark.usefixtures("two")
def test_a_helper_that_cannot_be_started_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert compiled(TEXTS) == {t: jit.compile_object(t) for t in TEXTS}


@pytest.mark.usefixtures("two")
def test_a_text_that_does_not_compile_is_named_by_the_caller() -> None:
    with pytest.raises(UsageError, match="MLIR does not accept the module"):
        compiled([*TEXTS, "func.func @f("])


@pytest.mark.usefixtures("two")
def test_an_interruption_ends_helpers_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "BOOT", "import time; time.sleep(1000)")

    def interrupted(text: str, code: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        helpers.compile_each(TEXTS, HOST, interrupted, threads=3)
    assert not helpers._spare


def test_helpers_are_for_much_text_and_spare_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "probe", lambda: SimpleNamespace(cores=8))
    much = ["x" * helpers.TEXT_PER_PROCESS * 2 + str(i) for i in range(8)]
    assert helpers.helper_count(much, 8) == helpers.MOST_HELPERS
    assert helpers.helper_count(much, 2) == 1
    assert helpers.helper_count(much, 1) == 0
    assert helpers.helper_count(much[:1], 8) == 0
    assert helpers.helper_count(TEXTS, 8) == 0
    monkeypatch.setattr(helpers, "probe", lambda: SimpleNamespace(cores=1))
    assert helpers.helper_count(much, 8) == 0
    monkeypatch.setattr(helpers, "probe", lambda: SimpleNamespace(cores=8))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert helpers.helper_count(much, 8) == 0


SCRIPT = """
import sys, time
from collections import deque
from kernelforge_cpu import helpers
from kernelforge_cpu.isa import host_target
helper = helpers.Helper(deque(sys.argv[1:2]), deque(), host_target())
helper.thread.join()
helper.stop()
print(helpers._spare[0].pid, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by its number as POSIX does")
def test_no_helper_outlives_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, text(1)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    assert not is_running(int(done.stdout))


BUSY = """
import pathlib, sys, time
from collections import deque
from kernelforge_cpu import helpers
from kernelforge_cpu.isa import host_target
begun = pathlib.Path(sys.argv[2])
stuck = f"from kernelforge_cpu import jit; jit.compile_object = lambda *_, **__: (open({str(begun)!r}, 'w'), time.sleep(1000))"
helpers.BOOT = helpers.BOOT.replace("serve()", f"import time; {stuck}; serve()")
helper = helpers.Helper(deque(sys.argv[1:2]), deque(), host_target())
while not begun.exists():
    time.sleep(0.01)
print(helper._process.pid, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by its number as POSIX does")
@pytest.mark.parametrize("script", [SCRIPT, BUSY], ids=["idle", "busy"])
def test_a_helper_ends_when_its_process_is_killed(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", script + "time.sleep(1000)", text(1), str(tmp_path / "begun")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.send_signal(signal.SIGKILL)
    assert ends(pid)


def test_an_idle_helper_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "BOOT", helpers.BOOT.replace("serve()", "serve.__globals__['IDLE_S'] = 0.1; serve()"))
    process = helpers._start()
    assert process is not None
    assert process.wait(60) == 0
    helpers._spare.append(process)
    assert helpers._spare_one() is None
    assert not helpers._spare


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_leaves_its_parents_helpers_alone() -> None:
    process = helpers._start()
    assert process is not None
    helpers._spare.append(process)
    child = os.fork()
    if child == 0:
        os._exit(len(helpers._spare))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert helpers._spare == [process]
    assert process.poll() is None
