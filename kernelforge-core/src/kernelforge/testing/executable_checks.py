"""Checks of a backend's executables: inputs and outputs, chains of runs, updates in place, constants, times, and several steps
in one plan."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.errors import AssetError, KernelForgeError, UsageError
from kernelforge.graph import Graph
from kernelforge.problem import TensorType
from kernelforge.testing.backend_fixtures import (
    compiled,
    expect_holds,
    expect_refused,
    expect_sum,
    opened,
    small_sum,
)
from kernelforge.testing.case import Failure, NotClaimed
from kernelforge.testing.programs import Program, compare_programs, execute, program_inputs

if TYPE_CHECKING:
    from kernelforge.testing.bench import Bench

    Array = np.ndarray[Any, np.dtype[Any]]

UPDATE = "transformer.kv_cache_update"
STEPS = 10
LOOSE = 2.0**17
"""Roundings of f32 that a program may be off by: a sum that is rounded to bf16 on the way may be rounded the other way."""


def check_refusals(bench: Bench, target: str) -> None:
    """Inputs and outputs that do not fit are refused with UsageError, and the executable works on."""
    executable, a, b = small_sum(bench, target)
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
        expect_refused(partial(executable.run, inputs, out), UsageError, what)
        expect_sum(executable.run({"a": a, "b": b}), a + b, f"after {what} was refused")


def check_outputs(bench: Bench, target: str) -> None:
    """Outputs go where they are told to; those that were returned are not touched again, at any size."""
    executable, a, b = small_sum(bench, target)
    out = np.full_like(a, np.nan)
    (returned,) = executable.run({"a": a, "b": b}, {"out": out})
    expect_sum([out], a + b, "in the caller's array")
    expect_sum([returned], a + b, "as it is returned")
    (kept,) = executable.run({"a": a, "b": b})
    for size in (1, 5, 4):
        expect_sum(executable.run({"a": a[:size], "b": a[:size]}), 2 * a[:size], f"at size {size}")
    expect_sum([kept], a + b, "after other runs")
    for given in (np.array(a, order="F"), np.broadcast_to(a[:1], a.shape), a[::-1]):
        expect_sum(executable.run({"a": given, "b": b}), given + b, "from an array of another layout")


def check_chain(bench: Bench, target: str) -> None:
    """Runs whose outputs are buffers that the next one reads: each fetch has what was there when it was asked for."""
    executable, a, b = small_sum(bench, target)
    device = opened(bench, target).device
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
    expect_sum([buffers[STEPS % 2]], a + STEPS * b, "at the end of a chain of runs")
    wrong = device.allocate((4, 3), "f32")
    expect_refused(
        lambda: executable.run({"a": a, "b": b}, {"out": wrong}), UsageError, "an output buffer of another shape"
    )
    same = {"out": buffers[0]}
    expect_refused(
        lambda: executable.run({"a": buffers[0], "b": b}, same), UsageError, "an output buffer that is an input"
    )


def check_in_place(bench: Bench, target: str) -> None:
    """What is updated in place: a Buffer is, and returned; an array is not."""
    cache, new, places = TensorType((2, 4, 1, 3), "f32"), TensorType((1, 1, 3), "f32"), TensorType((1,), "i32")
    executable = compiled(bench, target, UPDATE, (cache, new, places, places))
    device = opened(bench, target).device
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
    expect_holds(buffer, want, "a buffer that is updated in place")
    (copied,) = executable.run({"cache": old, **rest})
    if old.any():
        raise Failure("input-mutated", "an array given for what is updated in place was written to")
    got = copied if isinstance(copied, np.ndarray) else copied.numpy()
    if not np.array_equal(got, want):
        raise Failure("wrong-values", "an update in place of an array gives another result")


def check_constants(bench: Bench, target: str) -> None:
    """A constant that is absent or of another shape is refused; two sources do not mix."""
    session = opened(bench, target)
    graph = Graph(catalog=bench.registry)
    graph.output(graph.input("x", (3,), "f32") + graph.constant("w", (3,), "f32"), "y")
    try:
        plan = session.plan(bench.module(graph))
    except UsageError as error:
        raise NotClaimed(str(error)) from None
    x = np.zeros(3, np.float32)
    expect_refused(lambda: session.build(plan, {}), AssetError, "an absent constant")
    expect_refused(
        lambda: session.build(plan, {"w": np.zeros(4, np.float32)}), AssetError, "a constant of another shape"
    )
    weights = [np.full(3, n, np.float32) for n in (1, 2)]
    executables = [session.build(plan, {"w": w}) for w in weights]
    for executable, w in zip(executables, weights, strict=True):
        expect_sum(executable.run({"x": x}), w, "with a constant of its own")


def check_measure(bench: Bench, target: str) -> None:
    """As many positive samples as are asked for, from a named clock, with inputs unchanged."""
    executable, a, b = small_sum(bench, target)
    before = a.copy()
    timing = executable.measure({"a": a, "b": b}, repeats=3)
    if len(timing.samples) != 3 or min(timing.samples) <= 0 or not timing.source:
        raise Failure("error", f"three repeats give {timing}")
    if not np.array_equal(a, before):
        raise Failure("input-mutated", "measuring changes the inputs")
    expect_sum(executable.run({"a": a, "b": b}), a + b, "after measuring")


def check_emit(bench: Bench, target: str) -> None:
    """LLVM IR is text, or refused in words."""
    executable, _, _ = small_sum(bench, target)
    try:
        text = opened(bench, target).device.emit_llvm(executable.plan, bench.registry)
    except KernelForgeError as error:
        if not str(error):
            raise Failure("error", "the refusal of LLVM IR says nothing") from None
        return
    if not isinstance(text, str):
        raise Failure("error", f"emit_llvm returns {type(text).__name__}")


def check_program(bench: Bench, target: str, seed: int) -> None:
    """A random program of several steps gives what the reference target gives, at two sizes."""
    session = opened(bench, target)
    module = bench.module(Program(seed, dtype="f32").grow(STEPS))
    function = module.function()
    try:
        plan = session.plan_function(function)
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
