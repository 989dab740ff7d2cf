from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from kernelforge_example_loopback.backend import LoopbackDevice

from kernelforge.cli.app import main
from kernelforge.errors import UsageError
from kernelforge.graph import Graph
from kernelforge.problem import parse_problem
from kernelforge.registry import default_registry
from kernelforge.session import Session


def graph() -> Graph:
    g = Graph()
    x, w = g.input("x", ("tokens", 4), "f32"), g.constant("w", (4, 3), "f32")
    g.output(g.silu(x @ w), "y")
    return g


def test_every_op_reaches_it() -> None:
    with Session("loopback", pipeline="") as session:
        w = np.eye(4, 3, dtype=np.float32)
        executable = session.compile(graph().module(), constants={"w": w})
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        (y,) = executable.run({"x": x})
        assert isinstance(session.device, LoopbackDevice)
        assert session.device.dispatched == {"transformer.matmul": 1, "transformer.silu": 1}
    np.testing.assert_allclose(np.asarray(y), x[:, :3] / (1 + np.exp(-x[:, :3])), rtol=1e-6)


def test_an_op_that_stands_for_others_reaches_it_as_those() -> None:
    g = Graph()
    x, w = g.input("x", ("tokens", 64), "f32"), g.constant("w", (64,), "f32")
    g.output(g.dequantize(g.rms_norm_quantize(x, w)), "y")
    apart = {"transformer.rms_norm": 1, "transformer.quantize": 1, "transformer.dequantize": 1}
    whole = {"transformer.rms_norm_quantize": 1, "transformer.dequantize": 1}
    x_in, constants = np.ones((2, 64), np.float32), {"w": np.ones(64, np.float32)}
    asked: dict[str, str] = {"transformer.rms_norm_quantize": "loopback"}
    for forced, dispatched in ((None, apart), (asked, whole)):
        with Session("loopback", pipeline="", variants=forced) as session:
            (y,) = session.compile(g.module(), constants=constants).run({"x": x_in})
            assert isinstance(session.device, LoopbackDevice)
            assert session.device.dispatched == dispatched
        np.testing.assert_allclose(np.asarray(y), x_in, rtol=1e-4)


def test_selection_names_it() -> None:
    with Session("loopback") as session:
        problem = parse_problem("transformer.silu(f32[3]) -> (f32[3]) {}")
        chosen = session.select(problem).variant
        assert (chosen.name, chosen.target, chosen.provenance.plugin) == ("loopback", "loopback", "loopback")
        assert session.device.allocate((2, 3), "bf16").shape == (2, 3)


def test_core_verbs_take_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path))
    sizes = ("--m", "3", "--n", "4", "--k", "5", "--repeat", "1")
    assert main(["benchmark-matmul", *sizes, "--target", "loopback", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["variant"] == "loopback"


def test_errors() -> None:
    backend = default_registry().backend("loopback")
    assert [info.target for info in backend.devices()] == ["loopback"]
    with pytest.raises(UsageError, match="the loopback target has no device 'gpu0'"):
        backend.open("gpu0")
    with Session("loopback") as session, pytest.raises(UsageError, match="has no LLVM IR"):
        session.device.emit_llvm(session.plan(graph().module()), session.registry)
