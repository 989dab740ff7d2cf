from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import PluginError
from kernelforge.hookspecs import hookimpl
from kernelforge.plan_cache import code_stamp
from kernelforge.plugins import load_registry
from kernelforge.problem import Problem, parse_problem
from kernelforge.session import Session
from kernelforge.tune.record import kernel_hash
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, ConfigSpace, DeviceInfo, KernelVariant, Reject, Verdict
from kernelforge_cpu.authoring import extent, kernel
from kernelforge_cpu.kernel import NativeKernel, PythonKernel

SILU = "transformer.silu"
ADD = "transformer.add"
SOFTMAX = "transformer.softmax"
DEVICE = DeviceInfo("cpu", "any", "any")


def silu(shape: str, dtype: str = "f32", strides: str = "") -> Problem:
    at = f":[{strides}]" if strides else ""
    return parse_problem(f"{SILU}({dtype}[{shape}]{at}) -> ({dtype}[{shape}]) {{}}")


def softmax(shape: str, axis: int = 0) -> Problem:
    return parse_problem(f"{SOFTMAX}(f32[{shape}]) -> (f32[{shape}]) {{axis={axis}}}")


def matrix(problem: Problem, device: DeviceInfo) -> Verdict:
    return Accept() if problem.operand(0).rank == 2 else Reject("takes matrices")


@kernel(op=SILU, dtypes=("f32", "bf16"))
def half_tanh(x: Any) -> Any:
    """x/2 + x/2 tanh(x/2).

    More is not shown.
    """
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


@kernel(op="transformer.add_rms_norm", dtypes=("f32",))
def both(x: Any, residual: Any, weight: Any, *, eps: float) -> Any:
    total = x + residual
    return total, total / np.sqrt((total * total).mean(-1, keepdims=True) + eps) * weight


@kernel(op=SILU, dtypes=("f32",), language="numba", space={"block": (64, 7)})
def in_blocks(x: Any, out: Any, part: int, parts: int, block: int) -> None:
    flat_x, flat_out = x.reshape(x.size), out.reshape(out.size)
    for left in range(part * block, x.size, parts * block):
        for i in range(left, min(left + block, x.size)):
            flat_out[i] = flat_x[i] / (np.float32(1) + math.exp(-flat_x[i]))


@kernel(op=ADD, dtypes=("f32", "f64"), language="numba", supports=matrix)
def each_row(a: Any, b: Any, out: Any, part: int, parts: int) -> None:
    for i in range(part, out.shape[0], parts):
        for j in range(out.shape[1]):
            out[i, j] = a[i, j] + b[i, j]


@kernel(op="transformer.layer_norm", dtypes=("f32",), language="numba", supports=matrix)
def rows(x: Any, weight: Any, bias: Any, out: Any, part: int, parts: int, eps: float) -> None:
    for i in range(part, x.shape[0], parts):
        centred = x[i] - x[i].mean()
        out[i] = centred / np.sqrt((centred * centred).mean() + eps) * weight
        if bias is not None:
            out[i] += bias


@kernel(op=SILU, dtypes=("f32",), language="mlir", space={"unroll": (1, 2)})
def emitted(k: Any, problem: Problem, *, unroll: int) -> None:
    from kernelforge_cpu.vmath import silu as vector_silu

    x, out = k.buffer(0, "f32"), k.buffer(1, "f32")
    lanes = unroll * k.lanes

    def body(i: Any, valid: Any) -> None:
        out.store(vector_silu(k, x.load(i, lanes, valid=valid)), i, valid=valid)

    k.vectorize(*k.share(extent(k, problem, *problem.operand(0).shape), grain=lanes), body, lanes=lanes)


@kernel(op=SOFTMAX, dtypes=("f32",), attrs={"axis": 0}, supports=matrix, priority=1)
def first_axis(x: Any) -> Any:
    e = np.exp(x - x.max(axis=0, initial=-np.inf))
    return e / e.sum(axis=0)


@kernel(op="transformer.cast", dtypes=("i8",), attrs={"dtype": "i8"}, language="mlir")
def as_text(k: Any, problem: Problem) -> str:
    """A copy of one byte, as MLIR text."""
    return f"""
    func.func @{k.name}(%buffers: !llvm.ptr, %dims: !llvm.ptr, %part: i64, %parts: i64) {{
      %second = llvm.getelementptr %buffers[1] : (!llvm.ptr) -> !llvm.ptr, !llvm.ptr
      %from = llvm.load %buffers : !llvm.ptr -> !llvm.ptr
      %to = llvm.load %second : !llvm.ptr -> !llvm.ptr
      %byte = llvm.load %from : !llvm.ptr -> i8
      llvm.store %byte, %to : i8, !llvm.ptr
      return
    }}
    """


ALL = (half_tanh, both, in_blocks, each_row, rows, emitted, first_axis, as_text)


class Plugin:
    @hookimpl
    def kernelforge_kernels(self) -> tuple[KernelVariant, ...]:
        return ALL


@pytest.fixture(scope="module")
def session(state_folder: None) -> Iterator[Session]:
    with Session("cpu", threads=2, registry=load_registry(extra_plugins=[Plugin()])) as opened:
        yield opened


def check(session: Session, variant: KernelVariant, problem: Problem) -> None:
    """It takes the problem and computes what the op's reference does."""
    assert variant.judge(problem, session.device.info) == Accept()
    Workload(session, problem).verify(session.compile_problem(problem, variant=variant.name))


@pytest.mark.parametrize("variant", [half_tanh, in_blocks, emitted], ids=lambda v: v.name)
@pytest.mark.parametrize("shape", ["1", "2,3,131", "0,4"])
def test_each_language(session: Session, variant: KernelVariant, shape: str) -> None:
    check(session, variant, silu(shape))


@pytest.mark.parametrize(("variant", "config"), [(in_blocks, {"block": 7}), (emitted, {"unroll": 2})])
def test_config_parameters_are_keywords(session: Session, variant: KernelVariant, config: dict[str, int]) -> None:
    problem = silu("3,131")
    assert list(variant.config_space(problem, DEVICE))[1] == config
    executable = session.compile_problem(problem, variant=variant.name, config=config)
    Workload(session, problem).verify(executable)


def test_what_the_descriptor_says() -> None:
    assert half_tanh.key == "cpu/transformer.silu/half_tanh"
    assert half_tanh.summary == "x/2 + x/2 tanh(x/2)."
    assert first_axis.priority == 1
    assert isinstance(half_tanh.build_kernel(silu("3"), {}, DEVICE), PythonKernel)
    assert isinstance(emitted.build_kernel(silu("3"), {"unroll": 1}, DEVICE), NativeKernel)


def test_the_function_is_still_there() -> None:
    assert callable(half_tanh.build)
    function: Callable[..., Any] = half_tanh.build.__wrapped__  # type: ignore[attr-defined]  # set by functools
    assert function(np.float32(0)) == 0


def test_dtypes_attributes_and_layout_are_judged() -> None:
    assert half_tanh.judge(silu("3", "f16"), DEVICE) == Reject("takes f32, bf16, not f16")
    assert first_axis.judge(softmax("3,4", axis=-1), DEVICE) == Reject("takes axis=0, not -1")
    assert first_axis.judge(softmax("3,4,5"), DEVICE) == Reject("takes matrices")
    gapped = silu("3,4", strides="8,1")
    assert emitted.judge(gapped, DEVICE) == Reject("takes tensors without gaps, not f32[3,4]:[8,1]")
    assert half_tanh.judge(gapped, DEVICE) == Accept()


def test_several_results_and_attributes_as_keywords(session: Session) -> None:
    check(
        session,
        both,
        parse_problem("transformer.add_rms_norm(f32[3,8], f32[3,8], f32[8]) -> (f32[3,8], f32[3,8]) {eps=0.001}"),
    )


def test_results_are_rounded_to_their_dtype(session: Session) -> None:
    check(session, half_tanh, silu("3,7", "bf16"))


def test_numba_sees_strides_and_dtypes(session: Session) -> None:
    check(session, each_row, parse_problem(f"{ADD}(f32[3,4]:[1,3], f32[3,4]:[9,2]) -> (f32[3,4]) {{}}"))
    check(session, each_row, parse_problem(f"{ADD}(f64[1,4], f64[1,4]) -> (f64[1,4]) {{}}"))


@pytest.mark.parametrize("bias", ["f32[8]", "_"])
def test_numba_is_given_attributes_and_absent_operands(session: Session, bias: str) -> None:
    check(session, rows, parse_problem(f"transformer.layer_norm(f32[5,8], f32[8], {bias}) -> (f32[5,8]) {{eps=0.01}}"))


@pytest.mark.parametrize("variant", [half_tanh, in_blocks, emitted], ids=lambda v: v.name)
def test_dynamic_dimensions(session: Session, variant: KernelVariant) -> None:
    executable = session.compile_problem(silu("?0,5"), variant=variant.name)
    for tokens in (1, 40, 3):
        x = np.random.default_rng(tokens).standard_normal((tokens, 5)).astype(np.float32)
        np.testing.assert_allclose(executable.run({"x": x})[0], x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


def test_numba_code_is_shared_by_problems_of_other_sizes() -> None:
    three, many = (in_blocks.build_kernel(silu(shape), {"block": 7}, DEVICE) for shape in ("3,5", "?0,9"))
    assert three.phases == many.phases
    assert [table.tolist() for k in (three, many) for table in k.tables] == [[3, 5, 3, 5], [-1, 9, -1, 9]]
    assert three.phases != in_blocks.build_kernel(silu("3"), {"block": 7}, DEVICE).phases


def test_mlir_text(session: Session) -> None:
    check(session, as_text, parse_problem('transformer.cast(i8[1]) -> (i8[1]) {dtype="i8"}'))


def test_selection_takes_part(session: Session) -> None:
    assert session.select(softmax("40,50")).variant.name == "first_axis"
    assert session.select(softmax("40,50", axis=-1)).variant.name == "vectorized"


def test_samples_that_are_accepted_are_right(session: Session) -> None:
    samples = session.registry.ops[SOFTMAX].samples(random.Random(0))
    taken = [p for p in samples if first_axis.judge(p, DEVICE) == Accept()]
    assert taken
    for problem in taken:
        check(session, first_axis, problem)


def test_numpy_result_of_another_shape(session: Session) -> None:
    @kernel(op=SILU, dtypes=("f32",))
    def summed(x: Any) -> Any:
        return x.sum()

    call = summed.build_kernel(silu("3,4"), {}, DEVICE).call
    with pytest.raises(
        PluginError, match=r"kernel 'summed' of transformer.silu returned shape \[\], its result has \[3, 4\]"
    ):
        call([np.zeros((3, 4), np.float32)], [np.zeros((3, 4), np.float32)])


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda x: None, "returned NoneType, its result has float32 numbers"),
        (lambda x: "no numbers", "its result has float32 numbers"),
        (lambda x: x * 1j, "returned complex64, its result has float32 numbers"),
        (lambda x: (x, x), "returned 2 results, it has 1"),
    ],
)
def test_what_cannot_be_a_result(made: Callable[[Any], Any], told: str) -> None:
    call = kernel(op=SILU, dtypes=("f32",))(made).build_kernel(silu("3"), {}, DEVICE).call
    with pytest.raises(PluginError, match=told):
        call([np.zeros(3, np.float32)], [np.zeros(3, np.float32)])


def test_a_kernel_that_fails_is_named_and_cannot_write_to_its_operands() -> None:
    @kernel(op=SILU, dtypes=("f32",))
    def raises(x: Any) -> Any:
        raise ValueError("not today")

    @kernel(op=SILU, dtypes=("f32",))
    def writes(x: Any) -> Any:
        x *= 2
        return x

    class Faulty:
        @staticmethod
        @hookimpl
        def kernelforge_kernels() -> list[KernelVariant]:
            return [raises, writes]

    x = np.ones(3, np.float32)
    with Session("cpu", registry=load_registry(extra_plugins=[Faulty()])) as session:
        for variant, reason in (("raises", "not today"), ("writes", "output array is read-only")):
            executable = session.compile_problem(silu("3"), variant=variant)
            told = rf"'cpu/transformer.silu/{variant}' of plugin Faulty .*: ValueError: {reason}"
            with pytest.raises(PluginError, match=told):
                executable.run({"x": x})
    assert (x == 1).all()


def test_numba_function_with_other_parameters() -> None:
    @kernel(op="transformer.gelu", dtypes=("f32",), language="numba")
    def lacks(x: Any, out: Any, part: int, parts: int) -> None:
        """Has no parameter for the attribute."""

    problem = parse_problem('transformer.gelu(f32[3]) -> (f32[3]) {approximate="none"}')
    with pytest.raises(PluginError, match=r"kernel 'lacks' of transformer\.gelu takes") as caught:
        lacks.build_kernel(problem, {}, DEVICE)
    assert caught.value.hint == "wants (operand0, result0, part, parts, approximate), the arrays by any name"


def test_what_cannot_be_decorated() -> None:
    with pytest.raises(PluginError, match="kernel language 'c' is unknown"):
        kernel(op=SILU, dtypes=("f32",), language="c")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="numba kernels take f64, f32, i64, i32, i8, not f32, bf16"):
        kernel(op=SILU, dtypes=("f32", "bf16"), language="numba")
    with pytest.raises(PluginError, match=r"dtypes of a kernel are some of f64, f32, .*, not float32"):
        kernel(op=SILU, dtypes=("f32", "float32"))
    with pytest.raises(PluginError, match="not 'f32', which is one word"):
        kernel(op=SILU, dtypes="f32")
    with pytest.raises(PluginError, match=r"is not of the form dialect\.op"):
        kernel(op="silu", dtypes=("f32",))(lambda x: x)


def test_an_attribute_that_the_op_lacks() -> None:
    @kernel(op=SILU, dtypes=("f32",), attrs={"axis": 0})
    def odd(x: Any) -> Any:
        return x

    with pytest.raises(
        PluginError, match=r"kernel 'odd' asks for attribute 'axis', which transformer\.silu does not have"
    ):
        odd.judge(silu("3"), DEVICE)


def test_a_space_may_depend_on_the_problem() -> None:
    def space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
        return ConfigSpace((("step", (problem.operand(0).size(), 1)),))

    def last(problem: Problem, device: DeviceInfo) -> dict[str, int]:
        return {"step": 1}

    @kernel(op=SILU, dtypes=("f32",), space=space, default=last)
    def stepped(x: Any, *, step: int) -> Any:
        return x / (1 + np.exp(-x))

    assert [dict(c) for c in stepped.config_space(silu("6"), DEVICE)] == [{"step": 6}, {"step": 1}]
    assert stepped.default_config(silu("6"), DEVICE) == {"step": 1}


def test_records_and_plans_follow_the_code_of_the_plugin(session: Session) -> None:
    assert callable(half_tanh.build)
    assert half_tanh.build.__module__ == __name__
    assert kernel_hash(half_tanh) != kernel_hash(first_axis)
    assert code_stamp(session.registry) is None  # a plugin given as an object has no source to go by


def test_decorating_loads_nothing_heavy() -> None:
    code = """
import sys
from kernelforge_cpu.authoring import kernel
for language in ("numpy", "numba", "mlir"):
    kernel(op="transformer.silu", dtypes=("f32",), language=language)(lambda x: x)
sys.exit(" ".join({"numpy", "numba", "llvmlite", "torch_mlir"} & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stderr.strip() == ""
