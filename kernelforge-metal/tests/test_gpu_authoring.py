"""Kernels from `.wgsl` files: what the file can use, what is refused, and what errors say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernelforge.errors import PluginError
from kernelforge.hookspecs import hookimpl
from kernelforge.plugins import load_registry
from kernelforge.problem import parse_problem
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, DeviceInfo, KernelVariant, Reject
from kernelforge_metal.authoring import kernel
from kernelforge_metal.kernel import (
    Binding,
    Dispatch,
    GpuKernel,
    HostKernel,
    Pack,
    fixed_parameters,
    is_read_only,
    is_value,
    parameter_names,
    shader,
    size_of,
)

SILU = """
@compute @workgroup_size(THREADS)
fn main(ids: Ids) {
  let i = element(ids);
  if (i >= out_size()) { return; }
  let x = load_x(i);
  store_out(i, x / (1.0 + exp(-x)));
}
"""
PROBLEM = parse_problem("transformer.silu(f32[3,70]:[100,1]) -> (f32[3,70]) {}")
NULL = DeviceInfo("gpu", "null", "null", limits=(("max-compute-invocations-per-workgroup", 128),))


def written(folder: Path, text: str = SILU) -> KernelVariant:
    file = folder / "mine.wgsl"
    file.write_text(text, encoding="utf-8")
    return kernel(file, op="transformer.silu", dtypes=("f32", "bf16"), threads=(64, 256), priority=-5)


def test_what_it_takes(tmp_path: Path) -> None:
    mine = written(tmp_path)
    assert (mine.name, mine.op, mine.target) == ("mine", "transformer.silu", "gpu")
    assert mine.judge(PROBLEM, NULL) == Accept()
    half = parse_problem("transformer.silu(f16[3]) -> (f16[3]) {}")
    assert mine.judge(half, NULL) == Reject("takes f32, bf16, not f16")
    assert [dict(c) for c in mine.config_space(PROBLEM, NULL)] == [{"threads": 64}]
    assert mine.version != written(tmp_path, SILU + "// changed\n").version
    causal = kernel(tmp_path / "mine.wgsl", op="transformer.gelu", dtypes=("f32",), attrs={"approximate": "tanh"})
    exact = parse_problem('transformer.gelu(f32[3]) -> (f32[3]) {approximate="none"}')
    assert causal.judge(exact, NULL) == Reject("takes approximate=tanh, not none")
    with pytest.raises(PluginError, match="not f64"):
        kernel(tmp_path / "mine.wgsl", op="transformer.silu", dtypes=("f64",))
    gone = kernel(tmp_path / "gone.wgsl", op="transformer.silu", dtypes=("f32",))
    with pytest.raises(PluginError, match=r"cannot read .*gone\.wgsl: No such file"):
        gone.build_kernel(PROBLEM, {"threads": 64}, NULL)


@pytest.mark.parametrize(
    "text",
    [
        "transformer.silu(f32[3,70]:[100,1]) -> (f32[3,70]) {}",
        "transformer.silu(bf16[5,33]:[1,5]) -> (bf16[5,33]) {}",
    ],
)
def test_it_computes_any_layout(gpu: Session, tmp_path: Path, text: str) -> None:
    mine, problem = written(tmp_path), parse_problem(text)

    class Plugin:
        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [mine]

    before, gpu.registry = gpu.registry, load_registry(allow=["core", "metal"], extra_plugins=[Plugin()])
    try:
        for config in mine.config_space(problem, gpu.device.info):
            Workload(gpu, problem).verify(gpu.compile_problem(problem, variant="mine", config=config))
        dynamic = parse_problem("transformer.silu(f32[?0,6]) -> (f32[?0,6]) {}")
        executable = gpu.compile_problem(dynamic, variant="mine")
        for rows in (1, 50):
            x = np.ones((rows, 6), np.float32)
            (out,) = executable.run({"x": x})
            assert isinstance(out, np.ndarray)
            np.testing.assert_allclose(out, x / (1 + np.exp(-x)), rtol=1e-6)
    finally:
        gpu.registry = before


def test_what_is_written_around_a_dispatch() -> None:
    problem = parse_problem("transformer.add(f32[?0,8], f32[8]@const) -> (f32[?0,8]) {}")
    bindings = (Binding("a", 0), Binding("b", 1, "vec4<f32>"), Binding("out", 2), Binding("t", 3), Binding("s", 4))
    dispatch = Dispatch("fn main() {}", bindings, lambda dims: (dims[0], 1, 1), (("twice", lambda dims: 2 * dims[0]),))
    packs = {1: Pack("plain", lambda array: array)}
    made = GpuKernel((dispatch,), packs, tables=(np.zeros(4, np.float32),), scratch=(64,))
    assert [is_read_only(problem, made, b.index) for b in bindings] == [False, True, False, True, False]
    assert [is_value(problem, b.index) for b in bindings] == [True, False, True, False, False]
    assert parameter_names(problem, dispatch) == ("d0", "twice", "a_at", "out_at")
    assert dispatch.grid([7]) == (7, 1, 1)
    assert [size_of(size, [7]) for _, size in dispatch.parameters] == [14]
    text = shader(problem, made, dispatch, immediates=True)
    assert "@group(0) @binding(1) var<storage, read> b: array<vec4<f32>>;" in text
    assert "@group(0) @binding(4) var<storage, read_write> s: array<f32>;" in text
    assert "var<immediate> p: Parameters;" in text
    assert "var<uniform> p: Parameters;" in shader(problem, made, dispatch, immediates=False)
    assert fixed_parameters(problem, dispatch, {}) is None, "sizes"
    still = parse_problem("transformer.add(f32[4,8], f32[8]@const) -> (f32[4,8]) {}")
    assert fixed_parameters(still, dispatch, {}) is None, "numbers of its own"
    plain = Dispatch("fn main() {}", bindings, (1, 1, 1))
    assert fixed_parameters(still, plain, {0: 3}) == (3, 0)
    text = shader(still, made, plain, immediates=True, fixed=(3, 0))
    assert "struct Parameters { a_at: u32, out_at: u32 }\nconst p = Parameters(3u, 0u);" in text
    assert "immediate" not in text
    many = Dispatch("", (), (1, 1, 1), tuple((f"n{i}", i) for i in range(40)))
    with pytest.raises(PluginError, match="has 41 parameters"):
        parameter_names(problem, many)


@pytest.mark.filterwarnings("ignore:.*run on the host, slowly")
def test_a_kernel_may_run_on_the_host(gpu: Session) -> None:
    def build(problem: object, config: object, device: object) -> HostKernel:
        return HostKernel(lambda operands, results: np.copyto(results[0], 7.0))

    class Plugin:
        @hookimpl
        def kernelforge_kernels(self) -> list[KernelVariant]:
            return [KernelVariant("seven", "transformer.silu", "gpu", build, priority=-5)]

    before, gpu.registry = gpu.registry, load_registry(allow=["core", "metal"], extra_plugins=[Plugin()])
    try:
        (out,) = gpu.compile_problem(PROBLEM, variant="seven").run({"x": np.ones((3, 100), np.float32)})
    finally:
        gpu.registry = before
    assert isinstance(out, np.ndarray)
    assert (out == 7.0).all()
