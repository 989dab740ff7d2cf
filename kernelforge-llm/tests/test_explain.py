"""Every op that a model runs is traced to its kernel, its plugin and its share of the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernelforge.cli.app import main
from kernelforge.errors import UsageError
from kernelforge.session import Session
from kernelforge_llm.decoder import Decoder, load

LLAMA = Path(__file__).parent / "data" / "oracles" / "llama-gqa"


@pytest.fixture(scope="module")
def oracle(session: Session) -> Decoder:
    return load(LLAMA, session=session, context=48)


def test_a_step_is_explained_at_its_sizes(oracle: Decoder) -> None:
    decode, prefill = oracle.explain(1, 20, repeats=2), oracle.explain(6, repeats=2)
    for explanation, tokens in ((decode, 1), (prefill, 6)):
        assert explanation.seconds is not None
        assert explanation.seconds > 0
        products = [use for use in explanation.steps if use.op == "transformer.glu_matmul"]
        assert len(products) == oracle.config.num_layers
        assert {use.problem.operand(0).shape[0] for use in products} == {tokens}
        owner = {"cpu": "kernelforge-cpu", "reference": "kernelforge-core"}[oracle.session.target]
        assert all(use.provenance.distribution == owner and use.provenance.version for use in products)
        assert all(not use.problem.dims for use in explanation.steps)
        shares = [kernel["share"] for kernel in explanation.as_data()["kernels"]]
        assert sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares, reverse=True)


def test_explaining_leaves_the_decoder_as_it_was(oracle: Decoder) -> None:
    before = oracle.logits([1, 2, 3])
    oracle.explain(3, 5, repeats=1)
    assert (oracle.logits([1, 2, 3]) == before).all()


@pytest.mark.parametrize(("tokens", "depth"), [(0, 0), (48, 1), (1, 48)])
def test_steps_that_do_not_fit(oracle: Decoder, tokens: int, depth: int) -> None:
    with pytest.raises(UsageError, match=r"a step of 0 tokens|do not fit the context of 48"):
        oracle.explain(tokens, depth)


def test_inference_and_bench_print_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(LLAMA))
    assert main(["llm-inference", *model, "--prompt-ids", "1,2,3", "--max-tokens", "4", "--explain"]) == 0
    captured = capsys.readouterr()
    assert "prefill, 3 tokens after 0: " in captured.err
    assert "decode, 1 token after 5: " in captured.err
    assert "GFLOP/s  GB/s" in captured.err
    assert "transformer.glu_matmul" not in captured.out
    sizes = ("--prompt-tokens", "4", "--gen-tokens", "2", "--repeat", "1")
    assert main(["llm-bench", *model, *sizes, "--explain"]) == 0
    out = capsys.readouterr().out
    assert "weights native, activations f32, cpu" in out.splitlines()[0]
    assert "prefill, 4 tokens after 0: " in out
    assert main(["llm-bench", *model, *sizes, "--explain", "--depth", "3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]["explain"]
    assert (data["prefill"]["tokens"], data["prefill"]["depth"], data["decode"]["depth"]) == (4, 3, 4)
    kernel = data["decode"]["kernels"][0]
    assert {"op", "problem", "variant", "plugin", "distribution", "version", "config", "config_source"} <= kernel.keys()
    assert kernel["seconds"] > 0


def test_without_the_flag_nothing_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["llm-inference", "--model", str(LLAMA), "--prompt-ids", "1,2,3", "--max-tokens", "2", "--json"]
    assert main(line) == 0
    assert "explain" not in json.loads(capsys.readouterr().out)["data"]
