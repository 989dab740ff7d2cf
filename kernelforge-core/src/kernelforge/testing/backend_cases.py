"""Cases of backends: devices, buffers, transfers, refusals, several steps in one plan, devices that are gone, and opening
again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import ITEMSIZE, to_numpy
from kernelforge.errors import AssetError, DeviceError, KernelForgeError, UsageError
from kernelforge.graph import Graph
from kernelforge.planning import make_plan
from kernelforge.problem import Problem, TensorType
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import Case, Failure, NotClaimed
from kernelforge.testing.programs import Program, compare_programs, execute, program_inputs

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Executable
    from kernelforge.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]

ADD = "transformer.add"
UPDATE = "transformer.kv_cache_update"
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4))
PROGRAMS = {1: range(2), 2: range(2, 8), 5: range(8, 16)}
STEPS = 10
LOOSE = 2.0**17
"""Roundings of f32 that a program may be off by: a sum that is rounded to bf16 on the way may be rounded the other way."""


def backend_cases(registry: Registry, plugin: str) -> list[Case]:
    cases: list[Case] = []
    for name, spec in registry.backends.items():
        if spec.provenance.plugin != plugin:
            continue

        def add(level: int, label: str, check: Callable[..., None], target: str = name, **arguments: Any) -> None:
            made = partial(check, target=target, **arguments)
            cases.append(Case(f"backend/{target}/{level}/{label}", level, "backend", target, made))

        add(1, "devices", check_devices)
        add(1, "buffers", check_buffers)
        add(2, "refusals", check_refusals)
        add(2, "outputs", check_outputs)
        add(2, "in-place", check_in_place)
        add(2, "chain", check_chain)
        add(2, "constants", check_constants)
        add(2, "measure", check_measure)
        add(3, "no-llvm-or-text", check_emit)
        add(6, "open-again", check_open_again)
        add(6, "lost-device", check_lost_device)
        for level, seeds in PROGRAMS.items():
            for seed in seeds:
                add(level, f"program-{seed}", check_program, seed=seed)
    return cases


def check_devices(bench: Bench, target: str) -> None:
    """Devices are data of this target; a name that is none is refused. Raises Failure, NotClaimed without a device."""
    backend = bench.registry.backend(target)
    try:
        found = backend.devices()
        bench.session(target)
    except DeviceError as error:
        raise NotClaimed(f"there is no device here: {error}") from None
    if not found or any(info.target != target or not info.name or not info.fingerprint for info in found):
        raise Failure("error", f"target '{target}' opens a device but has the devices {list(found)}")
    _refused(lambda: backend.open("no-such-device"), (UsageError, DeviceError), "a device that is not there")


def _refused(action: Callable[[], object], errors: type[Exception] | tuple[type[Exception], ...], what: str) -> None:
    try:
        action()
    except errors as error:
        if not str(error):
            raise Failure("error", f"the refusal of {what} says nothing") from None
        return
    except Exception as error:
        raise Failure("error", f"{what} raises {type(error).__name__}: {error}, must be refused") from None
    raise Failure("not-refused", f"{what} is taken")


def _session(bench: Bench, target: str) -> Session:
    try:
        return bench.session(target)
    except DeviceError as error:
        raise NotClaimed(f"there is no device here: {error}") from None


def check_buffers(bench: Bench, target: str) -> None:
    """Buffers start as zeros, keep what is written, apart from each other, and refuse what does not fit."""
    device = _session(bench, target).device
    rng = np.random.default_rng(0)
    for dtype in ITEMSIZE:
        kind = to_numpy(dtype)
        for shape in SHAPES:
            one, two = device.allocate(shape, dtype), device.allocate(shape, dtype)
            what = f"a {dtype}{list(shape)} buffer"
            _holds(one, np.zeros(shape, kind), f"{what}, new,")
            written = np.asarray(rng.integers(-5, 5, shape)).astype(kind)
            one.write(written)
            two.write(np.asarray(written + kind.type(1)).astype(kind))
            _holds(one, written, f"{what}, beside another,")
            one.write(np.array(written, order="F"))
            _holds(one, written, f"{what}, written in another layout,")
            _refused(partial(one.write, np.zeros((*shape, 2), kind)), UsageError, f"another shape for {what}")
            other = np.zeros(shape, to_numpy("f32" if dtype != "f32" else "i32"))
            _refused(partial(one.write, other), UsageError, f"another dtype for {what}")
            _holds(one, written, f"{what}, after refusals,")


def _holds(buffer: Buffer, want: Array, what: str) -> None:
    got = buffer.numpy()
    if got.shape != want.shape or tuple(buffer.shape) != want.shape:
        raise Failure("wrong-shape", f"{what} has shape {got.shape}")
    if got.dtype != want.dtype or to_numpy(buffer.dtype) != want.dtype:
        raise Failure("wrong-dtype", f"{what} is of type {got.dtype}")
    if not np.array_equal(got, want):
        raise Failure("wrong-values", f"{what} does not hold what was written to it")


def _compiled(bench: Bench, target: str, op: str, operands: Sequence[TensorType]) -> Executable:
    """Raises NotClaimed when the target has no kernel for the problem."""
    session = _session(bench, target)
    if op not in bench.registry.ops:
        raise NotClaimed(f"there is no op {op}")
    problem: Problem = bench.registry.ops[op].problem(list(operands), {})
    try:
        return session.compile_problem(problem)
    except UsageError as error:
        if "no kernel on target" not in str(error):
            raise
        raise NotClaimed(str(error)) from None


def _sum(bench: Bench, target: str) -> tuple[Executable, Array, Array]:
    """a + b with a dynamic dimension, and operands of size 5."""
    t = TensorType(("n", 3), "f32")
    executable = _compiled(bench, target, ADD, (t, t))
    a, b = (np.arange(15, dtype=np.float32).reshape(5, 3) * factor for factor in (1.0, 0.5))
    return executable, a.astype(np.float32), b.astype(np.float32)


def _right(outputs: Sequence[Any], want: Array, when: str) -> None:
    got = outputs[0] if isinstance(outputs[0], np.ndarray) else outputs[0].numpy()
    if not np.allclose(got, want, rtol=1e-6, atol=0.0):
        raise Failure("wrong-values", f"a sum is wrong {when}")


def check_refusals(bench: Bench, target: str) -> None:
    """Inputs and outputs that do not fit are refused with UsageError, and the executable works on."""
    executable, a, b = _sum(bench, target)
    wrong: list[tuple[dict[str, Array], dict[str, Array] | None, str]] = [
        ({"a": a}, None, "an absent input"),
        ({"a": a, "b": b, "c": b}, None, "an unknown input"),
        ({"a": a, "b": b.astype(np.float64)}, None, "an input of another dtype"),
        ({"a": a, "b": b[:, :2].copy()}, None, "an input of another shape"),
        ({"a": a, "b": b[0]}, None, "an input of another rank"),
        ({"a": a, "b": b[:4].copy()}, None, "two sizes for one dimension"),
        ({"a": a, "b": b}, {"no": np.zeros_like(a)}, "an unknown output"),
        ({"a": a, "b": b}, {"out": np.zeros((4, 3), np.float32)}, "an output of another shape"),
        ({"a": a, "b": b}, {"out": np.zeros((5, 3), np.float64)}, "an output of another dtype"),
        ({"a": a, "b": b}, {"out": np.zeros((3, 5), np.float32).T}, "an output that is not C-contiguous"),
    ]
    for inputs, out, what in wrong:
        _refused(partial(executable.run, inputs, out), UsageError, what)
        _right(executable.run({"a": a, "b": b}), a + b, f"after {what} was refused")


def check_outputs(bench: Bench, target: str) -> None:
    """Outputs go where they are told to; those that were returned are not touched again, at any size."""
    executable, a, b = _sum(bench, target)
    out = np.full_like(a, np.nan)
    (returned,) = executable.run({"a": a, "b": b}, {"out": out})
    _right([out], a + b, "in the caller's array")
    _right([returned], a + b, "as it is returned")
    (kept,) = executable.run({"a": a, "b": b})
    for size in (1, 5, 4):
        _right(executable.run({"a": a[:size], "b": a[:size]}), 2 * a[:size], f"at size {size}")
    _right([kept], a + b, "after other runs")
    for given in (np.array(a, order="F"), np.broadcast_to(a[:1], a.shape), a[::-1]):
        _right(executable.run({"a": given, "b": b}), given + b, "from an array of another layout")


def check_chain(bench: Bench, target: str) -> None:
    """Runs whose outputs are buffers that the next one reads: each fetch has what was there when it was asked for."""
    executable, a, b = _sum(bench, target)
    device = _session(bench, target).device
    buffers = [device.allocate(a.shape, "f32") for _ in range(2)]
    buffers[0].write(a)
    calls = [executable.bind({"a": buffers[i], "b": b}, {"out": buffers[1 - i]}) for i in range(2)]
    fetched = []
    for step in range(STEPS):
        (out,) = calls[step % 2]() if step else executable.run({"a": buffers[0], "b": b}, {"out": buffers[1]})
        if out is not buffers[1 - step % 2]:
            raise Failure("error", "a buffer that an output is written to is not what is returned")
        fetched.append((out.fetch(), out.fetch(3), out.fetch(2, 1)))
    for step, (whole, row, one) in enumerate(fetched, 1):
        want = a + step * b
        for found, wanted in ((whole(), want), (row(), want[3]), (one(), want[2, 1])):
            if np.shape(found) != np.shape(wanted):
                raise Failure("wrong-shape", f"what is fetched has shape {np.shape(found)}, not {np.shape(wanted)}")
            if not np.allclose(found, wanted, rtol=1e-6, atol=0.0):
                raise Failure("wrong-values", f"what is fetched after run {step} of {STEPS} is not what that run gave")
    _right([buffers[STEPS % 2]], a + STEPS * b, "at the end of a chain of runs")
    wrong = device.allocate((4, 3), "f32")
    _refused(lambda: executable.run({"a": a, "b": b}, {"out": wrong}), UsageError, "an output buffer of another shape")
    same = {"out": buffers[0]}
    _refused(lambda: executable.run({"a": buffers[0], "b": b}, same), UsageError, "an output buffer that is an input")


def check_in_place(bench: Bench, target: str) -> None:
    """What is updated in place: a Buffer is, and returned; an array is not."""
    cache, new, places = TensorType((2, 4, 1, 3), "f32"), TensorType((1, 1, 3), "f32"), TensorType((1,), "i32")
    executable = _compiled(bench, target, UPDATE, (cache, new, places, places))
    device = _session(bench, target).device
    old = np.zeros((2, 4, 1, 3), np.float32)
    rest = {
        "new": np.ones((1, 1, 3), np.float32),
        "positions": np.array([2], np.int32),
        "slots": np.array([1], np.int32),
    }
    want = old.copy()
    want[1, 2] = 1.0
    buffer = device.allocate(old.shape, "f32")
    (out,) = executable.run({"cache": buffer, **rest})
    if out is not buffer:
        raise Failure("error", "a buffer that is updated in place is not what is returned")
    _holds(buffer, want, "a buffer that is updated in place")
    (copied,) = executable.run({"cache": old, **rest})
    if old.any():
        raise Failure("input-mutated", "an array given for what is updated in place was written to")
    got = copied if isinstance(copied, np.ndarray) else copied.numpy()
    if not np.array_equal(got, want):
        raise Failure("wrong-values", "an update in place of an array gives another result")


def check_constants(bench: Bench, target: str) -> None:
    """A constant that is absent or of another shape is refused; two sources do not mix."""
    session = _session(bench, target)
    graph = Graph(catalog=bench.registry)
    graph.output(graph.input("x", (3,), "f32") + graph.constant("w", (3,), "f32"), "y")
    try:
        plan = session.plan(bench.module(graph))
    except UsageError as error:
        raise NotClaimed(str(error)) from None
    x = np.zeros(3, np.float32)
    _refused(lambda: session.build(plan, {}), AssetError, "an absent constant")
    _refused(lambda: session.build(plan, {"w": np.zeros(4, np.float32)}), AssetError, "a constant of another shape")
    weights = [np.full(3, n, np.float32) for n in (1, 2)]
    executables = [session.build(plan, {"w": w}) for w in weights]
    for executable, w in zip(executables, weights, strict=True):
        _right(executable.run({"x": x}), w, "with a constant of its own")


def check_measure(bench: Bench, target: str) -> None:
    """As many positive samples as are asked for, from a named clock, with inputs unchanged."""
    executable, a, b = _sum(bench, target)
    before = a.copy()
    timing = executable.measure({"a": a, "b": b}, repeats=3)
    if len(timing.samples) != 3 or min(timing.samples) <= 0 or not timing.source:
        raise Failure("error", f"three repeats give {timing}")
    if not np.array_equal(a, before):
        raise Failure("input-mutated", "measuring changes the inputs")
    _right(executable.run({"a": a, "b": b}), a + b, "after measuring")


def check_emit(bench: Bench, target: str) -> None:
    """LLVM IR is text, or refused in words."""
    executable, _, _ = _sum(bench, target)
    try:
        text = _session(bench, target).device.emit_llvm(executable.plan, bench.registry)
    except KernelForgeError as error:
        if not str(error):
            raise Failure("error", "the refusal of LLVM IR says nothing") from None
        return
    if not isinstance(text, str):
        raise Failure("error", f"emit_llvm returns {type(text).__name__}")


def check_open_again(bench: Bench, target: str) -> None:
    """A device that was closed, twice even, can be opened again and computes; others stay open."""
    executable, a, b = _sum(bench, target)
    for _ in range(3):
        with Session(target, threads=1, registry=bench.registry, records=NO_RECORDS, pipeline="") as session:
            t = TensorType((5, 3), "f32")
            own = session.compile_problem(bench.registry.ops[ADD].problem([t, t], {}))
            _right(own.run({"a": a, "b": b}), a + b, "on a device that was opened again")
        session.close()
        _right(executable.run({"a": a, "b": b}), a + b, "while another session is closed")


def check_lost_device(bench: Bench, target: str) -> None:
    """What was made on a device that is gone still gives what is right or refuses in words, and the process goes on with
    another device."""
    executable, a, b = _sum(bench, target)
    t = TensorType((5, 3), "f32")
    session = Session(target, threads=1, registry=bench.registry, records=NO_RECORDS, pipeline="")
    own = session.compile_problem(bench.registry.ops[ADD].problem([t, t], {}))
    buffer = session.device.allocate((5, 3), "f32")
    buffer.write(a)
    session.close()
    uses: tuple[tuple[str, Callable[[], object]], ...] = (
        ("a run", lambda: _right(own.run({"a": a, "b": b}), a + b, "on a device that is gone")),
        ("reading a buffer", lambda: _holds(buffer, a, "a buffer of a device that is gone")),
        ("writing a buffer", lambda: buffer.write(b)),
        ("a measurement", lambda: own.measure({"a": a, "b": b}, repeats=1)),
    )
    for what, use in uses:
        try:
            use()
        except Failure:
            raise
        except KernelForgeError as error:
            if not str(error):
                raise Failure("error", f"the refusal of {what} on a device that is gone says nothing") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Failure("error", f"{what} on a device that is gone raises {text}, must work or be refused") from None
    _right(executable.run({"a": a, "b": b}), a + b, "beside a device that is gone")


def check_program(bench: Bench, target: str, seed: int) -> None:
    """A random program of several steps gives what the reference target gives, at two sizes."""
    session = _session(bench, target)
    module = bench.module(Program(seed, dtype="f32").grow(STEPS))
    function = module.function()
    try:
        plan = make_plan(
            function,
            bench.registry.ops,
            session.select,
            target=target,
            keep_whole=lambda problem: not session.fusion(problem).apart,
        )
    except UsageError as error:
        raise NotClaimed(str(error)) from None
    inputs, constants = program_inputs(function, seed)
    executable = session.build(plan, constants)
    for size in (3, 5, 1):
        inputs, _ = program_inputs(function, seed, size)
        want = execute(module, inputs, constants, bench.registry)
        outputs = executable.run(inputs)
        have = {n: o if isinstance(o, np.ndarray) else o.numpy() for n, o in zip(want, outputs, strict=True)}
        compare_programs(want, have, f"random program {seed} at size {size} on target '{target}'", LOOSE)
