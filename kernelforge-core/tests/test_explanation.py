"""What runs each step, where it comes from, and its share of the time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from kernelforge.cli import app, bench_verbs, output
from kernelforge.cli.output import Output
from kernelforge.explanation import Explanation, explain_plan
from kernelforge.graph import Graph
from kernelforge.op import Cost
from kernelforge.plugins import core_registry
from kernelforge.problem import parse_problem
from kernelforge.roofline import Peaks, Roofline
from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session

WEIGHTS = {name: np.ones((16, 16), np.float32) for name in ("one", "two")}


def session() -> Session:
    return Session("reference", registry=core_registry(), records=NO_RECORDS, pipeline="")


def module() -> str:
    """Two equal products, a norm, and attention, whose work depends on values."""
    g = Graph()
    x = g.input("x", ("tokens", 16), "f32")
    for name in WEIGHTS:
        x = g.matmul(x, g.constant(name, (16, 16), "f32"))
    heads = g.softmax(x).reshape(-1, 4, 4)
    g.output(g.attention(heads, heads, heads), "y")
    return g.text()


def explained(seconds: list[float] | None, dims: dict[str, int] | None) -> Explanation:
    with session() as opened:
        return explain_plan(opened.plan(module()), opened.registry, dims, seconds)


def test_equal_steps_are_one_kernel_with_their_share() -> None:
    explanation = explained([1e-3, 3e-3, 5e-3, 1e-3], {"tokens": 8})
    assert [use.op.partition(".")[2] for use in explanation.steps] == ["matmul", "matmul", "softmax", "attention"]
    assert explanation.seconds == pytest.approx(10e-3)
    softmax, matmul, attention = explanation.kernels
    assert (softmax.op, softmax.steps, softmax.seconds) == ("transformer.softmax", 1, 5e-3)
    assert (matmul.op, matmul.steps) == ("transformer.matmul", 2)
    assert matmul.seconds == pytest.approx(4e-3)
    assert "f32[8,16]" in str(matmul.problem)
    assert matmul.cost is not None
    assert matmul.cost.flops == 2 * 2 * 8 * 16 * 16
    assert attention.cost is not None
    assert attention.cost.flops == 4 * 4 * 4 * (8 * 9 // 2)
    data = explanation.as_data()
    assert [k["share"] for k in data["kernels"]] == pytest.approx([0.5, 0.4, 0.1])
    told = data["kernels"][1]
    assert (told["plugin"], told["distribution"]) == ("core", "kernelforge-core")
    assert told["version"]
    assert told["gflops"] == pytest.approx(2 * 2 * 8 * 16 * 16 / 4e-3 / 1e9, rel=1e-3)
    assert json.loads(json.dumps(data)) == data


def test_without_times_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    explanation = explained(None, None)
    assert explanation.seconds is None
    assert [use.steps for use in explanation.kernels] == [2, 1, 1]
    assert all(use.cost is None and use.seconds is None for use in explanation.kernels)
    assert "f32[tokens,16]" in str(explanation.steps[0].problem)
    headers, rows = explanation.table()
    assert headers == ["op", "operands", "variant", "plugin", "config", "source", "steps"]
    Output().table(headers, rows)
    assert "transformer.matmul" in capsys.readouterr().out


def test_every_kernel_stands_beside_the_limits() -> None:
    explanation = explained([1e-3, 3e-3, 5e-3, 1e-3], {"tokens": 8})
    assert (explanation.bottleneck, explanation.verdict()) == (None, "")
    assert {k["limit"] for k in explanation.as_data()["kernels"]} == {None}
    limits = Roofline(Peaks(bytes_s=1e6, flops=3e6))
    softmax, matmul, _ = (beside := explanation.beside(limits)).as_data()["kernels"]
    assert matmul["of_peak"] == pytest.approx(2 * 2 * 8 * 16 * 16 / 4e-3 / 3e6, rel=1e-3)  # 0.68
    assert matmul["of_bandwidth"] == pytest.approx(2 * 4 * (8 * 16 + 16 * 16 + 8 * 16) / 4e-3 / 1e6, rel=1e-3)  # 1.02
    assert (matmul["limit"], softmax["limit"]) == ("memory", "memory")
    assert explanation.beside(Roofline(Peaks(1e9, 3e6))).as_data()["kernels"][1]["limit"] == "compute"
    assert beside.as_data()["roofline"]["device"]["flops"] == 3e6
    headers, rows = beside.table()
    assert headers[-3:] == ["of memory", "of peak", "limit"]
    assert rows[1][-3:] == ["102%", "68%", "memory"]
    # The softmax moves 1 KiB in 5 ms: 20 % of the bandwidth, so that 4 of 10 ms could be saved.
    assert beside.as_data()["bottleneck"] == softmax["problem"]
    told = "bottleneck: transformer.softmax (reference), 50% of the time at 20% of the memory's bandwidth; "
    assert beside.verdict() == told + "at the limit the step would take 40% less"
    # Two matmuls of 3 ms take longer, but could save only 2 of 6 ms.
    longest = explained([3e-3, 3e-3, 5e-3, 1e-3], {"tokens": 8}).beside(limits)
    assert longest.kernels[0].op == "transformer.matmul"
    assert longest.as_data()["bottleneck"] == softmax["problem"]


def test_work_that_depends_on_values_is_counted_where_they_are_known() -> None:
    g = Graph()
    cache = [g.input(name, (1, 32, 2, 4), "f32") for name in ("k", "v")]
    q, positions, slots = (
        g.input("q", (2, 2, 4), "f32"),
        g.input("positions", (2,), "i32"),
        g.input("slots", (2,), "i32"),
    )
    g.output(g.attention(q, cache[0], cache[1], positions, slots), "y")
    arrays = {
        "q": np.ones((2, 2, 4), np.float32),
        "k": np.ones((1, 32, 2, 4), np.float32),
        "slots": np.zeros(2, np.int32),
    }
    arrays |= {"v": arrays["k"], "positions": np.array([9, 10], np.int32)}
    with session() as opened:
        executable = opened.compile(g.text())
        (told,) = executable.explain().as_data()["kernels"]
        assert (told["gflops"], executable.explain().steps[0].cost) == (None, None)
        (use,) = executable.explain(arrays, repeats=1).steps
    assert use.cost == Cost(flops=4 * (10 + 11) * 2 * 4, bytes=2 * 2 * 2 * 4 * 4 + 2 * 11 * 2 * 4 * 4 + 16)


def test_kernels_of_bytes_are_compared_with_their_peak() -> None:
    limits = Roofline(Peaks(1e9, 1e9, 4e9))
    work = Cost(10**9, 10**6)
    assert limits.standing(work, 1.0, "f32").compute == 1.0
    assert limits.standing(work, 1.0, "int8").compute == 0.25
    assert Roofline(Peaks(1e9, 1e9)).standing(work, 1.0, "int8").compute == 1.0
    explanation = explained([1e-3, 3e-3, 5e-3, 1e-3], {"tokens": 8}).beside(limits)
    steps = tuple(replace(use, arithmetic="int8") for use in explanation.steps)
    shares = [k["of_peak"] for k in replace(explanation, steps=steps).as_data()["kernels"]]
    assert shares == pytest.approx([k["of_peak"] / 4 for k in explanation.as_data()["kernels"]], rel=1e-3)


def test_the_table_has_a_column_for_each_figure() -> None:
    explanation = explained([1e-3, 3e-3, 5e-3, 1e-3], {"tokens": 8})
    headers, rows = explanation.table()
    assert headers[-4:] == ["us", "share", "GFLOP/s", "GB/s"]
    assert rows[0][-4:-2] == ["5000.0", "50.0%"]
    assert {len(row) for row in rows} == {len(headers)}
    assert rows[0][3].startswith("core (kernelforge-core ")


def test_the_reference_times_its_steps() -> None:
    with session() as opened:
        executable = opened.compile(module(), constants=WEIGHTS)
        x = np.ones((8, 16), np.float32)
        assert executable.explain().seconds is None
        explanation = executable.explain({"x": x}, repeats=2)
        assert all(use.seconds is not None and use.seconds > 0 for use in explanation.steps)
        assert "f32[8,16]" in str(explanation.steps[0].problem)
        assert [use.config_source for use in explanation.steps] == ["default"] * 4


def test_a_given_config_is_said_to_be_given() -> None:
    with session() as opened:
        problem = parse_problem("transformer.silu(f32[4]) -> (f32[4]) {}")
        executable = opened.compile_problem(problem, config={})
        assert executable.explain().steps[0].config_source == "given"


def test_benchmark_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["benchmark-dispatch", "--target", "reference", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["problem"].startswith("transformer.add(f32[4,16]")
    assert {"kernel_us", "bound_us", "plain_us"} <= data.keys()
    with output.use(Output("benchmark-dispatch", target="reference")):
        bench_verbs.dispatch()
    assert "+ plain arrays" in capsys.readouterr().out
