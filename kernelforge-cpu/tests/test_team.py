"""The compiled driver and its teams: every part once, groups in order, under crowding, concurrency, nesting, forks
and exits.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.machine import probe
from kernelforge_cpu.driver import StepTable, driver, driver_text
from kernelforge_cpu.emit import KernelBuilder, module_text
from kernelforge_cpu.isa import LEVELS, host_target
from kernelforge_cpu.jit import KERNEL, Library, compile_llvm, compile_object, load
from kernelforge_cpu.objects import load_llvm
from kernelforge_cpu.stack import KERNEL_BYTES, start_with_room
from kernelforge_cpu.team import IDLE_SPIN_S, Team, default_threads, get_team

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def library() -> Library:
    """`count`: out[part] += 1. `chain`: out[part] = sum of in[0..parts] + 1, so a step needs every part of the one
    before.
    """
    count = KernelBuilder("count", host_target())
    out = count.buffer(0, "i64").at(count.part)
    out.store(out.load() + 1)
    chain = KernelBuilder("chain", host_target())
    source, out = chain.buffer(0, "i64"), chain.buffer(1, "i64")
    with chain.for_(0, chain.parts, init=[chain.i64(1)]) as loop:
        loop.yield_(loop.values[0] + source.load(loop.i))
    out.store(loop.results[0] % 1_000_003, chain.part)
    return load([compile_object(module_text(count, chain))])


def table(
    functions: Sequence[int],
    buffers: Sequence[Sequence[Array]],
    parts: Sequence[int],
    barriers: Sequence[bool] | None = None,
) -> StepTable:
    flat = [b.ctypes.data for row in buffers for b in row]
    starts = np.cumsum([0, *(len(row) for row in buffers)])[:-1].tolist()
    n = len(functions)
    made = StepTable(
        functions,
        starts,
        np.array(flat, np.uint64),
        [0] * n,
        np.zeros(1, np.int64),
        barriers or [True] * n,
        keep=buffers,
    )
    for i, p in enumerate(parts):
        made.set_parts(i, p)
    return made


def test_threads_that_begin_together_run_one_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers stay in the code of the one that they started with: another one's would be unloaded under them."""
    found: list[object] = []
    start = threading.Barrier(3, timeout=60)

    def slow(text: str) -> Library:
        time.sleep(0.05)
        return load_llvm(text)

    monkeypatch.setattr("kernelforge_cpu.objects.load_llvm", slow)

    def ask() -> None:
        start.wait()
        found.append(driver())

    kept = driver()  # which teams of other tests run: it comes back at the end
    monkeypatch.setattr(driver, "_made", [])
    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 3
    assert len({id(kept), *map(id, found)}) == 2


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_part_runs_once_and_repeats_repeat(library: Library, threads: int) -> None:
    parts = [1, 2, 3, 64, 0, 7]
    outs = [np.zeros(64, np.int64) for _ in parts]
    steps = table([library.address("count")] * len(parts), [[o] for o in outs], parts)
    team = get_team(threads)
    for _ in range(100):
        team.run(steps, repeats=3)
    for out, p in zip(outs, parts, strict=True):
        assert out.tolist() == [300] * p + [0] * (64 - p)
    team.run(steps, 1, 3)
    assert [int(o.max()) for o in outs] == [300, 301, 301, 300, 0, 300]
    team.run(steps, 2, 2)
    assert int(outs[2].max()) == 301


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_step_sees_all_of_the_step_before_it(library: Library, threads: int) -> None:
    """500 steps, each of which reads every part's result of the step before: one early start shows in the end."""
    parts, depth = 6, 500
    rows = [np.zeros(parts, np.int64) for _ in range(depth + 1)]
    steps = table([library.address("chain")] * depth, [[rows[i], rows[i + 1]] for i in range(depth)], [parts] * depth)
    get_team(threads).run(steps, repeats=5)
    want = 0
    for _ in range(depth):
        want = (parts * want + 1) % 1_000_003
    assert rows[-1].tolist() == [want] * parts


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_steps_without_barrier_form_one_group(library: Library, threads: int) -> None:
    """Two independent chains side by side: each pair of steps is a group, the next pair needs both."""
    parts, depth = 3, 200
    left = [np.zeros(parts, np.int64) for _ in range(depth + 1)]
    right = [np.zeros(parts, np.int64) for _ in range(depth + 1)]
    buffers = [row for i in range(depth) for row in ([left[i], right[i + 1]], [right[i], left[i + 1]])]
    steps = table([library.address("chain")] * (2 * depth), buffers, [parts] * (2 * depth), [True, False] * depth)
    get_team(threads).run(steps)
    want = 0
    for _ in range(depth):
        want = (parts * want + 1) % 1_000_003
    assert left[-1].tolist() == right[-1].tolist() == [want] * parts


def callback(write: Callable[[int, int], object]) -> tuple[Any, int]:
    """A Python function as a kernel: the object to keep and its address."""

    def kernel(buffers: int, dims: int, part: int, parts: int) -> None:
        write(part, parts)

    made = KERNEL(kernel)
    return made, ctypes.cast(made, ctypes.c_void_p).value or 0


@pytest.mark.parametrize("threads", [2, 3])
def test_all_threads_take_part(threads: int) -> None:
    seen: set[int] = set()
    meet = threading.Barrier(threads, timeout=60)

    def write(part: int, parts: int) -> None:
        seen.add(threading.get_ident())
        meet.wait()  # only passes when as many threads are in here at once

    kept, address = callback(write)
    steps = table([address], [[np.zeros(1, np.int64)]], [threads])
    get_team(threads).run(steps)
    assert len(seen) == threads
    assert threading.get_ident() in seen
    del kept


def test_a_group_that_is_not_worth_sharing_is_done_by_one_thread(library: Library) -> None:
    """Steps of one part each, side by side: the thread that finished the step before goes on with them."""
    seen: list[int] = []
    kept, address = callback(lambda part, parts: seen.append(threading.get_ident()))
    out = np.zeros(64, np.int64)
    functions = [library.address("count"), address, address, address, library.address("count")]
    steps = table(functions, [[out]] * 5, [64, 1, 1, 1, 64], [True, True, False, False, True])
    for _ in range(100):
        get_team(3).run(steps)
        assert len(set(seen)) == 1
        assert len(seen) == 3
        seen.clear()
    assert out.tolist() == [200] * 64
    del kept


def test_more_threads_than_cores_do_not_wait_for_each_other(library: Library) -> None:
    """A step that waited for a thread without a core would take a time slice, some milliseconds."""
    depth = 3000
    threads = 3 * probe().logical + 1
    rows = [np.zeros(threads, np.int64) for _ in range(2)]
    buffers = [[rows[i % 2], rows[1 - i % 2]] for i in range(depth)]
    steps = table([library.address("chain")] * depth, buffers, [threads] * depth)
    team = Team(threads)
    team.run(steps)
    best = min(_seconds(lambda: team.run(steps)) for _ in range(3))
    team.close()
    assert best < depth * 1e-3


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_two_teams_run_at_once(library: Library) -> None:
    """Two sessions with thread counts of their own, both with more threads than there are cores together."""
    outs = [np.zeros(9, np.int64) for _ in range(2)]
    runs = 300

    def work(team: Team, out: Array) -> None:
        steps = table([library.address("count")] * 5, [[out]] * 5, [9] * 5)
        for _ in range(runs):
            team.run(steps)

    callers = [threading.Thread(target=work, args=(get_team(n), out)) for n, out in zip((2, 3), outs, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert [o.tolist() for o in outs] == [[5 * runs] * 9] * 2


def test_a_run_inside_a_run_is_done_by_its_thread(library: Library) -> None:
    team = get_team(2)
    out = np.zeros(64, np.int64)
    inner = table([library.address("count")], [[out]], [64])
    kept, address = callback(lambda part, parts: team.run(inner))
    team.run(table([address], [[out]], [8]))
    assert out.tolist() == [8] * 64
    del kept


def test_concurrent_callers_take_turns(library: Library) -> None:
    team, callers, runs = get_team(3), 4, 200
    outs = [np.zeros(5, np.int64) for _ in range(callers)]

    def work(out: Array) -> None:
        steps = table([library.address("count")] * 3, [[out]] * 3, [5] * 3)
        for _ in range(runs):
            team.run(steps)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert [o.tolist() for o in outs] == [[3 * runs] * 5] * callers


def test_parked_workers_burn_nothing_and_wake_up(library: Library) -> None:
    team = get_team(2)
    out = np.zeros(4, np.int64)
    steps = table([library.address("count")], [[out]], [4])
    team.run(steps)
    deadline = time.monotonic() + 30
    while True:  # parked at the latest when a whole interval cost next to nothing
        before = time.process_time()
        time.sleep(20 * IDLE_SPIN_S)
        if time.process_time() - before < IDLE_SPIN_S or time.monotonic() > deadline:
            break
    assert time.monotonic() < deadline
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    for _ in range(20):
        time.sleep(2 * IDLE_SPIN_S)
        team.run(steps)
    assert out.tolist() == [21] * 4


def test_buffers_dims_and_parts_are_patched_in_place() -> None:
    k = KernelBuilder("dims", host_target())
    k.buffer(0, "i64").store(k.dim(1) * 10 + k.parts, k.part)
    library = load([compile_object(k.text())])
    first, second = np.zeros(2, np.int64), np.zeros(3, np.int64)
    pointers, dims = np.array([0, first.ctypes.data], np.uint64), np.array([7, 8, 9], np.int64)
    steps = StepTable([library.address("dims")], [1], pointers, [1], dims, [True], keep=library)
    steps.set_parts(0, 2)
    get_team(2).run(steps)
    assert first.tolist() == [92, 92]
    pointers[1], dims[2] = second.ctypes.data, 5
    steps.set_parts(0, 3)
    assert steps.parts(0) == 3
    get_team(2).run(steps)
    assert (first.tolist(), second.tolist()) == ([92, 92], [53] * 3)


def test_a_closed_team_starts_again(library: Library) -> None:
    out = np.zeros(4, np.int64)
    steps = table([library.address("count")], [[out]], [4])
    team = Team(3)
    for _ in range(3):
        team.run(steps)
        team.close()
    assert out.tolist() == [3] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_a_team_of_its_own(library: Library) -> None:
    team = get_team(2)
    out = np.zeros(4, np.int64)
    steps = table([library.address("count")], [[out]], [4])
    team.run(steps)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            meet, met = threading.Barrier(2, timeout=30), list[int]()
            _kept, address = callback(lambda part, parts: met.append(meet.wait()))  # what it raises is not seen
            team.run(table([address], [[out]], [2]))
            team.run(steps)
            status = 0 if out.tolist() == [2] * 4 and len(met) == 2 else 2  # two only with a live worker
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    team.run(steps)
    assert out.tolist() == [2] * 4


RUNNING = """
import time
import numpy as np
from kernelforge_cpu.driver import StepTable
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.objects import load_objects
from kernelforge_cpu.team import get_team
k = KernelBuilder("count", host_target())
k.buffer(0, "i64").at(k.part).store(1)
library, out = load_objects([k.text()]), np.zeros(8, np.int64)
pointers, dims = np.array([out.ctypes.data], np.uint64), np.zeros(1, np.int64)
steps = StepTable([library.address("count")], [0], pointers, [0], dims, [True])
steps.set_parts(0, 8)
get_team(3).run(steps)
"""


def test_interpreter_exit_ends_the_workers() -> None:
    for pause in ("", "time.sleep(0.05)"):  # spinning and parked
        done = subprocess.run(
            [sys.executable, "-c", RUNNING + pause], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_between_runs_ends_cleanly() -> None:
    endless = RUNNING + "print('ready', flush=True)\nwhile True:\n    get_team(3).run(steps)\n"
    with subprocess.Popen(
        [sys.executable, "-c", endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.strip().endswith("KeyboardInterrupt")


def test_thread_count_is_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERNELFORGE_NUM_THREADS", raising=False)
    assert default_threads() == probe().cores
    monkeypatch.setenv("KERNELFORGE_NUM_THREADS", "3")
    assert default_threads() == 3
    assert get_team() is get_team(3)
    for wrong in ("0", "two", "-1", "1.5", "9999"):
        monkeypatch.setenv("KERNELFORGE_NUM_THREADS", wrong)
        with pytest.raises(UsageError, match=f"KERNELFORGE_NUM_THREADS is '{wrong}'") as caught:
            get_team()
        assert caught.value.hint == "give a whole number from 1 to 1024"
    with pytest.raises(UsageError, match="0 threads"):
        get_team(0)


def test_wrong_tables_and_ranges_are_refused() -> None:
    one, words = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    with pytest.raises(UsageError, match="a step table of 2 functions has 1 buffer lists, 2 dims, 2 barriers"):
        StepTable([1, 1], [0], one, [0, 0], words, [True, True])
    with pytest.raises(UsageError, match="step 1 has no function"):
        StepTable([1, 0], [0, 0], one, [0, 0], words, [True, True])
    with pytest.raises(UsageError, match="pointers must be contiguous uint64, not int64"):
        StepTable([1], [0], words, [0], words, [True])
    with pytest.raises(UsageError, match="dim_values must be contiguous int64"):
        StepTable([1], [0], one, [0], np.zeros(4, np.int64)[::2], [True])
    steps = StepTable([1], [0], one, [0], words, [True])
    with pytest.raises(UsageError, match="step 0 cannot have -1 parts"):
        steps.set_parts(0, -1)
    with pytest.raises(UsageError, match="steps 0 to 2 of a table of 1"):
        get_team(1).run(steps, 0, 2)
    with pytest.raises(UsageError, match="no thread team for architecture 'riscv64'"):
        driver_text("riscv64")


@pytest.mark.parametrize("level", LEVELS)
def test_the_driver_compiles_for_every_level(level: str) -> None:
    assert compile_llvm(driver_text(LEVELS[level].arch), LEVELS[level])


SMALL_STACKS = """
import sys, threading
import numpy as np
from kernelforge.machine import stack_bytes
from kernelforge_cpu.emit import KernelBuilder, module_text
from kernelforge_cpu.isa import host_target
from kernelforge_cpu.jit import compile_object, load
from kernelforge_cpu.driver import StepTable
from kernelforge_cpu.stack import KERNEL_BYTES
from kernelforge_cpu.team import get_team

k = KernelBuilder("deep", host_target())
n = KERNEL_BYTES // 8
memory, out = k.alloca("i64", n), k.buffer(0, "i64")
with k.for_(0, n) as loop:
    memory.store(loop.i + k.part, loop.i)
with k.for_(0, n, init=[k.i64(0)]) as loop:
    loop.yield_(loop.values[0] + memory.load(loop.i))
out.store(loop.results[0], k.part)
library = load([compile_object(module_text(k))])
out = np.zeros(64, np.int64)
table = StepTable([library.address("deep")], [0], np.array([out.ctypes.data], np.uint64), [0], np.zeros(1, np.int64), [True])
table.set_parts(0, 64)
threading.stack_size(128 * 1024)

def run():
    assert stack_bytes() < 256 * 1024, stack_bytes()
    get_team(int(sys.argv[1])).run(table, repeats=20)

thread = threading.Thread(target=run)
thread.start()
thread.join()
assert threading.stack_size() == 128 * 1024
assert out.tolist() == [n * (n - 1) // 2 + n * part for part in range(64)]
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_have_room_on_the_stack_whatever_threads_have(threads: int) -> None:
    subprocess.run([sys.executable, "-c", SMALL_STACKS, str(threads)], check=True, timeout=60)


def test_what_fails_on_the_thread_with_room_is_raised_by_the_caller(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller would go on with results that nobody has written."""

    def none_left(thread: threading.Thread) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("kernelforge_cpu.team.start_with_room", none_left)
    monkeypatch.setattr("kernelforge_cpu.stack.stack_bytes", lambda: 1 << (17 if is_caller() else 23))
    raised: list[str] = []

    def is_caller() -> bool:
        return threading.current_thread() is caller

    def run() -> None:
        with pytest.raises(MemoryError, match="no room"):
            Team(2).run(table([library.address("count")], [[np.zeros(4, np.int64)]], [4]))
        raised.append("by the caller")

    caller = threading.Thread(target=run)
    caller.start()
    caller.join()
    assert raised


def test_a_team_that_gets_fewer_threads_says_so_once_and_works(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers often limit how many there may be."""
    started: list[threading.Thread] = []

    def two_left(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        thread.start()

    monkeypatch.setattr("kernelforge_cpu.team.start_with_room", two_left)
    out = np.zeros(16, np.int64)
    team, steps = Team(7), table([library.address("count")] * 2, [[out]] * 2, [16] * 2)
    with pytest.warns(KernelForgeWarning, match="^3 of 7 threads work: can't start new thread$"):
        team.run(steps)
    for _ in range(50):
        time.sleep(2 * IDLE_SPIN_S)
        team.run(steps)  # without a warning, which would be an error
    assert out.tolist() == [102] * 16
    team.close()
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("stop", [MemoryError, KeyboardInterrupt])
def test_a_start_of_workers_that_stops_half_way_leaves_none_out(
    library: Library, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    asked: list[threading.Thread] = []

    def stopped(thread: threading.Thread) -> None:
        asked.append(thread)
        if len(asked) == 2 and stop is MemoryError:
            raise MemoryError
        start_with_room(thread)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("kernelforge_cpu.team.start_with_room", stopped)
    out = np.zeros(16, np.int64)
    team, steps = Team(4), table([library.address("count")], [[out]], [16])
    with pytest.raises(stop):
        team.run(steps)
    team.run(steps)
    running = [thread for thread in asked if thread.is_alive()]
    assert team._workers == running
    assert len(running) == 3
    team.close()


def test_touching_the_stack_harms_nothing() -> None:
    driver().touch(KERNEL_BYTES)
    driver().touch(0)
