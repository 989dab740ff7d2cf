from __future__ import annotations

import json

import pytest

from kernelforge.cli.app import main

SILU = "transformer.silu(f32[4,8]) -> (f32[4,8]) {}"


def test_intensity(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["intensity", SILU, "--json"]) == 0
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["command"] == "intensity"
    assert envelope["data"]["bytes"] == 2 * 4 * 8 * 4
    assert envelope["data"]["intensity"] == envelope["data"]["flops"] / envelope["data"]["bytes"]


def test_what_is_not_a_problem_or_not_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["intensity", "silu"]) == 2
    assert "'silu' is not a problem" in capsys.readouterr().err
    assert main(["intensity", SILU.replace("silu", "selu")]) == 2
    assert "did you mean transformer.silu" in capsys.readouterr().err
