"""`make bench`: every measurement in a process of its own, what is missing and what fails said, one page at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

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
