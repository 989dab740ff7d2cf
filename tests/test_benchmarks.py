"""`make bench`: every measurement in a process of its own, what is missing and what fails said, one page at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import gpu
import page
import plots
import pytest
from plots import Axis, Point, Series

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"
LLAMA_CPP = """
import ctypes
__version__ = "7.7"
llama_token, llama_log_callback = ctypes.c_int32, lambda function: function

def __getattr__(name):
    raise RuntimeError("built without " + name)
"""


def test_a_quick_run_says_what_is_missing_and_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KERNELFORGE_PEER_PYTHON", sys.executable)
    out = tmp_path / "reports"
    ran = subprocess.run(
        [sys.executable, str(RUN), "--quick", "--threads", "1", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr  # a step failed
    assert "not measured beside torch: ImportError: no torch here" in ran.stderr
    assert "failed: llm-tinypy-q4-16: the peer 'llama.cpp' failed: RuntimeError: built without " in ran.stderr
    report = json.loads((out / "report.json").read_text())
    assert set(report["missing"]) == {"torch", "transformers"}
    assert set(report["failed"]) == {"llm-tinypy-q4-16"}
    assert (report["peers"]["llama.cpp"], report["threads"]) == ("7.7", 1)
    assert [case["dtype"] for case in report["matmul"]["cases"]] == ["f32", "f16"] * 4
    assert report["matmul"]["summary"]["f32"]["best_peer_geomean"] > 0
    assert [case["model"] for case in report["llm"]] == ["tinypy"]
    assert report["roofline"]["device"]["flops"] > 0
    for name in ("doctor", "matmul", "suite", "llm-tinypy-native"):
        assert json.loads((out / f"{name}.json").read_text())["ok"]
    assert json.loads((out / "cpu_baseline.json").read_text())["cases"][0]["status"] == "ok"
    shown = (out / "index.html").read_text()
    for words in ("Not measured beside torch", "llm-tinypy-q4-16 failed", "N = 64, K = 32", "Roofline", "A quick run"):
        assert words in shown
    assert not re.search(r"""(src|href)=|url\(|@import""", shown)  # it needs nothing else


def op(**changes: Any) -> dict[str, Any]:
    fields = {"op": "transformer.matmul", "problem": "transformer.matmul(f32[1,2], q4[3,2]@const) -> (f32[1,3]) {}"}
    numbers = {"steps": 2, "share": 0.6, "gflops": 10.0, "gbytes_s": 5.0, "of_bandwidth": 0.5, "of_peak": 0.1}
    return {**fields, "variant": "integer", "limit": "memory", **numbers, **changes}


def report() -> dict[str, Any]:
    speed = {"median": 200.0, "min": 190.0, "max": 210.0}
    peer = {"version": "7.7", "prefill_tok_s": 50.0, "decode_tok_s": 250.0, "prefill_ratio": 4.0, "decode_ratio": 0.8}
    step = {"seconds": 0.004, "kernels": [op(), op(share=0.4, gflops=None, gbytes_s=None, of_peak=None, limit=None)]}
    case = {
        "m": 1,
        "n": 64,
        "k": 32,
        "dtype": "f32",
        "gflops": 12.5,
        "peers": {"numpy": {"gflops": 10.0, "ratio": 1.25}},
    }
    other = {**case, "m": 4, "peers": {"numpy": {"gflops": 20.0, "ratio": 0.625}}}
    return {
        "version": "0",
        "machine": "a <machine>",
        "date": "today",
        "quick": False,
        "threads": 2,
        "peers": {"numpy": "2", "torch": None},
        "missing": {"torch": "not <there>"},
        "failed": {},
        "roofline": {"device": {"bytes_s": 2e10, "flops": 1e11, "int8_ops": 4e11}},
        "matmul": {"cases": [case, other], "summary": {"f32": {"best_peer_geomean": 0.88}}},
        "suite": {"cases": [{"name": "softmax", "status": "ok", **op()}, {"name": "lost", "status": "unsupported"}]},
        "llm": [
            {
                "model": "random small",
                "weights": "q4",
                "depth": 2048,
                "prefill_tok_s": speed,
                "decode_tok_s": speed,
                "peers": {"llama.cpp": {**peer, "logits_difference": 0.024}},
                "explain": {"prefill": step, "decode": step},
            }
        ],
    }


def test_the_page_grades_what_is_compared() -> None:
    shown = page.page(report())
    assert '<td class="good">12.5<small>1.25 x numpy</small></td>' in shown
    assert '<td class="poor">12.5<small>0.62 x numpy</small></td>' in shown
    assert '<td class="good">4.00 x</td>' in shown
    assert '<td class="poor">0.80 x</td>' in shown
    assert "a &lt;machine&gt;" in shown
    assert "Not measured beside torch: not &lt;there&gt;" in shown
    assert "small q4, 2048 before, decode: 4 ms" in shown
    assert "matmul(f32[1,2], q4[3,2]@const)" in shown
    for figure in re.findall(r"<svg.*?</svg>", shown, re.DOTALL):
        ET.fromstring(figure)


@pytest.mark.parametrize("lacking", ["matmul", "suite", "roofline"])
def test_the_page_leaves_out_what_was_not_measured(lacking: str) -> None:
    shown = page.page(report() | {lacking: None})
    heading = {"matmul": "<h2>Matrix products", "suite": "softmax: ", "roofline": "<h2>Roofline"}[lacking]
    assert heading in page.page(report())
    assert heading not in shown


def test_axes_place_and_label() -> None:
    linear = Axis.around("y", [0.5, 93.0])
    assert (linear.low, linear.share(linear.high / 2)) == (0.0, 0.5)
    assert linear.ticks() == [0, 20, 40, 60, 80]
    log = Axis.around("x", [0.3, 512.0], 10)
    assert (log.low, log.high) == (0.1, 1000.0)
    assert log.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert log.share(10.0) == pytest.approx(0.5)
    assert Axis.around("M", [1, 512], 2).ticks() == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_a_plot_holds_its_points() -> None:
    series = Series("ours", "#123456", (Point(1, 10, "low & slow"), Point(100, 20)), dashed=True)
    drawn = plots.xy_plot("a < b", Axis("x", 1, 100, 10), Axis("y", 0, 20), [series])
    picture = ET.fromstring(re.sub("<figcaption.*?</figcaption>", "", drawn))
    circles = picture.findall(".//circle")
    assert [float(c.attrib["cx"]) for c in circles] == [plots.LEFT, plots.WIDTH - plots.RIGHT]
    assert float(circles[1].attrib["cy"]) == plots.TOP
    assert [t.text for t in picture.findall(".//title")] == ["low & slow", None]
    bars = plots.bar_plot("Decode", "tokens/s", [("small", [("ours", "#123456", 20.0), ("theirs", "#654321", 10.0)])])
    widths = [float(r.attrib["width"]) for r in ET.fromstring(bars).findall(".//rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-3)


def test_a_gpu_report_names_figures_peers_and_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(*words: str) -> dict[str, Any]:
        asked.append(words)
        command, values = words[0], dict(zip(words[1::2], words[2::2], strict=False))
        if command == "benchmark-matmul" and values["--dtype"] == "q4":
            return {"ok": False, "errors": [{"message": "lost"}]}
        if command == "benchmark-matmul":
            (n, k), m = values["--shape"].split("x"), int(values["--m"])
            data = {"m": m, "n": int(n), "k": int(k), "dtype": values["--dtype"], "timing_source": "timestamp-query"}
            data["activations"] = "q8a" if values.get("--activations") == "q8" else "f32"
            speeds = {"latency_ms": 2.0, "gflops": 300.0, "gbytes_s": 20.0}
            peers = {"torch-cuda": {"latency_ms": 1.0, "ratio": 0.5, "computes": "f32"}} if "--peer" in words else {}
            row = {"copies": int(values.get("--copies", 0)), "gbytes_s": 40.0, "timing_source": "timestamp-query"}
            return {"ok": True, "data": {**data, **speeds, "peers": peers, **({"in_sequence": row} if m == 1 else {})}}
        step = {"wall_over_device": 1.25, "timing_source": "timestamp-query"}
        speed = {"weights": words[-1], "prefill_tok_s": {"median": 900.0}, "decode_tok_s": {"median": 90.0}}
        return {"ok": True, "data": {**speed, "decode_step": step}}

    def run_peer(*arguments: str) -> str:
        if arguments[0] == "-c":
            return ""
        (part,) = json.loads(arguments[1])["parts"]
        if part == "decode_compiled":
            raise RuntimeError("no compiler")
        return json.dumps({"device": "a card", part: {"tok_s": 100.0 if part == "prefill" else 30.0}})

    monkeypatch.setattr(gpu, "ask", ask)
    monkeypatch.setattr(gpu, "run_peer", run_peer)
    found = gpu.measure(gpu.FULL)
    assert asked[0] == ("doctor", "--measure")
    assert found["transformers"]["decode_compiled"] == {"error": "no compiler"}
    rows = {(row["work"], row["peer"]): (row["ours"], row["unit"], row["ratio"]) for row in found["summary"]}
    beside = "torch-cuda f32 1 ms, ours 2 ms"
    assert rows["f32 4096x4096x4096", beside] == (300.0, "GFLOP/s", 0.5)
    assert rows["q8 1x14336x4096", beside] == (20.0, "GB/s", 0.5)
    assert rows["q8 1x14336x4096, 16 in a row", None] == (40.0, "GB/s", None)
    assert rows["q8 by q8a 1x14336x4096, 16 in a row", None] == (40.0, "GB/s", None)
    assert rows["q4 prefill", "transformers f16 prefill 100"] == (900.0, "tokens/s", 9.0)
    assert rows["f16 decode", "transformers f16 decode_eager 30"] == (90.0, "tokens/s", 3.0)
    assert rows["f16 decode step, wall over device", None] == (1.25, "", None)
    assert not any("q4 1x" in work or "compiled" in (peer or "") for work, peer in rows)
    assert "f16 decode " in gpu.table(found["summary"])


def test_a_gpu_report_without_peers_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("from types import SimpleNamespace as S\ncuda = S(is_available=lambda: False)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "ask", lambda *words: {"ok": False, "errors": [{"message": "lost"}]})
    for python, why in (("", "KERNELFORGE_PEER_PYTHON is not set"), (sys.executable, "torch sees no CUDA device")):
        monkeypatch.setenv("KERNELFORGE_PEER_PYTHON", python)
        found = gpu.measure(gpu.QUICK)
        assert why in found["missing"]
        assert (found["transformers"], found["summary"]) == ({}, [])
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    assert gpu.transformers(gpu.QUICK) == {part: {"error": "ImportError: no torch here"} for part in gpu.PARTS}


def test_a_command_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not gpu.ask("benchmark-matmul", "--m", "0")["ok"]
    assert "failed: --m must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "LIMIT_S", 0.01)
    assert gpu.ask("doctor")["errors"] == [{"message": "it took more than 0.01 s"}]
