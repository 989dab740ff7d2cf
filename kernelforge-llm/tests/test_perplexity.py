"""Perplexity, and what the weight formats cost in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.cli.app import main
from kernelforge.errors import UsageError
from kernelforge_llm.perplexity import Score, negative_log_likelihood, windows

TEXT = Path(__file__).parent / "data" / "heldout.txt"
"""Python source that tinypy was not trained on."""
FOUR_WINDOWS = 6.377858
"""Its perplexity over the first four windows in f32, by the reference target."""


def evaluate(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> Any:
    assert main(["llm-eval", "--text", str(TEXT), "--json", *options]) == code
    told = json.loads(capsys.readouterr().out)
    return told["errors"][0]["message"] if code else told["data"]


@pytest.mark.parametrize(("weights", "worse"), [("f32", 1e-5), ("bf16", 0.002), ("q8", 0.005), ("q4", 0.08)])
def test_tinypy_predicts_as_well_as_its_format_allows(
    weights: str, worse: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data = evaluate(capsys, "--weights", weights, "--windows", "4", "--target", "cpu")
    assert (data["windows"], data["tokens"]) == (4, 4 * 511)
    assert abs(data["perplexity"] / FOUR_WINDOWS - 1) < worse
    assert data["perplexity"] == pytest.approx(np.exp(data["nats"] / data["tokens"]))


def test_windows_are_whole_but_for_a_short_text() -> None:
    ids = list(range(10))
    assert windows(ids, 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(ids, 4, 1) == [[0, 1, 2, 3]]
    assert windows(ids, 11, 9) == [ids]
    for short in ([], [3]):
        with pytest.raises(UsageError, match=f"the text has {len(short)} tokens, of which none can be predicted"):
            windows(short, 4, 9)


def test_likelihood_is_that_of_a_softmax() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, -1000.0]], np.float32)
    e = np.exp([1.0, 2.0, 3.0])
    want = -np.log(e[0] / e.sum()) + 1000.0
    assert negative_log_likelihood(logits, np.array([0, 1])) == pytest.approx(want)
    assert Score(2 * np.log(7.0), 2).perplexity == pytest.approx(7.0)


def test_what_cannot_be_scored_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--window 5000 is more than the 1024 tokens" in evaluate(capsys, "--window", "5000", code=2)
    assert "--window 1 is not possible" in evaluate(capsys, "--window", "1", code=2)
    assert "--windows 0 is not possible" in evaluate(capsys, "--windows", "0", code=2)
    assert "none.txt: No such file or directory" in evaluate(capsys, "--text", str(tmp_path / "none.txt"), code=13)
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the text" in evaluate(capsys, "--text", str(tmp_path / "image"), code=13)
    oracle = Path(__file__).parent / "data" / "oracles" / "llama-gqa"
    assert "has no tokenizer.json" in evaluate(capsys, "--model", str(oracle), code=13)
