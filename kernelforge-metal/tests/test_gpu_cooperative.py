"""Cooperative matrices: used where one product of them was right, and nowhere else."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import DeviceError, KernelForgeWarning
from kernelforge.problem import Problem, parse_problem
from kernelforge.session import Session
from kernelforge.tune.verify import Workload
from kernelforge.variant import Accept, DeviceInfo, Reject
from kernelforge_metal import cooperative
from kernelforge_metal.adapters import COOPERATIVE, Adapter
from kernelforge_metal.cooperative import Matrices, candidates, examine, trial_shader, tried, usable
from kernelforge_metal.errors import DeviceLost, OutOfMemory
from kernelforge_metal.kernel import GpuKernel, extensions, shader
from kernelforge_metal.kernels.matmul import VARIANTS
from kernelforge_metal.native import _request

Array = np.ndarray[Any, np.dtype[Any]]

GEMM = next(v for v in VARIANTS if v.name == "gemm-cooperative")
SMALL = {"rows": 32, "columns": 32, "steps": 32, "part_rows": 16, "part_columns": 32, "prefetch": 1}
KINDS = (Matrices(8, "f32"), Matrices(8, "f16"))


def linear(x: str, w: str, more: str = "_, _", epilogue: str = "none") -> Problem:
    """x[m,k] w[n,k]^T."""
    (m, n), dtype = [re.findall(r"\d+(?=,)", operand)[0] for operand in (x, w)], x.partition("[")[0]
    attributes = f'{{epilogue="{epilogue}", transpose_lhs=false, transpose_rhs=true}}'
    return parse_problem(f"transformer.matmul({x}, {w}, {more}) -> ({dtype}[{m},{n}]) {attributes}")


def device(missing: str = "", /, **limits: int) -> DeviceInfo:
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    return DeviceInfo(
        "gpu",
        "null",
        "null",
        frozenset([COOPERATIVE] if limits else []),
        tuple(sorted(named.items())),
        missing=((COOPERATIVE, missing),) if missing else (),
    )


def adapter(api: str = "Vulkan", kind: str = "discrete", *features: str) -> Adapter:
    wanted = frozenset(features or (COOPERATIVE, "shader-f16", "subgroup"))
    return Adapter("Card 7", kind, api, "driver 1.2", (1, 2), wanted, ())


# --- the feature test ---


def fake(*, loads_turned: bool = False, stores_turned: bool = False, off: float = 0.0) -> Callable[[str, Array], Array]:
    """A device that carries out the feature test, in one of the ways in which wgpu may."""

    def run(code: str, x: Array) -> Array:
        size = re.search(r"coop_mat(\d+)x", code)
        assert size is not None
        left, right = x.reshape(2, int(size[1]), int(size[1]))

        def loaded(role: str, numbers: Array) -> Array:
            by_rows = bool(re.search(rf"coopLoadT<coop_mat\w+<f\d\d, {role}>>", code)) != loads_turned
            return numbers if by_rows else numbers.T

        sums = 2 * loaded("A", left) @ loaded("B", right) + off
        by_rows = ("coopStoreT" in code) != stores_turned
        return np.concatenate([(sums if by_rows else sums.T).ravel(), np.zeros(left.size, np.float32)])

    return run


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("stores", [False, True])
def test_the_form_that_computes_rightly_is_found_and_used(loads: bool, stores: bool) -> None:
    found = tried(KINDS, fake(loads_turned=loads, stores_turned=stores))
    assert found == dict.fromkeys(("cooperative-matrix-f32-8", "cooperative-matrix-f16-8"), loads + 2 * stores)
    made = device(**{name.replace("-", "_"): int(form) for name, form in found.items()})
    kind = usable(made, "f16")
    assert kind == Matrices(8, "f16", loads, stores)
    kernel = GEMM.build_kernel(linear("f32[64,64]", "f32[64,64]@const"), SMALL, made)
    assert isinstance(kernel, GpuKernel)
    code = kernel.dispatches[0].code
    assert ("coopLoadT<coop_mat8x8<f32, B>>" in code) == (not loads)  # the slab of rhs has a step in each row
    assert ("coopLoadT<coop_mat8x8<f32, A>>" in code) == loads
    assert ("coopStoreT(" in code) == (not stores)


def test_wrong_numbers_and_failures_are_told() -> None:
    found = tried(KINDS, fake(off=0.5))
    assert re.fullmatch(r"wrong numbers, by up to [\d.]+ of [\d.]+", str(found["cooperative-matrix-f32-8"]))

    def fails(code: str, x: Array) -> Array:
        raise DeviceError("the GPU cannot compile")

    assert set(tried(KINDS, fails).values()) == {"does not run: the GPU cannot compile"}


def test_largest_matrices_are_taken() -> None:
    both = device(cooperative_matrix_f16_8=0, cooperative_matrix_f16_16=3)
    assert usable(both, "f16") == Matrices(16, "f16", loads_turned=True, stores_turned=True)
    assert usable(both, "f32") is None


def test_only_kinds_that_such_a_gpu_may_have_are_tried() -> None:
    assert candidates(adapter("Metal", "integrated")) == KINDS
    assert candidates(adapter("Vulkan", "software")) == KINDS
    assert candidates(adapter()) == (Matrices(16, "f16"),)


def opened(features: set[str], refused: dict[str, str] | None = None) -> Any:
    return SimpleNamespace(features=frozenset(features), refused=refused or {}, version="1.2")


ALL = {COOPERATIVE, "shader-f16", "subgroup"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    return tmp_path / "cache" / "cooperative"


def test_right_numbers_switch_them_on_and_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake()
    monkeypatch.setattr(cooperative, "multiply", lambda gpu, code, x: run(code, x))
    made = examine(opened(ALL), adapter())
    assert COOPERATIVE in made.features
    assert made.limit("cooperative-matrix-f16-16", -1) == 0
    assert made.missing == ()
    monkeypatch.setattr(cooperative, "multiply", None)
    assert examine(opened(ALL), adapter()) == made


def test_wrong_numbers_switch_them_off_and_are_said_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake(off=1.0)
    monkeypatch.setattr(cooperative, "multiply", lambda gpu, code, x: run(code, x))
    with pytest.warns(KernelForgeWarning, match=r"Card 7: the feature test failed, cooperative-matrix-f16-16: wrong"):
        made = examine(opened(ALL), adapter())
    assert COOPERATIVE not in made.features
    assert dict(made.missing)[COOPERATIVE].startswith("feature test failed: cooperative-matrix-f16-16: wrong numbers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert examine(opened(ALL), adapter()) == made
    (kept,) = cache.iterdir()
    for damaged in (3, {}, {"max-buffer-size": 1}, {"cooperative-matrix-f16-16": 4}):  # tried again
        kept.write_text(json.dumps({"forms": damaged}))
        with pytest.warns(KernelForgeWarning, match="feature test failed"):
            assert examine(opened(ALL), adapter()) == made


def test_a_test_that_does_not_end_is_not_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(gpu: object, code: str, x: Array) -> Array:
        raise SystemExit

    monkeypatch.setattr(cooperative, "multiply", dies)
    with pytest.raises(SystemExit):
        examine(opened(ALL), adapter())
    made = examine(opened(ALL), adapter())
    assert COOPERATIVE not in made.features
    (kept,) = cache.iterdir()
    assert f"the test did not end; delete {kept} to try again" in dict(made.missing)[COOPERATIVE]


def test_what_is_of_the_moment_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake()

    def full(gpu: object, code: str, x: Array) -> Array:
        raise OutOfMemory("no memory")

    def lost(gpu: object, code: str, x: Array) -> Array:
        raise DeviceLost("lost")

    monkeypatch.setattr(cooperative, "multiply", full)
    with pytest.warns(KernelForgeWarning, match="were not tried this time: no memory"):
        made = examine(opened(ALL), adapter())
    assert COOPERATIVE not in made.features
    assert "not tried this time" in dict(made.missing)[COOPERATIVE]
    monkeypatch.setattr(cooperative, "multiply", lost)
    with pytest.raises(DeviceLost):
        examine(opened(ALL), adapter())
    monkeypatch.setattr(cooperative, "multiply", lambda gpu, code, x: run(code, x))
    assert COOPERATIVE in examine(opened(ALL), adapter()).features


def test_a_device_that_the_test_loses_twice_does_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(gpu: object, code: str, x: Array) -> Array:
        raise DeviceLost("lost")

    monkeypatch.setattr(cooperative, "multiply", lost)
    for _ in range(2):
        with pytest.raises(DeviceLost):
            examine(opened(ALL), adapter())
    made = examine(opened(ALL), adapter())
    (kept,) = cache.iterdir()
    assert f"the test lost the device twice; delete {kept} to try again" in dict(made.missing)[COOPERATIVE]


def test_another_text_of_the_test_is_tried(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier version found says nothing of kernels that are written in another way."""
    runs = [fake(), fake(off=1.0)]
    monkeypatch.setattr(cooperative, "multiply", lambda gpu, code, x: runs[0](code, x))
    assert COOPERATIVE in examine(opened(ALL), adapter()).features
    monkeypatch.setattr(cooperative, "trial_shader", lambda kind: trial_shader(kind) + "// in another way\n")
    monkeypatch.setattr(cooperative, "multiply", lambda gpu, code, x: runs[1](code, x))
    with pytest.warns(KernelForgeWarning, match="feature test failed"):
        assert COOPERATIVE not in examine(opened(ALL), adapter()).features


# --- what wgpu refuses ---


class Refusing:
    """An adapter whose devices do without some of the features that it lists."""

    def __init__(self, *refused: str) -> None:
        self.refused = set(refused)
        self.asked: list[list[str]] = []

    def request_device_sync(self, required_features: list[str]) -> list[str]:
        self.asked.append(required_features)
        if self.refused & set(required_features):
            raise RuntimeError("Request device failed\n\nCaused by:\n  experimental features are not enabled\n")
        return required_features


def test_an_experimental_feature_that_is_refused_costs_one_request() -> None:
    asked = Refusing(COOPERATIVE)
    got, refused = _request(asked, ALL)
    assert got == ["shader-f16", "subgroup"]
    assert refused == {COOPERATIVE: "experimental features are not enabled"}
    assert len(asked.asked) == 2
    got, refused = _request(Refusing(COOPERATIVE, "subgroup"), ALL)
    assert got == ["shader-f16"]
    assert set(refused) == {COOPERATIVE, "subgroup"}
    assert _request(Refusing(), ALL) == (sorted(ALL), {})


def test_reasons(cache: Path) -> None:
    problem = linear("f32[64,64]", "f16[64,64]@const")
    listed = examine(opened(ALL - {COOPERATIVE}, {COOPERATIVE: "experimental features are not enabled"}), adapter())
    reason = "wgpu does not hand out cooperative matrices: experimental features are not enabled"
    assert GEMM.judge(problem, listed) == Reject(reason)
    none = examine(opened(ALL - {COOPERATIVE}), adapter())
    assert GEMM.judge(problem, none) == Reject("the adapter has no cooperative matrices")
    assert GEMM.judge(problem, device()) == Reject("the adapter has no cooperative matrices")
    assert GEMM.judge(problem, device("feature test failed: x")) == Reject("feature test failed: x")
    bare = examine(opened({COOPERATIVE}), adapter())
    assert dict(bare.missing) == {COOPERATIVE: "cooperative matrices are used with subgroup and shader-f16 only"}
    half = device(cooperative_matrix_f16_16=0)
    assert GEMM.judge(problem, half) == Reject("this device's cooperative matrices take f16 only, not f32, f16")
    assert GEMM.judge(linear("f16[64,64]", "f16[64,64]@const"), half) == Accept()
    assert GEMM.judge(problem, device(cooperative_matrix_f32_8=0)) == Accept()


# --- shaders ---


def test_extensions_come_first() -> None:
    assert extensions("let a = unpack2x16float(b);") == []
    made = device(cooperative_matrix_f16_8=0, max_compute_workgroup_storage_size=32768)
    problem = linear("f16[64,64]", "f16[64,64]@const")
    kernel = GEMM.build_kernel(problem, GEMM.default_config(problem, made), made)
    text = shader(problem, kernel, kernel.dispatches[0], immediates=True)
    assert text.splitlines()[:2] == ["enable f16;", "enable wgpu_cooperative_matrix;"]
    assert trial_shader(KINDS[0]).startswith("enable wgpu_cooperative_matrix;\n")
    assert trial_shader(KINDS[1]).startswith("enable f16;\nenable wgpu_cooperative_matrix;\n")


def test_every_config_fits_the_device() -> None:
    for scalar, size, bits in (("f32", 8, 4), ("f16", 16, 2)):
        named = {f"cooperative_matrix_{scalar}_{size}": 0}
        made = device(max_compute_workgroup_storage_size=32768, max_compute_invocations_per_workgroup=256, **named)
        problem = linear(f"{scalar}[512,256]", f"{scalar}[512,256]@const")
        space = GEMM.config_space(problem, made)
        configs = list(space)
        assert len(configs) > 10
        assert GEMM.default_config(problem, made) in configs
        for config in configs:
            (dispatch,) = GEMM.build_kernel(problem, config, made).dispatches
            arrays = re.findall(r"var<workgroup> \w+: array<(f16|f32), (\d+)>", dispatch.code)
            assert len(arrays) == 3
            assert sum(int(count) * (bits if kind == scalar else 4) for kind, count in arrays) + 4 <= 32768
            found = re.search(r"@workgroup_size\((\d+)\)", dispatch.code)
            assert found is not None
            assert 32 <= int(found[1]) <= 256


PROBLEMS = (
    linear("f32[40,50]", "f32[36,50]@const"),
    linear("f16[33,64]", "f16[64,64]@const"),
    linear("f32[33,64]", "q4[37,64]@const"),
    linear("f32[33,64]", "bf16[64,64]@const", "f32[64], f32[33,64]", epilogue="silu"),
)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_products(gpu: Session, problem: Problem) -> None:
    if COOPERATIVE not in gpu.device.info.features:
        pytest.skip(dict(gpu.device.info.missing)[COOPERATIVE])
    work = Workload(gpu, problem)
    work.verify(gpu.compile_problem(problem, constants=work.constants, variant="gemm-cooperative", config=SMALL))


def test_a_real_device_says_what_it_has(gpu: Session) -> None:
    made = gpu.device.info
    assert (COOPERATIVE in made.features) == (COOPERATIVE not in dict(made.missing))
    verdict = GEMM.judge(linear("f16[64,64]", "f16[64,64]@const"), made)
    assert verdict == (Accept() if COOPERATIVE in made.features else Reject(dict(made.missing)[COOPERATIVE]))
