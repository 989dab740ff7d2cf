"""Decoders of others, in a process of their own: spoken to through stand-ins for torch and transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernelforge.cli.app import main
from kernelforge.errors import AssetError, UsageError, WrongResultError
from kernelforge.session import Session
from kernelforge_llm import benchmark as benchmarks
from kernelforge_llm.benchmark import Task, benchmark, prompt_ids
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.decoder import load, open_decoder
from kernelforge_llm.peers import DecoderPeer, check_peers, readable
from kernelforge_llm.source import TINYPY, Source, open_source, random_source

LLAMA = Path(__file__).parent / "data" / "oracles" / "llama-gqa"

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

    def float(self):
        return self

    def tolist(self):
        return [float(len(self))]

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


LLAMA_CPP = """
# What the peer's script uses of the C API. It says what it has seen: the largest logit is that of the number of tokens in the
# cache, and the others are what the file beside the model holds.
import ctypes, json, os
import numpy as np

__version__ = "7.7"
llama_token = ctypes.c_int32
cache = []

class Params:
    pass

def llama_log_callback(function):
    return function

def llama_log_set(callback, data):
    callback(2, b"noise", data)

def llama_backend_init():
    pass

def llama_model_default_params():
    return Params()

llama_context_default_params = llama_model_default_params

def llama_model_load_from_file(path, params):
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"

def llama_init_from_model(model, params):
    assert (params.n_threads, params.n_threads_batch, params.n_batch) == (2, 2, 512)
    cache.append(params.n_ctx)
    return "context"

def llama_get_memory(context):
    return "memory"

def llama_model_get_vocab(model):
    return "vocab"

logits = np.load(os.environ["LOGITS"]).astype(np.float32)

def llama_vocab_n_tokens(vocab):
    return len(logits)

def llama_print_system_info():
    return b"AVX = 1 "

def llama_batch_get_one(array, count):
    assert len(array) == count
    return list(array)

def llama_decode(context, batch):
    assert len(cache) - 1 + len(batch) <= cache[0] and len(batch) <= 512
    cache.extend(batch)
    return 0

def llama_get_logits(context):
    if os.environ.get("COUNT"):
        logits[:] = 0
        logits[len(cache) - 1] = 1
    return logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

def llama_memory_seq_rm(memory, sequence, start, end):
    assert (memory, sequence, end) == ("memory", 0, -1)
    del cache[1 + start :]
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in finds its logits."""
    (packages / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("LOGITS", str(tmp_path / "logits.npy"))
    np.save(tmp_path / "logits.npy", np.zeros(2000))
    return tmp_path / "logits.npy"


@pytest.mark.usefixtures("packages")
def test_transformers_prefills_and_decodes_with_a_cache() -> None:
    peer = DecoderPeer("transformers", TINYPY, "f32", 2)
    try:
        assert peer.version == "8.8, torch 9.9"
        assert peer.logits([5, 6]).tolist() == [2.0]
        answer = peer.measure([5, 6, 7], 4)
        assert answer["tokens"] == [3, 4, 5, 6, 7]  # the stand-in answers with the length of what it has seen
        assert answer["prefill_s"] > 0
        assert answer["decode_s"] > 0
    finally:
        peer.close()


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_measures_behind_what_is_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNT", "1")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    peer = DecoderPeer("llama.cpp", tmp_path / "a.gguf", "q4", 2, room=8, before=range(1000))
    try:
        assert (peer.version, peer.build) == ("7.7", "AVX = 1")
        assert peer.logits([1, 2, 3]).argmax() == 1003
        for _ in range(2):
            # A prefill of three tokens, then, from the same depth, steps of one.
            assert peer.measure([1, 2, 3], 4)["tokens"] == [1003, 1001, 1002, 1003, 1004]
    finally:
        peer.close()


def test_what_a_peer_cannot_do_is_said(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown peer 'jax'"):
        check_peers(["transformers", "jax"], 0)
    with pytest.raises(UsageError, match="the peer 'transformers' is measured from an empty cache"):
        check_peers(["llama.cpp", "transformers"], 5)
    with pytest.raises(AssetError, match="the peer 'transformers' failed: AssertionError: bf16"):
        DecoderPeer("transformers", TINYPY, "bf16", 2)
    (packages / "transformers.py").write_text("raise ImportError('not here')")
    with pytest.raises(AssetError, match="the peer 'transformers' failed: ImportError: not here"):
        DecoderPeer("transformers", TINYPY, "f32", 2)
    (packages / "llama_cpp.py").write_text("raise ImportError('nor here')")
    with pytest.raises(AssetError, match=r"the peer 'llama\.cpp' failed: ImportError: nor here"):
        DecoderPeer("llama.cpp", tmp_path, "q4", 2)
    monkeypatch.delenv("KERNELFORGE_PEER_PYTHON")
    with pytest.raises(UsageError, match="the peer 'transformers' needs KERNELFORGE_PEER_PYTHON"):
        DecoderPeer("transformers", TINYPY, "f32", 2)


@pytest.mark.usefixtures("llama_cpp")
def test_a_file_that_it_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"none")
    with pytest.raises(AssetError, match=r"the peer 'llama\.cpp' failed: RuntimeError: it does not load"):
        DecoderPeer("llama.cpp", tmp_path / "a.gguf", "q4", 2)


def config_of(source: Source) -> ModelConfig:
    with Session("reference") as session:
        return open_decoder(source, session).config


def test_what_a_peer_reads(own_cache: Path) -> None:
    said: list[str] = []
    source = open_source(LLAMA)
    with readable("transformers", source, config_of(source), "f32", said.append) as path:
        assert path == LLAMA
    with readable("llama.cpp", source, config_of(source), "f16", said.append) as path:
        assert path.read_bytes()[:4] == b"GGUF"
        file = open_source(path)
        with readable("llama.cpp", file, config_of(file), "native", said.append) as same:
            assert same == path
    assert not path.exists()
    assert len(said) == 1
    random = random_source("tinypy")
    with pytest.raises(UsageError, match="reads a checkpoint's folder, random tinypy has none"):
        readable("transformers", random, config_of(random), "f32", said.append).__enter__()
    for weights in ("q4", "q8", "q4"):
        with readable("llama.cpp", random, config_of(random), weights, said.append) as path:
            assert path.parent == own_cache / "gguf"
    assert len(list((own_cache / "gguf").iterdir())) == 2
    assert said[1:] == [
        f"writing random tinypy in {w} as {p} for the peer"
        for w, p in zip(("q4", "q8"), sorted((own_cache / "gguf").iterdir()), strict=True)
    ]


def test_a_file_that_cannot_be_written(own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "gguf").write_text("in the way")
    random = random_source("tinypy")
    with pytest.raises(AssetError, match=r"cannot write .*: (File exists|Not a directory)"):
        readable("llama.cpp", random, config_of(random), "q4", print).__enter__()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELFORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cache"


@pytest.fixture
def opened(llama_cpp: Path, tmp_path: Path) -> Iterator[DecoderPeer]:
    """One whose logits are those of the checkpoint after four tokens."""
    with Session("reference") as session:
        decoder = load(LLAMA, session=session)
        np.save(llama_cpp, decoder.logits(prompt_ids(4, decoder.config.vocab_size))[-1])
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    peer = DecoderPeer("llama.cpp", tmp_path / "a.gguf", "f32", 2)
    yield peer
    peer.close()


def test_all_take_turns(opened: DecoderPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_PAUSE_S", 0.0)
    seconds = iter(range(1, 100))

    def measure(prompt: list[int], steps: int) -> dict[str, float]:
        number = next(seconds)
        return {"prefill_s": number, "decode_s": 10 * number}

    monkeypatch.setattr(opened, "measure", measure)
    with Session("reference") as session:
        found = benchmark(load(LLAMA, session=session), Task(4, 3, 0, 3), {"llama.cpp": opened})
    assert len(found.runs) == len(found.peers["llama.cpp"]) == 3
    assert [run.prefill for run in found.peers["llama.cpp"]] == [2, 3, 4]  # the first warms up
    beside = found.beside("llama.cpp")
    assert (beside["prefill_tok_s"], beside["decode_tok_s"]) == pytest.approx((4 / 3, 3 / 30))
    ours = found.speeds(found.runs)
    assert beside["decode_ratio"] == pytest.approx(ours["decode_tok_s"]["median"] / 0.1)
    assert beside["logits_difference"] < 1e-5


def test_another_model_is_not_timed(opened: DecoderPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Session("reference") as session:
        decoder = load(LLAMA, session=session)
        with pytest.raises(WrongResultError, match=r"the logits of llama\.cpp differ from ours by \d+%"):
            benchmark(decoder, Task(5, 3, 0, 3), {"llama.cpp": opened})
        monkeypatch.setattr(opened, "logits", lambda prompt: np.zeros(7))
        with pytest.raises(WrongResultError, match=r"llama\.cpp has 7 logits, ours are \d+"):
            benchmark(decoder, Task(4, 3, 0, 3), {"llama.cpp": opened})


@pytest.mark.usefixtures("opened")
def test_llm_bench_beside_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["llm-bench", "--model", str(LLAMA), "--prompt-tokens", "4", "--gen-tokens", "2", "--repeat", "1"]
    line += ["--weights", "f32", "--peer", "llama.cpp", "--threads", "2"]
    assert main([*line, "--json"]) == 0
    peer = json.loads(capsys.readouterr().out)["data"]["peers"]["llama.cpp"]
    assert (peer["version"], peer["build"]) == ("7.7", "AVX = 1")
    assert peer["decode_ratio"] > 0
    assert main(line) == 0
    captured = capsys.readouterr()
    assert "llama.cpp 7.7" in captured.out
    assert "logits differ by" in captured.out
    assert "in f32 as" in captured.err
    assert main([*line, "--depth", "3"]) == 10  # the stand-in answers as if there were nothing before
    assert main([*line, "--peer", "jax"]) == 2
