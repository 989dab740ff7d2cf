"""Errors of products: on the activations that the model computes, for every matrix that it multiplies by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernelforge.quant import dequantize, quantize
from kernelforge.session import Session
from kernelforge_llm.layer_error import product_error, product_inputs
from kernelforge_llm.source import TINYPY, open_source

ORACLES = Path(__file__).parent / "data" / "oracles"
IDS = [7, 3, 250, 91, 14, 0, 33, 120, 121, 122, 3, 3, 9, 310, 45, 46]


@pytest.mark.parametrize("folder", [ORACLES / "llama-gqa", ORACLES / "qwen2-bias", TINYPY], ids=lambda f: f.name)
def test_every_matrix_has_the_rows_that_it_is_multiplied_by(folder: Path, session: Session) -> None:
    source = open_source(folder)
    found = product_inputs(source, session, IDS)
    shapes = {name: source.tensors.shape(name) for name in source.tensors.names()}
    tied = source.config.get("tie_word_embeddings", False)
    matrices = {n for n, shape in shapes.items() if len(shape) == 2 and (tied or n != "model.embed_tokens.weight")}
    assert {name: x.shape for name, x in found.items()} == {n: (len(IDS), shapes[n][1]) for n in matrices}
    first = "model.layers.0.self_attn"
    assert all(found[f"{first}.{other}_proj.weight"] is found[f"{first}.q_proj.weight"] for other in "kv")


def test_they_are_what_the_model_computes(session: Session) -> None:
    """The first norm of the embeddings; the head's, by the logits."""
    source = open_source(TINYPY)
    found = product_inputs(source, session, IDS)
    table, norm = (
        source.tensors.tensor(f"model.{name}.weight").astype(np.float32)
        for name in ("embed_tokens", "layers.0.input_layernorm")
    )
    x = table[IDS]
    x *= norm / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + source.config["rms_norm_eps"])
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj.weight"], x, rtol=1e-5, atol=1e-6)

    from kernelforge_llm.decoder import open_decoder

    logits = open_decoder(source, session).logits(IDS)
    np.testing.assert_allclose(found["model.embed_tokens.weight"] @ table.T, logits, rtol=1e-3, atol=1e-3)


def test_tokens_are_spread_over_the_sequence(session: Session) -> None:
    ids = [i % 300 for i in range(400)]
    found = product_inputs(open_source(TINYPY), session, ids)["model.embed_tokens.weight"]
    assert len(found) == 128
    short = replace(source := open_source(TINYPY), config={**source.config, "max_position_embeddings": 8})
    assert {len(x) for x in product_inputs(short, session, ids).values()} == {8}
    alone = product_inputs(open_source(TINYPY), session, ids[:1])["model.embed_tokens.weight"]
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-3, atol=1e-3)


def test_an_error_is_that_of_the_product_not_of_the_matrix() -> None:
    """A column that is never multiplied may change at will."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((5000, 64)).astype(np.float32)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    x[:, 3] = 0
    after = before.copy()
    after[:, 3] *= 5
    assert product_error(x, before, after) == 0
    assert product_error(x, before, before * np.float32(1.25)) == pytest.approx(0.25, rel=1e-6)
    assert product_error(0 * x, before, after) == 0
    groups = quantize(before, "q4")
    want = x @ (dequantize(groups) - before).T
    assert product_error(x, before, groups) == pytest.approx(
        np.linalg.norm(want) / np.linalg.norm(x @ before.T), rel=1e-5
    )
