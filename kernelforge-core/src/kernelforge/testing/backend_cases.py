"""Cases of backends: devices, buffers, devices that are gone, and opening again; `executable_checks` has those of executables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.dtype import ITEMSIZE, to_numpy
from kernelforge.errors import DeviceError, KernelForgeError, UsageError
from kernelforge.problem import TensorType
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session
from kernelforge.testing.backend_fixtures import ADD, expect_holds, expect_refused, expect_sum, opened, small_sum
from kernelforge.testing.case import Case, Failure, NotClaimed
from kernelforge.testing.executable_checks import (
    check_chain,
    check_constants,
    check_emit,
    check_in_place,
    check_measure,
    check_outputs,
    check_program,
    check_refusals,
)

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.testing.bench import Bench

SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4))
PROGRAMS = {1: range(2), 2: range(2, 8), 5: range(8, 16)}


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
    expect_refused(lambda: backend.open("no-such-device"), (UsageError, DeviceError), "a device that is not there")


def check_buffers(bench: Bench, target: str) -> None:
    """Buffers start as zeros, keep what is written, apart from each other, and refuse what does not fit."""
    device = opened(bench, target).device
    rng = np.random.default_rng(0)
    for dtype in ITEMSIZE:
        kind = to_numpy(dtype)
        for shape in SHAPES:
            one, two = device.allocate(shape, dtype), device.allocate(shape, dtype)
            what = f"a {dtype}{list(shape)} buffer"
            expect_holds(one, np.zeros(shape, kind), f"{what}, new,")
            written = np.asarray(rng.integers(-5, 5, shape)).astype(kind)
            one.write(written)
            two.write(np.asarray(written + kind.type(1)).astype(kind))
            expect_holds(one, written, f"{what}, beside another,")
            one.write(np.array(written, order="F"))
            expect_holds(one, written, f"{what}, written in another layout,")
            expect_refused(partial(one.write, np.zeros((*shape, 2), kind)), UsageError, f"another shape for {what}")
            other = np.zeros(shape, to_numpy("f32" if dtype != "f32" else "i32"))
            expect_refused(partial(one.write, other), UsageError, f"another dtype for {what}")
            expect_holds(one, written, f"{what}, after refusals,")


def check_open_again(bench: Bench, target: str) -> None:
    """A device that was closed, twice even, can be opened again and computes; others stay open."""
    executable, a, b = small_sum(bench, target)
    for _ in range(3):
        with Session(target, threads=1, registry=bench.registry, records=NO_RECORDS, pipeline="") as session:
            t = TensorType((5, 3), "f32")
            own = session.compile_problem(bench.registry.ops[ADD].problem([t, t], {}))
            expect_sum(own.run({"a": a, "b": b}), a + b, "on a device that was opened again")
        session.close()
        expect_sum(executable.run({"a": a, "b": b}), a + b, "while another session is closed")


def check_lost_device(bench: Bench, target: str) -> None:
    """What was made on a device that is gone still gives what is right or refuses in words, and the process goes on with
    another device."""
    executable, a, b = small_sum(bench, target)
    t = TensorType((5, 3), "f32")
    session = Session(target, threads=1, registry=bench.registry, records=NO_RECORDS, pipeline="")
    own = session.compile_problem(bench.registry.ops[ADD].problem([t, t], {}))
    buffer = session.device.allocate((5, 3), "f32")
    buffer.write(a)
    session.close()
    uses: tuple[tuple[str, Callable[[], object]], ...] = (
        ("a run", lambda: expect_sum(own.run({"a": a, "b": b}), a + b, "on a device that is gone")),
        ("reading a buffer", lambda: expect_holds(buffer, a, "a buffer of a device that is gone")),
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
    expect_sum(executable.run({"a": a, "b": b}), a + b, "beside a device that is gone")
