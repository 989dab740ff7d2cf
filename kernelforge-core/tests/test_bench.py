from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_target
import numpy as np
import pytest
from fake_target import Array, Kernel, Outputs, variant

from kernelforge.bench import process
from kernelforge.bench.baseline import Change, compare_reports, load_report
from kernelforge.bench.harness import in_sequence
from kernelforge.bench.latency import Latency
from kernelforge.bench.matmul import benchmark_matmul, matmul_problem, open_peers, summary
from kernelforge.bench.peers import NumpyPeer, TorchPeer, open_peer
from kernelforge.bench.suite import CASES, chosen_cases, run_case, run_suite
from kernelforge.cli import bench_verbs, output
from kernelforge.constant import Named
from kernelforge.dtype import to_numpy
from kernelforge.errors import (
    AssetError,
    KernelForgeError,
    KernelForgeWarning,
    RegressionError,
    UsageError,
    WrongResultError,
)
from kernelforge.problem import Problem
from kernelforge.registry import Registry
from kernelforge.session import Session
from kernelforge.tune.records import RecordStore
from kernelforge.variant import INT8_ACTIVATIONS, ConfigSpace, KernelVariant, Reject

# It is a dependency of kernelforge-cpu, and these tests must pass without.
pytestmark = pytest.mark.filterwarnings("ignore:threadpoolctl is not installed")


def session(*variants: KernelVariant) -> Session:
    return fake_target.session(RecordStore.default(), *variants)


def wrong(problem: Problem, operands: Sequence[Array | None], results: Outputs) -> Outputs:
    return (-results[0],)


# statistics


def test_latency_is_order_statistics() -> None:
    samples = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0]
    latency = Latency.of(samples)
    assert (latency.median, latency.minimum, latency.maximum, latency.count) == (3.5, 1.0, 100.0, 6)
    assert (latency.p5, latency.p95) == pytest.approx(tuple(np.percentile(samples, [5, 95])))
    assert latency.mad == 1.5
    assert latency.milliseconds()["median"] == 3500.0
    single = Latency.of([2.0])
    assert (single.p5, single.p95, single.mad) == (2.0, 2.0, 0.0)
    with pytest.raises(ValueError, match="no samples"):
        Latency.of([])


# matmul

beside_host = pytest.mark.filterwarnings("ignore:.* measured on the processor")


def test_matmul_reports_speed_variant_error_and_peers() -> None:
    space = ConfigSpace((("tile", (4, 8)),))
    with session(variant("mine", lambda c: Kernel(seconds=1e-4), space=space)) as opened:
        problem = matmul_problem(opened.registry, 64, 32, 16)
        with (
            open_peers(["numpy"], 2) as peers,
            pytest.warns(KernelForgeWarning, match="numpy: measured on the processor"),
        ):
            (report,) = benchmark_matmul(opened, [problem], peers=peers, repeat=2)
    assert (report["m"], report["n"], report["k"], report["dtype"]) == (64, 32, 16, "f32")
    assert (report["variant"], report["config"], report["config_source"]) == ("mine", {"tile": 4}, "default")
    assert report["latency_ms"] == 0.1
    assert report["gflops"] == pytest.approx(2 * 64 * 32 * 16 / 1e-4 / 1e9, rel=1e-3)
    assert report["gbytes_s"] == pytest.approx(4 * (64 * 16 + 16 * 32 + 64 * 32) / 1e-4 / 1e9, rel=1e-3)
    assert 0 <= report["rel_error"] <= report["tolerance"]
    assert (report["timing_source"], report["threads"]) == ("scripted", 2)
    peer = report["peers"]["numpy"]
    assert peer["gflops"] > 0
    assert peer["ratio"] == pytest.approx(peer["latency_ms"] / 0.1, rel=1e-3)
    assert (peer["version"], peer["device"], peer["computes"]) == (np.__version__, "cpu", "f32")


def test_a_wrong_result_is_never_timed() -> None:
    def never() -> None:
        pytest.fail("a wrong kernel was timed")

    with session(variant("bad", lambda c: Kernel(wrong, on_measure=never))) as opened:
        problem = matmul_problem(opened.registry, 8, 8, 8)
        with pytest.raises(WrongResultError, match=r"result 'out' of transformer\.matmul has"):
            benchmark_matmul(opened, [problem])


@beside_host
def test_types_of_weights_take_turns_with_peers_of_the_first() -> None:
    with session(variant("mine", lambda c: Kernel(seconds=1e-4))) as opened:
        problems = [matmul_problem(opened.registry, 8, 4, 6, dtype) for dtype in ("f32", "bf16")]
        with open_peers(["numpy"], 2) as peers:
            reports = benchmark_matmul(opened, problems, peers=peers, repeat=2)
    assert [r["dtype"] for r in reports] == ["f32", "bf16"]
    assert [r["peers"]["numpy"]["computes"] for r in reports] == ["f32", "f32"]


def test_a_summary_compares_with_the_better_peer_and_the_first_type() -> None:
    def report(m: int, dtype: str, ms: float, *ratios: float) -> dict[str, Any]:
        peers = {str(i): {"ratio": ratio} for i, ratio in enumerate(ratios)}
        return {"m": m, "n": 1, "k": 1, "dtype": dtype, "latency_ms": ms, "peers": peers}

    reports = [
        report(1, "f32", 3.0, 2, 9),
        report(1, "f16", 1.0, 6, 7),
        report(2, "f32", 4.0, 8, 2),
        report(2, "f16", 1.0, 9, 6),
    ]
    assert summary(reports) == {
        "f32": {"best_peer_geomean": 2.0, "best_peer_min": 2.0},
        "f16": {"best_peer_geomean": 6.0, "best_peer_min": 6.0, "first_dtype_geomean": 3.464, "first_dtype_min": 3.0},
    }
    assert summary([report(1, "f32", 3.0)]) == {"f32": {}}


def test_a_variant_can_be_asked_for() -> None:
    with session(variant("a", priority=1), variant("b")) as opened:
        problem = matmul_problem(opened.registry, 8, 8, 8)
        (report,) = benchmark_matmul(opened, [problem], variant="b", repeat=1)
        assert report["variant"] == "b"
        with pytest.raises(UsageError, match="unknown variant 'c'"):
            benchmark_matmul(opened, [problem], variant="c")


@beside_host
@pytest.mark.parametrize(("dtype", "nbytes"), [("q8", 34), ("q4", 18)])
def test_quantised_weights_count_with_their_scales_beside_peers_of_f32(dtype: str, nbytes: int) -> None:
    with session(variant("mine", lambda c: Kernel(seconds=1e-4))) as opened:
        problem = matmul_problem(opened.registry, 2, 48, 64, dtype, device=opened.device.info)
        with open_peers(["numpy"], 2) as peers:
            (report,) = benchmark_matmul(opened, [problem], peers=peers, repeat=1)
    assert str(problem).startswith(f"transformer.matmul(f32[2,64], {dtype}[48,64]@const, _, _) -> (f32[2,48])")
    assert (report["m"], report["n"], report["k"]) == (2, 48, 64)
    assert (report["dtype"], report["activations"]) == (dtype, "f32")
    assert report["gbytes_s"] == pytest.approx((48 * 2 * nbytes + 4 * 2 * (64 + 48)) / 1e-4 / 1e9, rel=1e-3)
    assert report["gflops"] == pytest.approx(2 * 2 * 48 * 64 / 1e-4 / 1e9, rel=1e-3)
    assert report["peers"]["numpy"]["computes"] == "f32"


def test_activations_are_in_8_bits_where_the_device_is_fastest_so() -> None:
    with session() as opened:
        info = opened.device.info
        device = replace(info, features=info.features | {INT8_ACTIVATIONS})
        problem = matmul_problem(opened.registry, 2, 48, 64, "q8", device=device)
        assert str(problem.operand(0)) == "q8a[2,64]"
        assert str(matmul_problem(opened.registry, 2, 48, 64, device=device).operand(0)) == "f32[2,64]"


@pytest.mark.parametrize(("activations", "dtype"), [("f32", "f32"), ("q8", "q8a")])
def test_activations_are_in_the_format_that_was_asked_for(activations: str, dtype: str) -> None:
    with session() as opened:
        info = opened.device.info
        for device in (info, replace(info, features=info.features | {INT8_ACTIVATIONS})):
            problem = matmul_problem(opened.registry, 2, 48, 64, "q4", activations=activations, device=device)
            assert str(problem.operand(0)) == f"{dtype}[2,64]"
        with pytest.raises(UsageError, match="unknown format of activations 'i8'"):
            matmul_problem(opened.registry, 2, 48, 64, "q4", activations="i8")


def test_products_in_a_row_have_weights_of_their_own() -> None:
    with session(variant("mine", lambda c: Kernel(seconds=1e-4))) as opened:
        problem = matmul_problem(opened.registry, 2, 48, 64, "q8")
        (report,) = benchmark_matmul(opened, [problem], repeat=1, copies=4)
        weights = {"rhs": np.zeros((48, 2), to_numpy("q8"))}
        plan = in_sequence(opened.compile_problem(problem, constants=weights).plan, 4)
        floats = matmul_problem(opened.registry, 8, 8, 8, constant=False)
        with pytest.raises(UsageError, match="there are no weights to copy"):
            benchmark_matmul(opened, [floats], copies=2)
    read = [plan.values[step.operands[1] or 0].constant for step in plan.steps]
    assert [constant.name for constant in read if isinstance(constant, Named)] == ["rhs", "rhs.1", "rhs.2", "rhs.3"]
    assert len({step.group for step in plan.steps}) == 4
    each = report["in_sequence"]
    assert (each["copies"], each["constant_bytes"], each["timing_source"]) == (4, 4 * 48 * 2 * 34, "scripted")
    assert each["latency_ms"] == pytest.approx(report["latency_ms"])
    assert each["gbytes_s"] == pytest.approx(report["gbytes_s"], rel=1e-3)


def test_a_row_of_products_is_verified() -> None:
    kernels = iter([Kernel(), Kernel(wrong)])
    with session(variant("moody", lambda c: next(kernels))) as opened:
        problem = matmul_problem(opened.registry, 2, 48, 64)
        with pytest.raises(WrongResultError, match=r"result 'out' of transformer\.matmul has"):
            benchmark_matmul(opened, [problem], copies=2)


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((0, 1, 1), "f32", "--m must be at least 1, got 0"),
        ((1, 1, 1), "i8", "matmul has no dtype 'i8'"),
        ((1, 1, 48), "q4", "--k must be a multiple of 32 for q4 weights, got 48"),
    ],
)
def test_matrices_that_are_none(sizes: tuple[int, int, int], dtype: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        matmul_problem(fake_target.registry(), *sizes, dtype)


def test_quantised_matrices_are_weights() -> None:
    with pytest.raises(UsageError, match="q8 weights are constants") as raised:
        matmul_problem(fake_target.registry(), 1, 1, 32, "q8", constant=False)
    assert raised.value.hint == "leave --no-constant out"


# peers


def test_numpy_widens_what_it_cannot_multiply() -> None:
    peer = NumpyPeer(1)
    assert peer.load(2, 2, 2, "bf16") == "f32"
    assert peer.load(2, 2, 2, "f64") == "f64"
    assert len(peer.run(3).samples) == 3


def test_without_threadpoolctl_numpys_threads_are_not_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.warns(KernelForgeWarning, match="threadpoolctl is not installed"):
        peer = NumpyPeer(1)
    peer.load(2, 2, 2, "f32")
    assert len(peer.run(1).samples) == 1


TORCH = """
import os, time
from types import SimpleNamespace
__version__ = "9.9"
float64, float32, bfloat16, float16 = "f64", "f32", "bf16", "f16"

class inference_mode:
    def __enter__(self): pass
    def __exit__(self, *reason): pass

class Tensor:
    def to(self, dtype): return self
    def t(self): return self
    def contiguous(self): return self

def set_num_threads(n):
    assert os.environ["OMP_NUM_THREADS"] == str(n) == "2"

def randn(*shape): return Tensor()
def empty(*shape, dtype): return Tensor()

def matmul(a, b, out):
    if os.environ.get("DIE"): os._exit(3)
    time.sleep(0.01)

def linear(a, w): raise RuntimeError("not for this type")
def packed(a, w, *rest): sum(range(1000))

nn = SimpleNamespace(functional=SimpleNamespace(linear=linear))
backends = SimpleNamespace(mkldnn=SimpleNamespace(is_available=lambda: True))
mkldnn = SimpleNamespace(_reorder_linear_weight=lambda w, m: w, _linear_pointwise=packed)
ops = SimpleNamespace(mkldnn=mkldnn)
"""


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for torch, and an interpreter that sees it."""
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(process.PEER_PYTHON, sys.executable)
    return tmp_path


@pytest.mark.usefixtures("torch")
def test_torch_answers_from_a_process_of_its_own() -> None:
    peer = TorchPeer(2)
    try:
        assert peer.version == "9.9"
        assert peer.load(8, 8, 8, "bf16") == "bf16"
        assert len(peer.run(5).samples) == 5
        assert max(peer.run(2).samples) < 0.01, "not the quickest form"
        assert peer.load(4, 8, 8, "f32") == "f32"
    finally:
        peer.close()


@pytest.mark.usefixtures("torch")
@beside_host
def test_torch_is_measured_in_turn_with_ours() -> None:
    with session(variant("mine")) as opened:
        problem = matmul_problem(opened.registry, 8, 8, 8)
        with open_peers(["torch", "numpy"], 2) as peers:
            (report,) = benchmark_matmul(opened, [problem], peers=peers, repeat=2)
    assert list(report["peers"]) == ["torch", "numpy"]
    assert report["peers"]["torch"]["version"] == "9.9"


def test_torch_needs_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(process.PEER_PYTHON, raising=False)
    with pytest.raises(UsageError, match="the peer 'torch' needs KERNELFORGE_PEER_PYTHON") as raised:
        open_peer("torch", 2)
    assert "interpreter of an environment with torch" in str(raised.value.hint)
    monkeypatch.setenv(process.PEER_PYTHON, "/no/such/python")
    with pytest.raises(AssetError, match=r"KERNELFORGE_PEER_PYTHON=/no/such/python cannot be started"):
        open_peer("torch", 2)


def test_an_interpreter_without_torch(torch: Path) -> None:
    (torch / "torch.py").write_text("raise ImportError('libtorch is missing')")
    with pytest.raises(AssetError, match=r"the peer 'torch' failed: ImportError: libtorch is missing") as raised:
        open_peer("torch", 2)
    assert sys.executable in str(raised.value.hint)


def test_a_peer_that_dies_or_talks_nonsense(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIE", "1")
    peer = TorchPeer(2)
    with pytest.raises(AssetError, match="the peer 'torch' failed: ended with 3"):
        peer.load(2, 2, 2, "f32")
    (torch / "torch.py").write_text("print('hello from torch')\n" + TORCH)
    with pytest.raises(AssetError, match=r"the peer 'torch' failed: answered 'hello from torch\\n'"):
        open_peer("torch", 2)


def test_a_peer_that_does_not_answer(torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (torch / "torch.py").write_text("import sys; sys.stdin.read()")
    monkeypatch.setattr(process, "_START_S", 0.5)
    with pytest.raises(AssetError, match="the peer 'torch' failed: no answer within"):
        open_peer("torch", 2)


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown peer 'jax'") as raised:
        open_peer("jax", 2)
    assert raised.value.hint == "one of: numpy, torch, torch-cuda"


# suite


def test_every_case_is_a_problem_and_the_promised_ones_are_there() -> None:
    ops = fake_target.registry().ops
    problems = {case.name: case.problem(ops) for case in CASES}
    assert len(problems) == len(CASES)
    assert len({str(p) for p in problems.values()}) == len(CASES)
    for name, (m, n, k) in {
        "decoder_mha_qkv": (64, 64, 128),
        "decoder_mlp_up_proj": (128, 192, 192),
        "decoder_mlp_down_proj": (128, 128, 256),
    }.items():
        assert problems[name].operand(0).shape == (m, k)
        assert problems[name].results[0].shape == (m, n)
    assert {p.op.partition(".")[2] for p in problems.values()} >= {"matmul", "attention", "rms_norm", "rope", "softmax"}


def test_cases_are_chosen_by_name() -> None:
    assert [c.name for c in chosen_cases("mlp_up_proj")] == ["decoder_mlp_up_proj"]
    assert chosen_cases() == list(CASES)
    with pytest.raises(UsageError, match="no case is named 'conv'"):
        chosen_cases("conv")


def test_a_case_reports_success_and_every_kind_of_failure() -> None:
    case = chosen_cases("decoder_mha_qkv")[0]

    def status(*variants: KernelVariant) -> Mapping[str, Any]:
        with session(*variants) as opened:
            return run_case(opened, case, repeat=1)

    def explode(config: object) -> Kernel:
        raise OSError("no compiler")

    good = status(variant("good"))
    assert (good["status"], good["variant"], good["latency_ms"]) == ("ok", "good", 1.0)
    assert good["rel_error_l2"] <= good["rel_error"]
    bad = status(variant("bad", lambda c: Kernel(wrong)))
    assert bad["status"] == "wrong-result"
    assert "relative error 2" in bad["message"]
    none = status(variant("no", supports=lambda problem, device: Reject("too small")))
    assert none["status"] == "unsupported"
    assert none["message"].endswith("(no: too small)")
    broken = status(variant("broken", explode))
    assert broken["status"] == "error"
    assert re.search(
        r"'fake/transformer\.matmul/broken' of plugin .* cannot be built .*: OSError: no compiler", broken["message"]
    )


def test_a_report_says_where_it_was_made() -> None:
    with session(variant("v")) as opened:
        report = run_suite(opened, chosen_cases("decoder_mha_qkv"), {"python": "3"}, repeat=1)
    assert (report["schema"], report["target"], report["environment"]) == (1, "fake", {"python": "3"})
    assert report["device"] == {"name": "fake device", "fingerprint": "fake-0", "threads": 2}
    assert [case["name"] for case in report["cases"]] == ["decoder_mha_qkv"]


# baseline


def test_a_change_must_exceed_threshold_and_noise() -> None:
    assert Change("x", 1.0, 1.3, spread_ms=0.05).verdict() == "slower"
    assert Change("x", 1.0, 1.3, spread_ms=0.2).verdict() == "same"
    assert Change("x", 1.0, 1.05, spread_ms=0.0).verdict() == "same"
    assert Change("x", 1.0, 1.05, spread_ms=0.0).verdict(threshold=0.01) == "slower"
    assert Change("x", 1.3, 1.0, spread_ms=0.05).verdict() == "faster"
    assert Change("x", 1.3, 1.0, spread_ms=0.2).verdict() == "same"


def report(median: float = 1.0, mad: float = 0.01, **changes: Any) -> dict[str, Any]:
    case = {"name": "a", "status": "ok", "problem": "p", "latency": {"median": median, "mad": mad}}
    device = {"name": "d", "fingerprint": "f", "threads": 2}
    return {"schema": 1, "target": "cpu", "device": device, "cases": [case]} | changes


def test_only_the_same_problem_is_compared() -> None:
    (change,) = compare_reports(report(1.0), report(1.5, mad=0.02))
    assert (change.name, change.ratio) == ("a", 1.5)
    assert change.spread_ms == pytest.approx(0.02 * 1.4826)
    other = report()
    other["cases"][0]["problem"] = "q"
    assert compare_reports(other, report()) == []
    assert compare_reports(report(cases=[{"name": "a", "status": "error"}]), report()) == []


def test_baselines_of_other_machines() -> None:
    with pytest.raises(UsageError, match="the baseline is of target 'gpu', this run of 'cpu'"):
        compare_reports(report(target="gpu"), report())
    with pytest.warns(KernelForgeWarning, match="the baseline was measured on another device"):
        assert compare_reports(report(device={"name": "other"}), report())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no report of benchmark-suite"),
        ('{"schema": 7, "cases": []}', "is no report of benchmark-suite"),
        ('{"schema": 1, "cases": [{"status": "ok"}]}', "has a case that cannot be read"),
        ('{"schema": 1, "cases": [{"name": "a", "status": "ok", "latency": {"median": "1"}}]}', "cannot be read"),
        (
            '{"schema": 1, "cases": [{"name": "a", "status": "ok", "latency": {"median": 0, "mad": 0}}]}',
            "cannot be read",
        ),
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(AssetError, match=message):
        load_report(path)


def test_a_missing_baseline(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="cannot read the baseline"):
        load_report(tmp_path / "none.json")


# the verbs


def run_suite_verb(registry: Registry, **options: Any) -> dict[str, Any]:
    out = fake_target.FakeOutput(registry)
    with output.use(out):
        try:
            bench_verbs.suite(**{"substring": "decoder_mha_qkv", "repeat": 1, **options})
        finally:
            data = out.data
    return data


def matmul_registry(seconds: float = 1e-3, **kernel: Any) -> Registry:
    return fake_target.registry(variant("v", lambda c: Kernel(seconds=seconds, **kernel)))


def test_the_suite_writes_its_report_and_finds_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reports" / "base.json"
    data = run_suite_verb(matmul_registry(), file=path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(data))
    again = run_suite_verb(matmul_registry(), baseline=path)
    assert [c["verdict"] for c in again["comparison"]] == ["same"]
    shown = capsys.readouterr().out
    assert "decoder_mha_qkv" in shown
    assert f"report: {path}" in shown


def test_a_regression_names_the_case_and_keeps_the_report(tmp_path: Path) -> None:
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    run_suite_verb(matmul_registry(1e-3), file=base)
    message = r"slower than the baseline: decoder_mha_qkv \(1 -> 2 ms, 2\.00 x\)"
    with pytest.raises(RegressionError, match=message) as raised:
        run_suite_verb(matmul_registry(2e-3), baseline=base, file=now)
    assert raised.value.exit_code == 14
    assert json.loads(now.read_text())["comparison"][0]["verdict"] == "slower"
    assert run_suite_verb(matmul_registry(2e-3), baseline=base, threshold=1.5)["comparison"][0]["verdict"] == "same"
    assert run_suite_verb(matmul_registry(5e-4), baseline=base)["comparison"][0]["verdict"] == "faster"


def test_a_case_that_ran_and_has_no_kernel_now_is_a_regression(tmp_path: Path) -> None:
    base, now = tmp_path / "base.json", tmp_path / "now.json"
    run_suite_verb(matmul_registry(), file=base)
    picky = fake_target.registry(variant("v", supports=lambda problem, device: Reject("too small")))
    with pytest.raises(RegressionError, match=r"no kernel takes .* in the baseline: decoder_mha_qkv$") as raised:
        run_suite_verb(picky, baseline=base, file=now)
    assert raised.value.exit_code == 14
    assert json.loads(now.read_text())["comparison"] == [{"name": "decoder_mha_qkv", "verdict": "unsupported"}]
    assert run_suite_verb(picky, baseline=now)["comparison"] == []  # it did not run there either


def test_a_slow_moment_is_measured_again(tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    run_suite_verb(matmul_registry(1e-3), file=base)
    builds = iter([Kernel(seconds=5e-3), Kernel(seconds=1e-3)])
    moody = fake_target.registry(variant("v", lambda c: next(builds)))
    data = run_suite_verb(moody, baseline=base)
    assert data["comparison"][0]["verdict"] == "same"
    assert data["cases"][0]["latency_ms"] == 1.0


def test_wrong_results_and_failures_decide_the_exit(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(WrongResultError, match="wrong results in decoder_mha_qkv: result 'out'"):
        run_suite_verb(matmul_registry(compute=wrong), file=path)
    assert json.loads(path.read_text())["cases"][0]["status"] == "wrong-result"

    def lost() -> None:
        raise RuntimeError("device lost")

    with pytest.raises(KernelForgeError, match="failed: decoder_mha_qkv: RuntimeError: device lost"):
        run_suite_verb(matmul_registry(on_measure=lost))


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"cannot write .*report\.json"):
        run_suite_verb(matmul_registry(), file=tmp_path / "file" / "report.json")


def test_cases_of_every_kind_verify_on_the_reference_target() -> None:
    names = ("decoder_mha_qkv", "decode_glu_135m", "decode_attention", "decode_rms_norm", "kv_cache_update", "rope")
    with Session("reference", registry=fake_target.registry(), pipeline="") as opened:
        for name in names:
            report = run_case(opened, chosen_cases(name)[0], repeat=1)
            assert report["status"] == "ok", report
