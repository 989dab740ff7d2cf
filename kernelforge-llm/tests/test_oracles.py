"""Golden outputs of transformers: small checkpoints of every architecture, and tinypy.

`golden.npz` holds per prompt: ids, logits after each of them, tokens generated greedily and by how much each one won.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernelforge.session import Session
from kernelforge_llm import decoder as decoder_module
from kernelforge_llm.decoder import Decoder, open_decoder
from kernelforge_llm.source import TINYPY, open_source

DATA = Path(__file__).parent / "data"
FOLDERS = sorted((DATA / "oracles").iterdir())

TOLERANCE = 2e-4
"""Largest difference over largest logit."""
SAME = 1e-5
"""The same, between two ways of our own: they sum in another order at most."""
CLOSE_MARGIN = 1e-3
"""A token that won by less may be another one when sums are taken in another order."""


def error(found: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    assert found.dtype == np.float32
    assert found.shape == want.shape
    return float(abs(found - want).max() / abs(want).max())


@dataclass(frozen=True)
class Case:
    decoder: Decoder
    golden: Any

    def ids(self, prompt: str) -> list[int]:
        found: list[int] = self.golden[f"{prompt}_ids"].tolist()
        return found

    def check_logits(self, prompt: str) -> None:
        assert error(self.decoder.logits(self.ids(prompt)), self.golden[f"{prompt}_logits"]) < TOLERANCE

    def check_greedy(self, prompt: str, most: int) -> None:
        margins = self.golden[f"{prompt}_greedy_margin"]
        close = np.flatnonzero(margins < CLOSE_MARGIN)
        count = min(int(close[0]) if close.size else margins.size, most)
        assert count > 5
        tokens = self.decoder.generate(self.ids(prompt), count, ignore_eos=True)
        assert [t.id for t in tokens if t.id is not None] == self.golden[f"{prompt}_greedy"][:count].tolist()


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest, session: Session) -> Case:
    decoder = open_decoder(open_source(request.param), session, weights="f32", sequences=3)
    return Case(decoder, np.load(request.param / "golden.npz"))


@pytest.fixture(scope="module")
def tinypy(session: Session) -> Case:
    return Case(open_decoder(open_source(TINYPY), session, weights="f32"), np.load(DATA / "tinypy" / "golden.npz"))


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_logits_and_greedy_tokens_of_every_architecture(case: Case, prompt: str) -> None:
    case.check_logits(prompt)
    case.check_greedy(prompt, 24)


@pytest.mark.parametrize("prompt", ["p0", "p1", "p2"])
def test_logits_and_greedy_tokens_of_tinypy(tinypy: Case, prompt: str) -> None:
    case = tinypy
    case.check_logits(prompt)
    case.check_greedy(prompt, 48 if case.decoder.session.target != "reference" else 12)


def test_token_by_token_equals_one_pass(case: Case) -> None:
    ids = case.ids("long")
    cache = case.decoder.new_cache()
    rows = [case.decoder.feed(cache, [token], sequence=1) for token in ids]
    assert cache.lengths == [0, len(ids), 0]
    assert error(np.stack(rows), case.decoder.logits(ids)) < SAME


def test_a_long_prompt_taken_in_pieces_equals_one_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = case.ids("long")
    whole = case.decoder.logits(ids)
    monkeypatch.setattr(decoder_module, "PREFILL_TOKENS", 16)
    assert error(case.decoder.logits(ids), whole) < SAME
    assert error(case.decoder.feed(case.decoder.new_cache(), ids), whole[-1]) < SAME


@pytest.mark.parametrize("pad_to", [None, 64])
def test_a_batch_equals_its_sequences_alone(case: Case, pad_to: int | None) -> None:
    long = case.ids("long")
    batch = [case.ids("short"), long, long[3:20]]
    together = case.decoder.logits_batch(batch, pad_to=pad_to)
    assert len(together) == 3
    for found, ids in zip(together, batch, strict=True):
        assert error(found, case.decoder.logits(ids)) < SAME


def test_interleaved_sequences_do_not_disturb_each_other(case: Case) -> None:
    decoder = case.decoder
    sequences: Sequence[list[int]] = (case.ids("short"), case.ids("long")[:12])
    cache = decoder.new_cache()
    found: list[list[NDArray[np.float32]]] = [[], []]
    for first, second in itertools.zip_longest(*sequences):
        batch = [[second] if second is not None else [], [], [first] if first is not None else []]
        rows = list(decoder.step(cache, batch))
        found[1].append(rows.pop(0))
        found[0] += rows
    assert cache.lengths == [12, 0, 7]
    for rows, ids in zip(found, sequences, strict=True):
        assert error(np.stack(rows), decoder.logits(ids)) < SAME


def test_a_truncated_cache_forgets_what_followed(case: Case) -> None:
    decoder, ids = case.decoder, case.ids("short")
    cache = decoder.new_cache()
    decoder.feed(cache, case.ids("long"))
    cache.truncate(0, 0)
    decoder.feed(cache, [*ids[:4], 9, 9])
    cache.truncate(0, 4)
    assert error(decoder.feed(cache, ids[4:]), decoder.logits(ids)[-1]) < SAME
