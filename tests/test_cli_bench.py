"""Tuning and benchmarking from the command line, in processes of their own, on the compiled CPU target."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIZES = ("--m", "24", "--n", "40", "--k", "56")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("KERNELFORGE_HOME", str(folder))
    monkeypatch.delenv("KERNELFORGE_PEER_PYTHON", raising=False)
    return folder


def kernelforge(*arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON envelope of a run that must end with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "kernelforge", "--json", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    envelope: dict[str, Any] = json.loads(done.stdout)
    assert envelope["ok"] == (code == 0)
    return envelope


@pytest.mark.usefixtures("home")
def test_benchmark_matmul_beside_numpy() -> None:
    data = kernelforge("benchmark-matmul", *SIZES, "--peer", "numpy", "--repeat", "1", "--threads", "1")["data"]
    assert data["variant"] == "vectorized"
    assert data["gflops"] > 0
    assert data["latency_ms"] > 0
    assert data["rel_error"] <= data["tolerance"] < 1e-4
    assert data["threads"] == 1
    assert data["peers"]["numpy"]["gflops"] > 0
    forced = kernelforge("benchmark-matmul", *SIZES, "--variant", "reference", "--repeat", "1", "--dtype", "bf16")[
        "data"
    ]
    assert forced["variant"] == "reference"
    assert "bf16[56,40]@const" in forced["problem"]


@pytest.mark.usefixtures("home")
def test_benchmark_matmul_of_several_sizes_and_types() -> None:
    sizes = ("--m", "1", "--m", "5", "--shape", "40x56", "--shape", "24x8", "--dtype", "f32", "--dtype", "f16")
    data = kernelforge("benchmark-matmul", *sizes, "--peer", "numpy", "--repeat", "1", "--threads", "1")["data"]
    assert [(r["m"], r["n"], r["k"], r["dtype"]) for r in data["cases"]] == [
        (m, n, k, dtype) for n, k in ((40, 56), (24, 8)) for m in (1, 5) for dtype in ("f32", "f16")
    ]
    assert all(r["rel_error"] <= r["tolerance"] for r in data["cases"])
    assert data["summary"]["f32"]["best_peer_min"] > 0
    assert data["summary"]["f16"]["first_dtype_geomean"] > 0


@pytest.mark.usefixtures("home")
def test_benchmark_matmul_of_floats_and_quantised_weights() -> None:
    sizes = ("--m", "1", "--shape", "40x64", "--dtype", "f32", "--dtype", "q8", "--dtype", "q4")
    for target in ("cpu", "reference"):
        data = kernelforge("--target", target, "benchmark-matmul", *sizes, "--repeat", "1", "--copies", "3")["data"]
        f32, q8, q4 = data["cases"]
        assert [r["dtype"] for r in data["cases"]] == ["f32", "q8", "q4"]
        assert f32["activations"] == "f32"
        assert q8["activations"] == q4["activations"]
        assert f"matmul({q8['activations']}[1,64], q8[40,64]@const" in q8["problem"]
        assert all(r["rel_error"] <= r["tolerance"] for r in data["cases"])
        assert data["summary"]["q4"]["first_dtype_min"] > 0
        assert [r["in_sequence"]["copies"] for r in data["cases"]] == [3, 3, 3]
    (why,) = kernelforge("why", "matmul", "--m", "1", "--n", "40", "--k", "64", "--dtype", "q4")["data"]["problems"]
    assert "q4[40,64]@const" in why["problem"]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("benchmark-matmul", "--variant", "nope"), 2, "unknown variant 'nope'"),
        (("benchmark-matmul", "--peer", "torch"), 2, "needs KERNELFORGE_PEER_PYTHON"),
        (("benchmark-matmul", "--shape", "8x8x8"), 2, "--shape 8x8x8: not a shape of weights"),
        (("benchmark-matmul", "--shape", "8x40", "--dtype", "q8"), 2, "--k must be a multiple of 32 for q8 weights"),
        (("benchmark-matmul", "--activations", "q8"), 2, "--activations is for quantised weights"),
        (("benchmark-matmul", "--m", "1", "--n", "100000000000", "--k", "1000000"), 1, "out of memory: "),
        (("--target", "tpu", "tune", "matmul", *SIZES), 2, "unknown target 'tpu'"),
        (("tune", "--model", "no/such/folder/model.onnx"), 13, "cannot read the model"),
        (("why", "--problem", "transformer.silu(f32[4]"), 2, "is not a problem"),
        (("why", "matmul", *SIZES, "--weights", "bf16"), 2, "--weights needs --model"),
        (("emit-mlir", "--weights", "bf16"), 2, "--weights needs --model"),
        (("benchmark-suite", "--baseline", "no.json"), 13, "cannot read the baseline"),
        (("records", "import", "no.jsonl"), 13, "cannot read the records file"),
    ],
)
def test_requests_that_fail_say_why(arguments: tuple[str, ...], code: int, message: str) -> None:
    (error,) = kernelforge(*arguments, code=code)["errors"]
    assert message in error["message"]
    assert error["exit_code"] == code


def test_tuned_records_are_used_listed_and_moved(home: Path, tmp_path: Path) -> None:
    options = ("matmul", *SIZES, "--variant", "vectorized", "--budget-s", "1")
    (tuned,) = kernelforge("tune", *options)["data"]["problems"]
    assert tuned["trials"] > 0
    assert not tuned["failed"]
    assert (home / "autotune.jsonl").read_text().count("\n") == tuned["trials"]
    (why,) = kernelforge("why", "matmul", *SIZES)["data"]["problems"]
    assert (why["variant"], why["config_source"]) == ("vectorized", "record")
    assert why["config"] == tuned["best"]["config"]
    benched = kernelforge("benchmark-matmul", *SIZES, "--repeat", "1")["data"]
    assert (benched["config"], benched["config_source"]) == (tuned["best"]["config"], "record")
    listed = kernelforge("records", "list")["data"]["records"]
    assert len(listed) == tuned["trials"]
    assert kernelforge("records", "show", "1")["data"]["plugin"] == "cpu"
    with (home / "autotune.jsonl").open("a") as file:
        file.write('{"torn')
    envelope = kernelforge("records", "export", str(tmp_path / "out.jsonl"))
    assert envelope["data"]["exported"] == len(listed)
    assert any("autotune.jsonl" in warning and "not JSON" in warning for warning in envelope["warnings"])
    # Another thread count is another machine to the records.
    (other,) = kernelforge("why", "matmul", *SIZES, "--threads", "7")["data"]["problems"]
    assert other["config_source"] == "default"


@pytest.mark.skipif(sys.platform == "win32", reason="a process on Windows cannot be sent Ctrl-C alone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tune_keeps_what_it_measured_and_nothing_else(home: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kernelforge", "--json", "tune", "matmul", *SIZES, "--variant", "vectorized"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = home / "autotune.jsonl"
    try:
        while not (records.exists() and records.read_bytes()):
            assert process.poll() is None, process.communicate()[1]
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 15, stderr
    envelope = json.loads(stdout)
    assert envelope["errors"][0]["type"] == "PartialResult"
    (problem,) = envelope["data"]["problems"]
    assert problem["trials"] == len(records.read_text().splitlines()) > 0
    assert not problem["complete"]
    assert not list(home.glob("autotune.jsonl.*"))


@pytest.mark.usefixtures("home")
def test_suite_with_baseline(tmp_path: Path) -> None:
    report = tmp_path / "reports" / "cpu.json"
    common = ("benchmark-suite", "--filter", "decoder_m", "--repeat", "1")
    first = kernelforge(*common, "--output", str(report))["data"]
    assert [c["name"] for c in first["cases"]] == ["decoder_mha_qkv", "decoder_mlp_up_proj", "decoder_mlp_down_proj"]
    for case in first["cases"]:
        assert case["status"] == "ok"
        assert case["rel_error"] <= case["tolerance"]
        assert case["gflops"] > 0
        assert case["gbytes_s"] > 0
        assert case["latency"]["count"] > 0
    assert first["environment"]["python"]
    # Against a baseline a thousand times as fast every case regresses.
    baseline = json.loads(report.read_text())
    for case in baseline["cases"]:
        for name in ("median", "mad"):
            case["latency"][name] /= 1000
    report.write_text(json.dumps(baseline))
    envelope = kernelforge(*common, "--baseline", str(report), code=14)
    assert "decoder_mlp_down_proj" in envelope["errors"][0]["message"]
    assert {c["verdict"] for c in envelope["data"]["comparison"]} == {"slower"}


@pytest.mark.usefixtures("home")
def test_emitted_stages() -> None:
    selected = kernelforge("emit-mlir", "--stage", "selected")["data"]["text"]
    assert 'variant = "vectorized"' in selected
    apart = kernelforge("emit-mlir", "--stage", "selected", "--target", "reference")["data"]["text"]
    (fused,) = [line for line in apart.splitlines() if '"transformer.rope_attention"(' in line]
    assert fused.count('op = "transformer.kv_cache_update"') == fused.count('op = "transformer.rope"') == 2
    llvm = kernelforge("emit-mlir", "--stage", "llvm", "--tokens", "4")["data"]["text"]
    assert "define " in llvm
    done = subprocess.run(
        [sys.executable, "-m", "kernelforge", "emit-mlir", "--block"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert done.stdout.startswith("module {")


def test_why_takes_a_model(home: Path) -> None:
    problems = kernelforge("why", "--model", "tinypy")["data"]["problems"]
    assert {name for p in problems for name in p["programs"]} == {"decode", "prefill"}
    assert all(p["candidates"] for p in problems)
    assert not (home / "autotune.jsonl").exists()
