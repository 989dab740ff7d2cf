"""What plugins import and no other test does: a native kernel with everything it may have, rewriting, small helpers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from kernelforge.backend import Device, Executable
from kernelforge.cli.output import Output, Progress, describe, environment
from kernelforge.errors import AssetError, UsageError
from kernelforge.graph import Graph
from kernelforge.hookspecs import hookimpl
from kernelforge.op import UNKNOWN, View, same_dim, same_shape
from kernelforge.passes.rewriting import Body, Op, available, run_upstream, tensor_type, uses
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem, TensorType, parse_problem
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.variant import Accept, Config, DeviceInfo, KernelVariant, accept_all, no_choices
from kernelforge_cpu.kernel import NativeKernel, Pack, Phase, no_scratch, one_part, part_per_thread
from kernelforge_llm.architecture import Architecture, find_architecture

SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
INFO = DeviceInfo("cpu", "any", "any")


# --- a native kernel: out = a * b, b packed, in two phases, with a table and scratch ---


def floats(address: int, size: int) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (size,))


def build(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    width = problem.operand(1).size()

    def first(buffers: int, dims: int, part: int, parts: int) -> None:
        """scratch = packed b / table"""
        _, packed, _, table, scratch = (ctypes.c_uint64 * 5).from_address(buffers)
        assert parts == 1
        floats(scratch, width)[:] = floats(packed, width)[::-1] / floats(table, 1)[0]

    def second(buffers: int, dims: int, part: int, parts: int) -> None:
        a, _, out, _, scratch = (ctypes.c_uint64 * 5).from_address(buffers)
        (rows,) = (ctypes.c_int64 * 1).from_address(dims)
        for row in range(part, rows, parts):
            at = slice(row * width, (row + 1) * width)
            floats(out, rows * width)[at] = floats(a, rows * width)[at] * floats(scratch, width)

    functions = SIGNATURE(first), SIGNATURE(second)
    addresses = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions]
    return NativeKernel(
        (Phase(addresses[0], one_part), Phase(addresses[1], part_per_thread)),
        packs={1: Pack("reversed, twice", lambda b: np.ascontiguousarray(2 * b[::-1]))},
        tables=(np.array([2], np.float32),),
        scratch=lambda dims, threads: 4 * width,
        keep=functions,
    )


class Kernels:
    @hookimpl
    def kernelforge_kernels(self) -> list[KernelVariant]:
        return [KernelVariant("by_hand", "transformer.mul", "cpu", build)]


def test_a_native_kernel_with_packs_tables_scratch_and_phases() -> None:
    problem = Problem(
        "transformer.mul",
        (TensorType(("?0", 5), "f32"), TensorType((5,), "f32", constant=True)),
        (TensorType(("?0", 5), "f32"),),
    )
    a, b = np.arange(15, dtype=np.float32).reshape(3, 5), np.arange(1, 6, dtype=np.float32)
    with Session("cpu", threads=2, registry=load_registry(extra_plugins=[Kernels()])) as session:
        executable = session.compile_problem(problem, constants={"b": b}, variant="by_hand")
        for rows in (3, 1):
            (out,) = executable.run({"a": a[:rows]})
            np.testing.assert_array_equal(np.asarray(out), a[:rows] * b)


def test_how_many_parts_and_bytes() -> None:
    assert (one_part([7], 4), part_per_thread([7], 4), no_scratch([7], 4)) == (1, 4, 0)


def test_what_a_variant_is_by_default() -> None:
    variant = KernelVariant("v", "transformer.mul", "cpu", build)
    problem = parse_problem("transformer.mul(f32[3], f32[3]) -> (f32[3]) {}")
    assert accept_all(problem, INFO) == variant.judge(problem, INFO) == Accept()
    assert list(no_choices(problem, INFO)) == list(variant.config_space(problem, INFO)) == [{}]


# --- backends ---


def test_devices_and_executables_are_what_the_protocols_say() -> None:
    device: Device = default_registry().backend("reference").open()
    g = Graph()
    g.output(g.silu(g.input("x", (2,), "f32")), "y")
    with Session("reference") as session:
        executable: Executable = device.compile(session.plan(g.module()), _NoConstants(), session.registry)
    (y,) = executable.run({"x": np.zeros(2, np.float32)})
    assert np.asarray(y).tolist() == [0, 0]
    assert min(executable.measure({"x": np.zeros(2, np.float32)}, repeats=2).samples) > 0
    device.close()


class _NoConstants:
    def names(self) -> tuple[str, ...]:
        return ()

    def tensor(self, name: str) -> Any:
        raise AssetError(f"there is no constant '{name}'")


# --- rewriting ---


def test_a_body_is_read_and_rewritten() -> None:
    g = Graph()
    x, w = g.input("x", (3, 4), "f32"), g.constant("w", (3, 4), "f32")
    total = g.add(g.silu(x), w)
    g.output(g.add(total, total), "y")
    module = g.module()
    with module.context:
        body = Body(module)
        silu, first, second = body.walk("transformer.silu", "transformer.add")
        assert isinstance(silu, Op)
        assert (silu.name, first.name, dict(silu.attrs)) == ("transformer.silu", "transformer.add", {})
        assert tensor_type(first.result) == TensorType((3, 4), "f32")
        assert (uses(silu.result), uses(first.result), uses(second.result)) == (1, 2, 1)
        assert available(silu.result, at=first)
        assert not available(second.result, at=first)
        assert [body.is_constant(v) for v in first.operands if v is not None] == [False, True]
        assert body.producer(first.result, "transformer.mul") is None
        assert body.feeder(first.result, "transformer.add") is None  # it is used twice
        body.replace(
            second, body.create("transformer.mul", [first.result, w_of(first)], {}, before=second, of=[second])
        )
    module.verify()
    assert [node.op for node in module.function().nodes] == ["transformer.silu", "transformer.add", "transformer.mul"]


def w_of(op: Op) -> Any:
    return op.operands[1]


def test_passes_of_mlir_run_by_name() -> None:
    g = Graph()
    x = g.input("x", (3,), "f32")
    g.silu(x)
    g.output(g.add(g.silu(x), g.silu(x)), "y")
    module = g.module()
    run_upstream(module, "cse")
    run_upstream(module, "canonicalize")
    assert [node.op for node in module.function().nodes] == ["transformer.silu", "transformer.add"]


# --- ops ---


def test_unknown_dimensions_agree_with_all() -> None:
    assert same_dim(3, 3)
    assert same_dim(UNKNOWN, 3)
    assert not same_dim("tokens", 3)
    assert same_shape((2, UNKNOWN), (2, "tokens"))
    assert not same_shape((2,), (2, 1))


def test_a_slice_is_a_view() -> None:
    op = default_registry().ops["transformer.slice"]
    views = op.views([TensorType((4, 6), "f32")], {"starts": (1, 2), "sizes": (2, -1)})
    assert views == (View(shape=(2, 4), strides=(6, 1), offset=8),)


# --- verbs ---


def test_errors_and_surroundings_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    error = UsageError("no such thing", hint="take another")
    said = {"type": "UsageError", "message": "no such thing", "hint": "take another", "exit_code": 2}
    assert describe(error, error.exit_code) == said
    assert {"kernelforge", "python", "system"} <= environment().keys()
    with Output().progress("working", 2) as bar:
        advance(bar)
    assert capsys.readouterr().err == ""  # not a terminal


def advance(bar: Progress) -> None:
    bar.advance(say="half")


# --- architectures ---


def test_an_architecture_is_found_by_its_name() -> None:
    found: Architecture = find_architecture({"architectures": ["Qwen3ForCausalLM"]}, default_registry(), source="here")
    assert type(found).__name__ == "Qwen3"
    with pytest.raises(AssetError, match="here: architecture 'None4All' is unknown"):
        find_architecture({"architectures": ["None4All"]}, default_registry(), source="here")
