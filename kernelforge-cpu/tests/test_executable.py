"""Compiled plans: memory that comes and goes between runs, bound calls, explanations with times."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge import plan_cache
from kernelforge.bench.dispatch import measure_dispatch
from kernelforge.constant import ArraySource
from kernelforge.errors import PluginError, UsageError
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.passes import DEFAULT
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem, parse_problem
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session
from kernelforge.variant import Config, ConfigSpace, DeviceInfo, KernelVariant
from kernelforge_cpu.authoring import kernel
from kernelforge_cpu.emit import KernelBuilder
from kernelforge_cpu.kernel import NativeKernel, Phase, PythonKernel, one_part
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.store import address, quick_address

Array = np.ndarray[Any, np.dtype[Any]]

ADD = parse_problem("transformer.add(f32[4,16], f32[4,16]) -> (f32[4,16]) {}")


def slow_silu(problem: Problem, config: Config, device: DeviceInfo) -> PythonKernel:
    def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
        (x,) = operands
        assert x is not None
        time.sleep(0.02)
        results[0][...] = x / (1 + np.exp(-x))

    return PythonKernel(call)


def torn(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    return NativeKernel((Phase("f"),), mlir="func.func @f( {")


def counts(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """Has a part for each element, which writes how many there are; not of seven."""

    def parts(dims: Sequence[int], threads: int) -> int:
        if dims[0] == 7:
            raise ValueError("seven")
        return dims[0]

    k = new_kernel(problem, config, device)
    k.buffer(1, "f32").store(k.convert(k.parts, "f32"), k.part)
    return NativeKernel((Phase(k.name, parts),), k.text())


_ended: list[str] = []
"""Parts of `phased`, as they ended."""

FOREIGN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def phased(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    """Two phases in Python, the first of parts that take longer and longer."""

    def first(buffers: int, dims: int, part: int, parts: int) -> None:
        time.sleep(0.01 * part)
        _ended.append("first")

    calls = [FOREIGN(first), FOREIGN(lambda *_: _ended.append("second"))]
    addresses = [ctypes.cast(call, ctypes.c_void_p).value or 0 for call in calls]
    return NativeKernel((Phase(addresses[0], lambda dims, threads: 4), Phase(addresses[1], one_part)), keep=calls)


def tells_config(problem: Problem, config: Config, device: DeviceInfo) -> PythonKernel:
    def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
        results[0][...] = config["number"]

    return PythonKernel(call)


def numbered(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return ConfigSpace((("number", (1, 2, 3)),))


HELD = threading.Lock()
HOLDS = threading.Event()


def holds(problem: Problem, config: Config, device: DeviceInfo) -> PythonKernel:
    """Copies, while nobody has `HELD`."""

    def call(operands: Sequence[Array | None], results: Sequence[Array]) -> None:
        HOLDS.set()
        with HELD:
            results[0][...] = operands[0]

    return PythonKernel(call)


class Plugin:
    @hookimpl
    def kernelforge_kernels(self) -> list[KernelVariant]:
        return [
            KernelVariant("slow", "transformer.silu", "cpu", slow_silu, priority=-1000),
            KernelVariant("counts", "transformer.silu", "cpu", counts, priority=-1000),
            KernelVariant("holds", "transformer.silu", "cpu", holds, priority=-1000),
            KernelVariant("config", "transformer.silu", "cpu", tells_config, space=numbered, priority=-1000),
            KernelVariant("phased", "transformer.silu", "cpu", phased, priority=-1000),
            KernelVariant("torn", "transformer.silu", "cpu", torn, priority=-1000),
            KernelVariant("unfit", "transformer.silu", "cpu", lambda problem, config, device: 7, priority=-1000),
        ]


@pytest.fixture(scope="module", params=[1, 2])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    registry = load_registry(allow=["core", "cpu"], extra_plugins=[Plugin()])
    with Session("cpu", threads=request.param, registry=registry, records=NO_RECORDS) as opened:
        yield opened


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def one(outputs: Sequence[object]) -> Array:
    (out,) = outputs
    assert isinstance(out, np.ndarray)
    return out


def two_layers() -> str:
    """y = silu(x w) w, through memory of the plan's own."""
    g = Graph()
    x, w = g.input("x", ("tokens", 64), "f32"), g.constant("w", (64, 64), "f32")
    g.output(g.matmul(g.silu(g.matmul(x, w)), w), "y")
    return g.text()


W = numbers(64, 64, seed=1) / 8


def expected(x: Array) -> Array:
    h = x @ W
    return np.asarray((h / (1 + np.exp(-h))) @ W)


# Memory.


def test_quick_address_is_the_address() -> None:
    base = np.arange(64, dtype=np.uint8)
    frozen = base.copy()
    frozen.flags.writeable = False
    for array in (base, base[3:], base[::2], base[::-1], base.reshape(8, 8).T, frozen, base[:0], np.zeros(())):
        assert quick_address(array) == address(array)


def test_each_run_reads_the_arrays_that_it_is_given(session: Session) -> None:
    executable = session.compile_problem(ADD)
    for seed in range(20):
        a, b = numbers(4, 16, seed=seed), numbers(4, 16, seed=seed + 100)
        (out,) = executable.run({"a": a, "b": b})
        np.testing.assert_array_equal(out, a + b)
        del a, b
        gc.collect()


def test_memory_that_moves_under_an_array_is_found(session: Session) -> None:
    executable = session.compile_problem(ADD)
    a, b = numbers(4, 16), numbers(4, 16, seed=1)
    executable.run({"a": a, "b": b})
    start = address(a)
    a.resize((4096, 16), refcheck=False)
    keep = [np.zeros_like(b) for _ in range(64)]
    a.resize((4, 16), refcheck=False)
    assert a.shape == (4, 16)
    a[...] = 2.0
    (out,) = executable.run({"a": a, "b": b})
    np.testing.assert_array_equal(out, 2.0 + b)
    assert len(keep) == 64
    assert start


@pytest.mark.parametrize("how", ["strided", "transposed", "unaligned", "readonly", "list"])
def test_inputs_that_are_not_plain(session: Session, how: str) -> None:
    executable = session.compile_problem(ADD)
    plain = numbers(4, 16)
    raw = np.zeros(plain.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(4, 16)
    raw[...] = plain
    frozen = plain.copy()
    frozen.flags.writeable = False
    given = {
        "strided": np.repeat(plain, 2, axis=1)[:, ::2],
        "transposed": np.asfortranarray(plain),
        "unaligned": raw,
        "readonly": frozen,
        "list": plain,
    }[how]
    for _ in range(2):
        executable.run({"a": plain, "b": plain})  # so that the quick way could be taken
        (out,) = executable.run({"a": given, "b": plain})
        np.testing.assert_array_equal(out, 2 * plain)


def test_an_array_that_is_updated_in_place_is_the_callers_own(session: Session) -> None:
    problem = "transformer.kv_cache_update(f32[1,4,1,8], f32[1,1,8], i32[1], i32[1]) -> (f32[1,4,1,8]) {}"
    executable = session.compile_problem(parse_problem(problem))
    cache, new, zero = numbers(1, 4, 1, 8), numbers(1, 1, 8, seed=1), np.zeros(1, np.int32)
    before = cache.copy()
    for _ in range(3):  # also when the quick way could be taken
        (out,) = executable.run({"cache": cache, "new": new, "positions": zero, "slots": zero})
        np.testing.assert_array_equal(np.asarray(out)[0, 0], new[0])
        np.testing.assert_array_equal(cache, before)


def test_each_config_has_a_kernel_of_its_own(session: Session) -> None:
    problem = parse_problem("transformer.silu(f32[4]) -> (f32[4]) {}")
    for number in (1, 2, 3, 1):
        executable = session.compile_problem(problem, variant="config", config={"number": number})
        assert one(executable.run({"x": numbers(4)})).tolist() == [number] * 4


def test_constants_go_with_their_source(session: Session) -> None:
    problem = parse_problem("transformer.add(f32[4,16], f32[4,16]@const) -> (f32[4,16]) {}")
    b = numbers(4, 16)
    known = weakref.ref(b)
    executable = session.compile_problem(problem, constants={"b": b})
    del b
    assert known() is not None
    del executable
    gc.collect()
    assert known() is None


def test_a_phase_begins_when_all_parts_of_the_one_before_have_ended(session: Session) -> None:
    problem = parse_problem("transformer.silu(f32[4]) -> (f32[4]) {}")
    executable = session.compile_problem(problem, variant="phased")
    for _ in range(3):
        _ended.clear()
        executable.run({"x": numbers(4)})
        assert _ended == [*["first"] * 4, "second"]


def test_outputs_in_the_callers_arrays(session: Session) -> None:
    executable = session.compile_problem(ADD)
    a, out = numbers(4, 16), np.empty((4, 16), np.float32)
    (returned,) = executable.run({"a": a, "b": a}, {"out": out})
    assert returned is out
    np.testing.assert_array_equal(out, 2 * a)
    (fresh,) = executable.run({"a": a, "b": a})
    assert fresh is not out
    for wrong in (np.empty((4, 15), np.float32), np.empty((16, 4), np.float32).T, np.empty((4, 16))):
        with pytest.raises(UsageError, match="output 'out' cannot be written to a float"):
            executable.run({"a": a, "b": a}, {"out": wrong})
    with pytest.raises(UsageError, match="output 'out' cannot be written to a list"):
        executable.run({"a": a, "b": a}, {"out": [0.0]})  # type: ignore[dict-item]  # which is the point
    with pytest.raises(UsageError, match="output 'out' cannot be written to a NoneType"):
        executable.run({"a": a, "b": a}, {"out": None})  # type: ignore[dict-item]
    buffer = session.device.allocate((4, 16), "f32")
    with pytest.raises(UsageError, match="a buffer that is in use in the same run"):
        executable.run({"a": buffer, "b": a}, {"out": buffer})
    with pytest.raises(UsageError, match="there is no output 'sum' to write to"):
        executable.run({"a": a, "b": a}, {"sum": out})


# Bound calls.


def test_bound_call_sees_its_inputs_as_they_are(session: Session) -> None:
    a, b = numbers(4, 16), numbers(4, 16, seed=1)
    call = session.compile_problem(ADD).bind({"a": a, "b": b})
    (first,) = call()
    np.testing.assert_array_equal(first, a + b)
    a[...] = 1.0
    (second,) = call()
    assert second is first
    np.testing.assert_array_equal(second, 1.0 + b)


def test_bound_calls_and_runs_take_turns(session: Session) -> None:
    executable = session.compile_problem(ADD)
    arrays = [numbers(4, 16, seed=seed) for seed in range(4)]
    calls = [executable.bind({"a": a, "b": a}) for a in arrays[:3]]
    for i in (0, 1, 0, 2, 2, 1):
        np.testing.assert_array_equal(one(calls[i]()), 2 * arrays[i])
        np.testing.assert_array_equal(one(executable.run({"a": arrays[3], "b": arrays[3]})), 2 * arrays[3])


def test_threads_take_turns_with_an_executable(session: Session) -> None:
    executable = session.compile(two_layers(), constants={"w": W})
    wrong: list[str] = []

    def work(rows: int) -> None:
        x = numbers(rows, 64, seed=rows)
        want = expected(x)
        call = executable.bind({"x": x})
        for i in range(200):
            made = one(call() if i % 2 else executable.run({"x": x}))
            if made.shape != want.shape or not np.allclose(made, want, rtol=1e-4, atol=1e-5):
                wrong.append(f"{rows} rows, run {i}")

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_it_does_not_have(session: Session) -> None:
    problem = parse_problem("transformer.silu(f32[4]) -> (f32[4]) {}")
    executable, x = session.compile_problem(problem, variant="holds"), numbers(4)
    HOLDS.clear()
    with HELD:
        thread = threading.Thread(target=executable.run, args=({"x": x},))
        thread.start()
        HOLDS.wait(60)
        if (child := os.fork()) == 0:
            status = 1
            try:
                HELD.release()
                signal.alarm(20)  # ends a child that waits
                status = int(not np.array_equal(one(executable.run({"x": x})), x))
            finally:
                os._exit(status)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_kernel_cannot_run_its_own_executable() -> None:
    runs: list[Callable[[], object]] = []

    @kernel(op="transformer.silu", dtypes=("f32",))
    def nested(x: Any) -> Any:
        return x if x[0] == 1 else runs[-1]()

    class Nested:
        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [nested]

    registry = load_registry(allow=["core", "cpu"], extra_plugins=[Nested()])
    with Session("cpu", registry=registry, records=NO_RECORDS) as opened:
        problem = parse_problem("transformer.silu(f32[4]) -> (f32[4]) {}")
        executable = opened.compile_problem(problem, variant="nested")
        ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
        bound = executable.bind({"x": ones})
        for run in (bound, lambda: executable.run({"x": ones}), lambda: executable.bind({"x": ones})):
            runs.append(run)
            with pytest.raises(PluginError, match="an executable cannot be run by a kernel of its own"):
                executable.run({"x": zeros})
            np.testing.assert_array_equal(one(bound()), ones)


def test_sizes_that_a_kernel_fails_on_are_told_again(session: Session) -> None:
    """The phases after one that raised must not keep the parts of other sizes."""
    problem = parse_problem("transformer.silu(f32[n]) -> (f32[n]) {}")
    executable = session.compile_problem(problem, variant="counts")
    bound = executable.bind({"x": np.zeros(3, np.float32)})
    assert one(bound()).tolist() == [3, 3, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match="seven"):
            executable.run({"x": np.zeros(7, np.float32)})
    assert one(bound()).tolist() == [3, 3, 3]


def test_bound_call_outlives_memory_that_was_too_small(session: Session) -> None:
    """A larger run in between packs the plan's own memory anew; the bound call must not use what was there before."""
    executable = session.compile(two_layers(), constants={"w": W})
    small, large = numbers(3, 64), numbers(500, 64, seed=2)
    call = executable.bind({"x": small})
    np.testing.assert_allclose(one(call()), expected(small), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one(executable.run({"x": large})), expected(large), rtol=1e-4, atol=1e-5)
    layout = executable._layout  # type: ignore[attr-defined]  # a use of what was freed need not show in the result
    held, places = layout.arena, layout.places
    gc.collect()
    np.testing.assert_allclose(one(call()), expected(small), rtol=1e-4, atol=1e-5)
    start, end = address(held), address(held) + held.nbytes
    assert layout.arena is held
    for value, place in places.items():
        if executable.plan.values[value].place == "arena":
            assert start <= place < end
    np.testing.assert_allclose(one(executable.run({"x": large})), expected(large), rtol=1e-4, atol=1e-5)


def test_memory_that_ran_out_for_a_size_is_asked_for_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = session.compile(two_layers(), constants={"w": W})
    small, large = numbers(3, 64), numbers(500, 64, seed=2)
    executable.run({"x": small})

    def none_left(nbytes: int) -> Array:
        raise MemoryError

    monkeypatch.setattr("kernelforge_cpu.layout.aligned_empty", none_left)
    for _ in range(2):
        with pytest.raises(MemoryError):
            executable.run({"x": large})
    monkeypatch.undo()
    for x in (large, small):
        np.testing.assert_allclose(one(executable.run({"x": x})), expected(x), rtol=1e-4, atol=1e-5)


def test_dispatch_costs_microseconds(session: Session) -> None:
    """The promise is 5 us bound and 10 us with arrays; the margin is for a busy machine."""
    found = measure_dispatch(session)
    assert 0 < found.kernel < 10e-6
    assert found.bound - found.kernel < 40e-6
    assert found.plain - found.kernel < 40e-6


# Explanations.


def test_steps_are_traced_to_their_plugins(session: Session) -> None:
    executable = session.compile(two_layers(), constants={"w": W})
    explanation = executable.explain()
    assert explanation.target == "cpu"
    assert [use.op for use in explanation.steps] == [step.problem.op for step in executable.plan.steps]
    assert all(use.provenance.distribution == "kernelforge-cpu" for use in explanation.steps)
    assert all(use.provenance.version for use in explanation.steps)
    assert explanation.seconds is None
    assert {use.cost for use in explanation.steps} == {None}
    assert "tokens" in str(explanation.steps[0].problem)


def test_times_are_of_the_steps_of_one_run(session: Session) -> None:
    executable = session.compile(two_layers(), constants={"w": W})
    x = numbers(256, 64)
    start = time.perf_counter()
    explanation = executable.explain({"x": x}, repeats=1)
    passed = time.perf_counter() - start
    assert explanation.seconds is not None
    assert 0 < explanation.seconds < passed
    assert all(use.seconds is not None and use.seconds > 0 for use in explanation.steps)
    assert explanation.steps[0].cost is not None
    assert explanation.steps[0].cost.flops >= 2 * 256 * 64 * 64
    assert "f32[256,64]" in str(explanation.steps[0].problem)
    np.testing.assert_allclose(one(executable.run({"x": x})), expected(x), rtol=1e-4, atol=1e-5)


def test_python_steps_between_native_ones_are_timed() -> None:
    registry = load_registry(allow=["core", "cpu"], extra_plugins=[Plugin()])
    variants = {"transformer.silu": "slow"}
    with Session("cpu", registry=registry, records=NO_RECORDS, variants=variants, pipeline="") as session:
        executable = session.compile(two_layers(), constants={"w": W})
        explanation = executable.explain({"x": numbers(3, 64)}, repeats=3)
    assert [use.variant == "slow" for use in explanation.steps] == [False, True, False]
    slow = explanation.steps[1]
    assert slow.provenance.plugin == "Plugin"
    assert slow.seconds is not None
    assert slow.seconds > 0.019
    assert all(use.seconds is not None and use.seconds > 0 for use in explanation.steps)


def test_equal_steps_are_counted_together(session: Session) -> None:
    g = Graph()
    x = g.input("x", (8, 64), "f32")
    for i in range(3):
        x = g.matmul(x, g.constant(f"w{i}", (64, 64), "f32"))
    g.output(x, "y")
    executable = session.compile(g.text(), constants={f"w{i}": W for i in range(3)})
    explanation = executable.explain({"x": numbers(8, 64)}, repeats=2)
    (kernel,) = explanation.kernels
    assert kernel.steps == 3
    assert kernel.seconds == pytest.approx(explanation.seconds)
    assert kernel.cost is not None
    assert kernel.cost.flops == sum(use.cost.flops for use in explanation.steps if use.cost is not None)


# Kernels that are none.


def test_text_that_does_not_compile_names_its_plugin(session: Session) -> None:
    problem = parse_problem("transformer.silu(f32[8]) -> (f32[8]) {}")
    with pytest.raises(
        PluginError, match=r"variant 'cpu/transformer\.silu/torn' of plugin Plugin .* does not compile for"
    ):
        session.compile_problem(problem, variant="torn")
    with pytest.raises(PluginError, match=r"variant 'cpu/transformer\.silu/unfit' of Plugin .* built int"):
        session.compile_problem(problem, variant="unfit")


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q4"])
def test_a_table_that_is_also_the_head_is_kept_once(session: Session, dtype: str) -> None:
    """The lookup reads what the product packed; without the product, the table as it is."""
    g = Graph()
    table = g.constant("table", (77, 64), "f32")
    table = table if dtype == "f32" else g.quantize(table, dtype) if dtype == "q4" else g.cast(table, dtype)
    found = g.embedding(table, g.input("ids", ("tokens",), "i32"), dtype="f32")
    g.output(found, "found")
    g.output(g.matmul(found, table, transpose_rhs=True), "scores")
    source, ids = ArraySource({"table": numbers(77, 64)}), np.array([76, 0, 31], np.int32)
    executable = session.compile(g.text(), constants=source)
    lookup = executable.plan.steps[0]
    assert lookup.config_source == "shared-layout"
    store = session.device._store(source)  # type: ignore[attr-defined]
    assert [layout for _, layout in store._arrays] == [lookup.config["layout"]]
    exact = Session("reference", registry=session.registry).compile(g.text(), constants=source).run({"ids": ids})
    for got, want in zip(executable.run({"ids": ids}), exact, strict=True):
        assert isinstance(got, np.ndarray)
        assert isinstance(want, np.ndarray)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_what_a_product_would_quantise_runs_in_its_parts(session: Session) -> None:
    """Just as without the pass that fuses them: the same kernels and groups of steps, the same bits."""
    g = Graph()
    x, gain = g.input("x", ("tokens", 64), "f32"), g.constant("gain", (64,), "f32")
    gate, up, down, head = (
        g.quantize(g.constant(name, shape, "f32"), "q4")
        for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96)), ("head", (77, 64)))
    )
    hidden = g.glu_matmul(g.quantize(g.rms_norm(x, gain), "q8a"), gate, up, transpose_rhs=True)
    y = g.matmul(g.quantize(hidden, "q8a"), down, residual=x, transpose_rhs=True)
    g.output(g.matmul(g.quantize(g.rms_norm(y, gain), "q8a"), head, transpose_rhs=True), "scores")
    arrays = {"gain": numbers(64), "gate": numbers(96, 64), "up": numbers(96, 64), "down": numbers(64, 96)}
    source, inputs = ArraySource({**arrays, "head": numbers(77, 64)}), {"x": numbers(5, 64)}
    unfused = DEFAULT.replace("fuse-norm-matmul,", "")
    with Session("cpu", threads=2, registry=session.registry, records=NO_RECORDS, pipeline=unfused) as opened:
        plain = opened.compile(g.text(), constants=source)
        (want,) = plain.run(inputs)
    fused = session.compile(g.text(), constants=source)
    assert {f.problem.op.partition(".")[2] for f in fused.plan.fusions if f.apart} == {
        "quantize_matmul",
        "rms_norm_quantize_glu_matmul",
        "rms_norm_quantize_matmul",
    }
    (got,) = fused.run(inputs)
    assert np.array_equal(np.asarray(got), np.asarray(want))
    ran, wanted = (
        [(s.problem, s.variant, s.config, s.config_source, s.group) for s in made.plan.steps] for made in (fused, plain)
    )
    assert ran == wanted


def test_a_kernel_that_packs_otherwise_than_it_tells_is_an_error() -> None:
    def told(problem: Problem, config: Config, device: DeviceInfo) -> dict[int, str]:
        return {1: "panels"}

    class Liar:
        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [KernelVariant("liar", "transformer.add", "cpu", slow_silu, layouts=told, priority=1000)]

    registry = load_registry(allow=["core", "cpu"], extra_plugins=[Liar()])
    with Session("cpu", registry=registry, records=NO_RECORDS) as opened, pytest.raises(PluginError) as raised:
        opened.compile_problem(ADD)
    assert "'cpu/transformer.add/liar'" in str(raised.value)
    assert "packs {}, its layouts say {1: 'panels'}" in str(raised.value)


def test_text_is_written_only_where_no_object_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    monkeypatch.setattr(plan_cache, "_stamp", lambda packages: "the code")
    written: list[str] = []
    write = KernelBuilder.text
    x = numbers(5, 64)

    def text(k: KernelBuilder) -> str:
        written.append(k.name)
        return write(k)

    monkeypatch.setattr(KernelBuilder, "text", text)

    def run() -> Array:
        with Session("cpu", threads=1, records=NO_RECORDS) as session:
            return one(session.compile(two_layers(), constants={"w": W}).run({"x": x}))

    first, kernels = run(), len(written)
    assert kernels
    np.testing.assert_array_equal(run(), first)
    assert len(written) == kernels
    monkeypatch.setattr(plan_cache, "_stamp", lambda packages: "other code")
    np.testing.assert_array_equal(run(), first)
    assert len(written) == 2 * kernels
    monkeypatch.setattr(plan_cache, "_stamp", lambda packages: None)
    np.testing.assert_array_equal(run(), first)
    assert len(written) == 3 * kernels


def test_a_text_that_is_written_counts_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What another's kernel writes may hang on more than the code of its package."""
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    monkeypatch.setattr("kernelforge_cpu.device.code_stamp", lambda registry: "the code")

    def build(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
        k = new_kernel(problem, config, device)
        out, n = k.buffer(1, "f32"), k.dim(0) * 64
        k.vectorize(0, n, lambda i, valid: out.store(k.f32(value, k.lanes), i, valid=valid))
        return NativeKernel((Phase(k.name, one_part),), k.text())

    class Constant:
        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [KernelVariant("constant", "transformer.silu", "cpu", build, priority=1000)]

    registry = load_registry(allow=["core", "cpu"], extra_plugins=[Constant()])
    for value in (1.0, 2.0):
        with Session("cpu", threads=1, registry=registry, records=NO_RECORDS, pipeline="") as session:
            y = one(session.compile(two_layers(), constants={"w": W}).run({"x": numbers(5, 64)}))
        np.testing.assert_allclose(y, np.tile(value * W.sum(axis=0), (5, 1)), rtol=1e-4, atol=1e-5)
