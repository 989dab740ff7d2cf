"""Decoders of others, in a process of their own: spoken to through stand-ins for torch and transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.peers import DecoderPeer
from kernelforge_llm.source import open_source, random_source

TORCH = """
__version__ = "9.9"
float32, bfloat16, float16 = "f32", "bf16", "f16"

def set_num_threads(count):
    assert count == 2

def no_grad():
    return lambda function: function

class Tensor(list):
    def __getitem__(self, key):
        return self

    def argmax(self, axis):
        return Token(len(self))

class Token(int):
    pass

def tensor(values):
    return Tensor(values[0])
"""
TRANSFORMERS = """
import torch
__version__ = "8.8"

class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(folder, dtype):
        assert dtype == "f32", dtype
        return AutoModelForCausalLM()

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache, past_key_values=None, logits_to_keep=0):
        self.seen = (past_key_values or 0) + (1 if isinstance(input_ids, torch.Token) else len(input_ids))
        return type("Out", (), {"logits": torch.Tensor([0] * self.seen), "past_key_values": self.seen})()
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "transformers.py").write_text(TRANSFORMERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KERNELFORGE_PEER_PYTHON", sys.executable)
    return tmp_path


@pytest.mark.usefixtures("packages")
def test_a_peer_prefills_and_decodes_with_a_cache() -> None:
    peer = DecoderPeer("transformers", open_source(), "f32", 2)
    try:
        assert peer.version == "8.8, torch 9.9"
        answer = peer.measure([5, 6, 7], 4)
        assert answer["tokens"] == [3, 4, 5, 6, 7]  # the stand-in answers with the length of what it has seen
        assert answer["prefill_s"] > 0
        assert answer["decode_s"] > 0
    finally:
        peer.close()


def test_what_a_peer_cannot_do_is_said(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown peer 'jax'"):
        DecoderPeer("jax", open_source(), "f32", 2)
    with pytest.raises(UsageError, match="reads a checkpoint's folder, random tinypy has none"):
        DecoderPeer("transformers", random_source("tinypy"), "f32", 2)
    with pytest.raises(AssetError, match="the peer 'transformers' failed: AssertionError: bf16"):
        DecoderPeer("transformers", open_source(), "bf16", 2)
    (packages / "transformers.py").write_text("raise ImportError('not here')")
    with pytest.raises(AssetError, match="the peer 'transformers' failed: ImportError: not here"):
        DecoderPeer("transformers", open_source(), "f32", 2)
    monkeypatch.delenv("KERNELFORGE_PEER_PYTHON")
    with pytest.raises(UsageError, match="the peer 'transformers' needs KERNELFORGE_PEER_PYTHON"):
        DecoderPeer("transformers", open_source(), "f32", 2)
