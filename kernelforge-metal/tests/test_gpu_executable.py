"""Compiled plans on a GPU: memory, views, sizes that change, steps on the host, errors."""

from __future__ import annotations

import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import DeviceError, KernelForgeError, KernelForgeWarning, PluginError, UsageError
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem, parse_problem
from kernelforge.session import Session
from kernelforge.variant import Config, DeviceInfo, KernelVariant
from kernelforge_metal.bindings import MAX_BOUND
from kernelforge_metal.buffer import GpuBuffer
from kernelforge_metal.device import GpuDevice
from kernelforge_metal.errors import DeviceLost
from kernelforge_metal.executable import GpuExecutable
from kernelforge_metal.kernel import Below, Binding, Dispatch, GpuKernel

pytestmark = pytest.mark.filterwarnings("ignore:.*run on the host, slowly")

Array = np.ndarray[Any, np.dtype[Any]]

ADD = parse_problem("transformer.add(f32[4,16], f32[4,16]) -> (f32[4,16]) {}")
SILU = parse_problem("transformer.silu(f32[4,16]) -> (f32[4,16]) {}")


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def one(outputs: Sequence[object]) -> Array:
    (out,) = outputs
    assert isinstance(out, np.ndarray)
    return out


def shader_of(code: str, element: str = "f32") -> GpuKernel:
    bindings = (Binding("x", 0, element), Binding("out", 1, element))
    return GpuKernel((Dispatch(code, bindings, (1, 1, 1)),), checked=True)


def torn(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return shader_of("@compute @workgroup_size(1) fn main() { out[0] = ; }")


def by_fours(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """silu four at a time, of up to 256 elements without gaps."""
    code = """
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) i: u32) {
  let v = x[p.x_at / 4u + i];
  out[p.out_at / 4u + i] = v / (1.0 + exp(-v));
}
"""
    return shader_of(code, "vec4<f32>")


def by_bound(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    """1 everywhere where all ids are known to be below 4, else 2."""
    code = "@compute @workgroup_size(12) fn main(@builtin(local_invocation_index) i: u32) {{ out[p.out_at + i] = {}; }}"
    known, out = Below(1, 4), (Binding("out", 2),)
    return GpuKernel(
        (
            Dispatch(code.format("1.0"), out, (1, 1, 1), only=known),
            Dispatch(code.format("2.0"), out, (1, 1, 1), unless=known),
        )
    )


class Plugin:
    @hookimpl
    def kernelforge_kernels(self) -> list[KernelVariant]:
        return [
            KernelVariant("torn", "transformer.silu", "gpu", torn, priority=-1000),
            KernelVariant("bounded", "transformer.embedding", "gpu", by_bound, priority=-1000),
            KernelVariant("fours", "transformer.silu", "gpu", by_fours, priority=-1000),
            KernelVariant("unfit", "transformer.silu", "gpu", lambda problem, config, device: 7, priority=-1000),
        ]


@pytest.fixture(scope="module", params=["gpu", "plain_gpu"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    opened: Session = request.getfixturevalue(request.param)
    registry = load_registry(allow=["core", "metal"], extra_plugins=[Plugin()])
    before, opened.registry = opened.registry, registry
    yield opened
    opened.registry = before


# Inputs and outputs.


def test_inputs_of_any_layout_and_outputs_in_the_callers_arrays(session: Session) -> None:
    executable = session.compile_problem(ADD)
    a, b = numbers(4, 16), numbers(4, 16, seed=1)
    for given in (a, np.asfortranarray(a), np.repeat(a, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(one(executable.run({"a": given, "b": b})), a + b)
    out = np.empty((4, 16), np.float32)
    assert one(executable.run({"a": a, "b": b}, {"out": out})) is out
    np.testing.assert_array_equal(out, a + b)
    assert one(executable.run({"a": a, "b": b})) is not out


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": numbers(4, 16)}, "input 'b' is missing"),
        ({"a": numbers(4, 16), "b": numbers(4, 16), "c": numbers(1)}, "unknown input 'c'"),
        ({"a": numbers(4, 15), "b": numbers(4, 16)}, r"input 'a' has shape \(4, 15\), wants \[4, 16\]"),
        ({"a": numbers(4, 16).astype(np.float64), "b": numbers(4, 16)}, "input 'a' has dtype float64, wants f32"),
    ],
)
def test_inputs_that_do_not_fit(session: Session, inputs: dict[str, Array], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        session.compile_problem(ADD).run(inputs)


def test_outputs_that_do_not_fit(session: Session) -> None:
    executable, a = session.compile_problem(ADD), numbers(4, 16)
    with pytest.raises(UsageError, match="output 'out' cannot be written to a float32"):
        executable.run({"a": a, "b": a}, {"out": np.empty((4, 15), np.float32)})
    with pytest.raises(UsageError, match="there is no output 'sum' to write to"):
        executable.run({"a": a, "b": a}, {"sum": np.empty((4, 16), np.float32)})


def test_bound_calls_see_their_inputs_as_they_are_and_take_turns(session: Session) -> None:
    executable = session.compile_problem(ADD)
    a, b = numbers(4, 16), numbers(4, 16, seed=1)
    call, other = executable.bind({"a": a, "b": b}), executable.bind({"a": b, "b": b})
    first = one(call())
    np.testing.assert_array_equal(first, a + b)
    a[...] = 1.0
    np.testing.assert_array_equal(one(other()), 2 * b)
    assert one(call()) is first
    np.testing.assert_array_equal(first, 1.0 + b)


def test_a_dispatch_may_hang_on_what_the_host_knows_of_an_input(session: Session) -> None:
    problem = parse_problem('transformer.embedding(f32[9,4], i32[3]) -> (f32[3,4]) {dtype="f32"}')
    executable = session.compile_problem(problem, variant="bounded")
    ids, table = np.array([0, 3, 1], np.int32), numbers(9, 4)
    on_device = session.device.allocate((3,), "i32")
    on_device.write(ids)
    for given, wanted in ((ids, 1.0), (ids + 1, 2.0), (ids, 1.0), (on_device, 2.0)):
        np.testing.assert_array_equal(one(executable.run({"table": table, "ids": given})), wanted)


def test_buffers_hold_what_is_written(session: Session) -> None:
    buffer = session.device.allocate((3, 5), "f16")
    np.testing.assert_array_equal(buffer.numpy(), np.zeros((3, 5), np.float16))
    buffer.write(numbers(3, 5).astype(np.float16))
    np.testing.assert_array_equal(buffer.numpy(), numbers(3, 5).astype(np.float16))
    with pytest.raises(UsageError, match=r"cannot write float32\[3, 5\] into a f16\[3, 5\] buffer"):
        buffer.write(numbers(3, 5))
    assert session.device.allocate((2, 64), "q8").shape == (2, 2)  # groups


def test_outputs_that_stay_on_the_device_are_inputs_of_the_next_run(session: Session) -> None:
    executable, b = session.compile_problem(ADD), numbers(4, 16, seed=1)
    buffers = [session.device.allocate((4, 16), "f32") for _ in range(2)]
    buffers[0].write(numbers(4, 16))
    calls = [executable.bind({"a": buffers[i], "b": b}, {"out": buffers[1 - i]}) for i in range(2)]
    fetched = []
    for step in range(6):
        assert calls[step % 2]() == (buffers[1 - step % 2],)
        fetched.append(buffers[1 - step % 2].fetch(2))
    for step, row in enumerate(fetched, 1):
        np.testing.assert_allclose(row(), (numbers(4, 16) + step * b)[2], rtol=1e-5, atol=1e-6)
        assert row() is row()
    with pytest.raises(UsageError, match="in use in the same run"):
        executable.run({"a": buffers[0], "b": b}, {"out": buffers[0]})


def test_a_buffer_is_in_turn_one_input_the_other_and_the_output(session: Session) -> None:
    g = Graph()
    x, y = (g.input(name, (4, 16), "f32") for name in "xy")
    g.output(g.add(g.silu(x), y), "sum")
    executable, buffer = session.compile(g.text()), session.device.allocate((4, 16), "f32")
    held, other = numbers(4, 16), numbers(4, 16, seed=1)
    buffer.write(held)
    np.testing.assert_allclose(one(executable.run({"x": buffer, "y": other})), silu(held) + other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one(executable.run({"x": other, "y": buffer})), silu(other) + held, rtol=1e-5, atol=1e-6)
    executable.run({"x": other, "y": held}, {"sum": buffer})
    np.testing.assert_allclose(buffer.numpy(), silu(other) + held, rtol=1e-5, atol=1e-6)


def test_what_is_fetched_is_part_of_a_buffer_as_it_was_then(session: Session) -> None:
    buffer, values = session.device.allocate((3, 5), "f16"), numbers(3, 5).astype(np.float16)
    buffer.write(values)
    rows, last = [buffer.fetch(i) for i in range(3)], buffer.fetch(2, 4)
    buffer.write(np.zeros_like(values))
    np.testing.assert_array_equal([row() for row in rows], values)
    assert last() == values[2, 4]
    assert session.device.allocate((0, 3), "f32").fetch()().shape == (0, 3)
    with pytest.raises(IndexError, match=r"no element \[3\] in a f16\[3, 5\] buffer"):
        buffer.fetch(3)


def test_what_was_never_submitted_is_not_handed_out(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = session.device.allocate((4,), "f32")
    buffer.fetch()()  # leaves a buffer with old bytes to be read from again
    queue = session.device.gpu.queue  # type: ignore[attr-defined]  # of a GPU
    lost = buffer.fetch()
    with monkeypatch.context() as patch:

        def fail(recorded: object) -> int:
            raise DeviceError("no memory for commands")

        patch.setattr(queue, "_submit", fail)
        with pytest.raises(DeviceError, match="no memory for commands"):
            lost()
    with pytest.raises(DeviceError, match="did not run what was to be read"):
        lost()
    np.testing.assert_array_equal(buffer.fetch()(), np.zeros(4, np.float32))


def test_ctrl_c_while_the_gpu_works_ends_the_run_alone(session: Session) -> None:
    """It is seen when the GPU is done, which calls Python: an exception there would be lost, and the result with it."""
    n = 512
    g = Graph()
    x, y = (g.input(name, (n, n), "f32") for name in ("lhs", "rhs"))
    g.output(x @ y, "out")
    executable = session.compile(g.text())
    inputs = {"lhs": numbers(n, n), "rhs": np.eye(n, dtype=np.float32)}
    executable.run(inputs)
    sender = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))

    def interrupted() -> None:
        sender.start()
        executable.run(inputs)
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    np.testing.assert_allclose(one(executable.run(inputs)), inputs["lhs"], rtol=1e-5, atol=1e-6)


def test_buffers_that_are_gone_take_what_was_bound_to_them_along(session: Session) -> None:
    executable = session.compile_problem(ADD)
    for _ in range(3):
        a = session.device.allocate((4, 16), "f32")
        np.testing.assert_array_equal(one(executable.run({"a": a, "b": numbers(4, 16)})), numbers(4, 16))
        assert len(vars(vars(executable)["_bindings"])["_kept"]) == 1
        del a
    assert not vars(vars(executable)["_bindings"])["_kept"]


def test_buffers_that_stay_remember_no_run_that_is_forgotten(session: Session) -> None:
    executable, b = session.compile_problem(ADD), numbers(4, 16)
    buffers = [session.device.allocate((4, 16), "f32") for _ in range(MAX_BOUND + 1)]
    for buffer in buffers * 3:
        executable.run({"a": buffer, "b": b})
    assert sum(map(weakref.getweakrefcount, buffers)) == MAX_BOUND
    del executable
    assert not sum(map(weakref.getweakrefcount, buffers))


# Memory.


def two_sums() -> str:
    """y = silu(x + w) + w, through memory of the plan's own, for any number of tokens."""
    g = Graph()
    x, w = g.input("x", ("tokens", 24), "f32"), g.constant("w", (24,), "f32")
    g.output(g.add(g.silu(g.add(x, w)), w), "y")
    return g.text()


def test_sizes_grow_and_shrink_between_runs(session: Session) -> None:
    w = numbers(24, seed=9)
    executable = session.compile(two_sums(), constants={"w": w}, max_dims={"tokens": 8})
    small = numbers(2, 24)
    call = executable.bind({"x": small})
    for tokens in (3, 8, 1, 700, 5, 700):
        x = numbers(tokens, 24, seed=tokens)
        np.testing.assert_allclose(one(executable.run({"x": x})), silu(x + w) + w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one(call()), silu(small + w) + w, rtol=1e-5, atol=1e-6)


def test_what_was_recorded_ahead_for_one_size_is_not_run_for_another(session: Session) -> None:
    w = numbers(24, seed=9)
    executable = session.compile(two_sums(), constants={"w": w}, max_dims={"tokens": 8})
    for tokens in (2, 2, 2, 8, 8, 8, 5):  # from the second run of a size on the next one is recorded ahead
        x = numbers(tokens, 24, seed=tokens)
        np.testing.assert_allclose(one(executable.run({"x": x})), silu(x + w) + w, rtol=1e-5, atol=1e-6)


def test_sizes_for_which_there_is_no_memory_leave_the_others(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(session.device, GpuDevice)
    executable, w = session.compile(two_sums(), constants={"w": numbers(24)}), numbers(24)
    x = numbers(3, 24)
    bound = executable.bind({"x": x})
    want = one(bound()).copy()
    allocate = session.device.gpu.allocate

    def full(nbytes: int, what: str) -> Any:
        if what == "outputs":
            raise DeviceError("the GPU has not enough memory")
        return allocate(nbytes, what)

    with monkeypatch.context() as patch:
        patch.setattr(session.device.gpu, "allocate", full)
        with pytest.raises(DeviceError, match="not enough memory"):
            executable.run({"x": numbers(70, 24)})
    np.testing.assert_array_equal(one(bound()), want)
    np.testing.assert_allclose(
        one(executable.run({"x": numbers(70, 24)}))[:3], silu(numbers(70, 24)[:3] + w) + w, rtol=1e-5, atol=1e-6
    )


def test_nothing_to_do_is_done(session: Session) -> None:
    executable = session.compile(two_sums(), constants={"w": numbers(24)})
    assert one(executable.run({"x": numbers(0, 24)})).shape == (0, 24)


def cache_step() -> str:
    g = Graph()
    cache, new = g.input("cache", (2, 8, 3, 4), "f32", donated=True), g.input("new", ("tokens", 3, 4), "f32")
    positions, slots = (g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
    g.output(g.kv_cache_update(cache, new, positions, slots), "updated")
    return g.text()


def test_donated_buffers_stay_on_the_device_and_donated_arrays_are_left_alone(session: Session) -> None:
    executable = session.compile(cache_step())
    start, new = numbers(2, 8, 3, 4), numbers(2, 3, 4, seed=1)
    inputs = {"new": new, "positions": np.array([7, -1], np.int32), "slots": np.array([1, 0], np.int32)}
    want = start.copy()
    want[1, 7] = new[0]
    buffer = session.device.allocate(start.shape, "f32")
    assert isinstance(buffer, GpuBuffer)
    buffer.write(start)
    (returned,) = executable.run({"cache": buffer, **inputs})
    assert returned is buffer
    np.testing.assert_array_equal(buffer.numpy(), want)
    kept = start.copy()
    np.testing.assert_array_equal(one(executable.run({"cache": kept, **inputs})), want)
    np.testing.assert_array_equal(kept, start)
    other = session.device.allocate(start.shape, "f32")
    executable.run({"cache": other, **inputs})
    np.testing.assert_array_equal(buffer.numpy(), want)


def test_operands_are_read_only_unless_a_result_is_in_their_buffer(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = session.device.gpu  # type: ignore[attr-defined]  # of a GPU
    bound: list[tuple[bool, ...]] = []
    bind_group, layouts = gpu.bind_group, gpu._layouts

    def spy(layout: object, regions: Sequence[object]) -> object:
        bound.extend(read_only for read_only, made in layouts.items() if made is layout)
        return bind_group(layout, regions)

    monkeypatch.setattr(gpu, "bind_group", spy)
    g = Graph()
    x = g.input("x", (8, 16), "f32")
    halves = [g.slice(x, starts=(start, 0), sizes=(4, 16)) for start in (0, 4)]
    g.output(g.silu(g.silu(g.add(*halves))), "out")
    held = numbers(8, 16)
    executable = session.compile(g.text())
    want = silu(silu(held[:4] + held[4:]))
    np.testing.assert_allclose(one(executable.run({"x": held})), want, rtol=1e-5, atol=1e-6)
    assert bound == [
        (True, True, False),
        (False, False),
        (True, False),
    ]  # from the input, within the arena, to the output


def test_one_buffer_may_be_read_as_one_input_and_written_as_another(session: Session) -> None:
    g = Graph()
    cache = g.input("cache", (2, 8, 3, 4), "f32", donated=True)
    source = g.input("source", (2, 8, 3, 4), "f32")
    positions, slots = (g.input(name, (1,), "i32") for name in ("positions", "slots"))
    new = g.reshape(g.slice(source, starts=(0, 2, 0, 0), sizes=(1, 1, 3, 4)), (1, 3, 4))
    g.output(g.kv_cache_update(cache, new, positions, slots), "updated")
    buffer, held = session.device.allocate((2, 8, 3, 4), "f32"), numbers(2, 8, 3, 4)
    buffer.write(held)
    place = {"positions": np.array([7], np.int32), "slots": np.array([1], np.int32)}
    session.compile(g.text()).run({"cache": buffer, "source": buffer, **place})
    held[1, 7] = held[0, 2]
    np.testing.assert_array_equal(buffer.numpy(), held)


@pytest.mark.parametrize("start", [0, 1, 3, 8])
def test_views_that_start_between_vectors_are_moved(session: Session, start: int) -> None:
    g = Graph()
    x = g.input("x", (264,), "f32")
    g.output(g.silu(g.slice(x, starts=(start,), sizes=(256,))), "y")
    session.variants["transformer.silu"] = "fours"
    session._selections.clear()
    try:
        executable = session.compile(g.text())
    finally:
        session.variants.clear()
        session._selections.clear()
    x_array = numbers(264)
    np.testing.assert_allclose(one(executable.run({"x": x_array})), silu(x_array[start : start + 256]), rtol=1e-6)


def test_ops_without_a_kernel_run_on_the_host_between_those_that_have_one(session: Session) -> None:
    g = Graph()
    x = g.input("x", ("tokens", 6), "f32")
    g.output(g.silu(g.cast(g.cast(g.silu(x), "i8"), "f32")), "y")
    executable = session.compile(g.text())
    assert {s.variant for s in executable.plan.steps} == {"wgsl", "reference"}
    x_array = 20 * numbers(5, 6)
    want = silu(np.trunc(silu(x_array)))
    np.testing.assert_allclose(one(executable.run({"x": x_array})), want, rtol=1e-5, atol=1e-6)
    assert executable.measure({"x": x_array}, repeats=2).source == "host-clock"
    explanation = executable.explain({"x": x_array}, repeats=1)
    assert all(use.seconds and use.seconds > 0 for use in explanation.steps)


def test_what_runs_on_the_host_is_said_once(session: Session) -> None:
    device = session.device
    assert isinstance(device, GpuDevice)
    device._on_host.clear()
    problem = parse_problem("transformer.add(f64[3], f64[3]) -> (f64[3]) {}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.compile_problem(problem, variant="reference", config={})  # as tuning tries it
    with pytest.warns(KernelForgeWarning, match=r"transformer\.add: these steps run on the host, slowly"):
        session.compile_problem(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.compile_problem(problem)


def test_equal_constants_are_on_the_device_once(session: Session) -> None:
    source = {"w": numbers(24)}
    before = session.build(session.plan(two_sums()), source)
    assert isinstance(before, GpuExecutable)
    assert len({region.buffer for region in before._bindings._constants.values()}) == 1


# Errors.


def test_a_shader_that_does_not_compile_names_its_plugin(session: Session) -> None:
    with pytest.raises(
        PluginError, match=r"variant 'gpu/transformer.silu/torn' of plugin .* does not compile for"
    ) as caught:
        session.compile_problem(SILU, variant="torn")
    assert "parsing error" in str(caught.value)
    with pytest.raises(PluginError, match=r"variant 'gpu/transformer.silu/unfit' of .* built int"):
        session.compile_problem(SILU, variant="unfit")
    x = numbers(4, 16)
    np.testing.assert_allclose(one(session.compile_problem(SILU).run({"x": x})), silu(x), rtol=1e-6)


def test_too_large_a_buffer_is_refused_and_the_device_lives_on(session: Session) -> None:
    with pytest.raises(DeviceError, match=r"a buffer of .* holds") as caught:
        session.device.allocate((1 << 44,), "f32")
    assert caught.value.hint is not None
    assert "--weights q4" in caught.value.hint
    assert session.device.allocate((4,), "f32").shape == (4,)


def test_out_of_memory_and_loss_say_what_to_do(session: Session) -> None:
    device = session.device
    assert isinstance(device, GpuDevice)
    gpu = device._gpu

    def failing(error: Exception) -> KernelForgeError:
        with pytest.raises(DeviceError) as caught, gpu._errors("allocate 5 MiB for a test"):
            raise error
        return caught.value

    full = failing(RuntimeError("Not enough memory left."))
    assert "has not enough memory to allocate 5 MiB for a test" in str(full)
    assert "--target cpu" in str(full.hint)
    text = f"Validation Error\n\nCaused by:\n  In wgpuDeviceCreateBuffer\n    {'x' * 300}\n    Parent device is lost"
    lost = failing(RuntimeError(text))
    said = f"Validation Error: In wgpuDeviceCreateBuffer: {'x' * 200}...: Parent device is lost"
    assert str(lost) == f"the GPU {gpu.name} was lost before it could allocate 5 MiB for a test: {said}"
    assert "its driver gave it up" in str(lost.hint)
    assert "--target cpu" in str(lost.hint)
    with pytest.raises(DeviceLost, match="was lost before it could allocate"):
        device.allocate((4,), "f32")
    gpu.lost = False
    assert device.allocate((4,), "f32").shape == (4,)


def test_there_is_no_llvm_ir(session: Session) -> None:
    with pytest.raises(UsageError, match="its kernels are WGSL"):
        session.device.emit_llvm(session.compile_problem(ADD).plan, session.registry)
