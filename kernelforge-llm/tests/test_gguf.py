"""GGUF files beside the safetensors checkpoints that they were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import add_tensor, finish, write_model

from kernelforge.errors import AssetError, KernelForgeWarning, UsageError
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge_llm.decoder import open_decoder
from kernelforge_llm.gguf import is_gguf, open_gguf
from kernelforge_llm.importer import LlmImporter
from kernelforge_llm.model import Model
from kernelforge_llm.source import TINYPY, open_source

ORACLES = sorted((Path(__file__).parent / "data" / "oracles").iterdir())
IDS = [7, 3, 250, 91, 14, 0, 33, 120, 121, 122, 3, 3, 9, 310, 45, 46, 47, 48, 49, 50, 51]


def tinypy_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_string("tokenizer.huggingface.json", (TINYPY / "tokenizer.json").read_text())
    writer.add_chat_template("{{ messages[0].content }}!")


CASES = [*((folder, "q4") for folder in ORACLES), *((ORACLES[1], dtype) for dtype in ("f32", "f16", "bf16", "q8"))]


@pytest.mark.parametrize(("folder", "dtype"), CASES, ids=lambda value: getattr(value, "name", value))
def test_logits_are_those_of_the_checkpoint_in_that_format(folder: Path, dtype: str, tmp_path: Path) -> None:
    path = write_model(folder, tmp_path / "model.gguf", dtype)
    with Session("cpu", threads=2) as session:
        found = open_decoder(open_source(path), session).logits(IDS)
        want = open_decoder(open_source(folder), session, weights=dtype).logits(IDS)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("folder", ORACLES, ids=lambda folder: folder.name)
def test_the_config_is_that_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    registry = default_registry()
    found = Model.make(open_source(write_model(folder, tmp_path / "m.gguf", "f32")), registry).config
    want = Model.make(open_source(folder), registry).config
    names = vars(want).keys() - {"dtype", "model_type", "rms_norm_eps", "rope", "sliding_layers"}
    assert {n: getattr(found, n) for n in names} == {n: getattr(want, n) for n in names}
    assert found.rms_norm_eps == pytest.approx(want.rms_norm_eps)  # float32 in the file
    assert found.rope == want.rope
    assert [found.window(i) for i in range(3)] == [want.window(i) for i in range(3)]


def test_tinypy_with_its_tokenizer(tmp_path: Path) -> None:
    path = write_model(TINYPY, tmp_path / "tinypy.gguf", "bf16", tinypy_tokenizer)
    prompt = "import numpy as np\n\ndef softmax(x):\n"
    with Session("cpu", threads=2) as session:
        decoder, original = (open_decoder(source, session) for source in (open_source(path), open_source()))
        tokens, want = (list(d.generate(prompt, 24)) for d in (decoder, original))
    assert tokens == want
    assert decoder.tokenizer is not None
    assert decoder.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_weights_are_converted_from_quantised_ones(tmp_path: Path) -> None:
    session = Session("cpu", threads=2)
    source = open_source(write_model(ORACLES[0], tmp_path / "m.gguf", "q4"))
    as_stored = open_decoder(source, session, activations="f32", kv_dtype="f32").logits(IDS)
    widened = open_decoder(source, session, weights="f32").logits(IDS)
    np.testing.assert_allclose(widened, as_stored, atol=1e-4 * abs(as_stored).max())
    again = open_decoder(source, session, weights="q8").logits(IDS)
    assert 0 < abs(again - as_stored).max() < 0.05 * abs(as_stored).max()


def test_export_and_back(tmp_path: Path) -> None:
    session = Session("cpu", threads=2)
    source = open_source(write_model(TINYPY, tmp_path / "m.gguf", "q8", tinypy_tokenizer))
    decoder = open_decoder(source, session, weights="f32")
    with pytest.raises(UsageError, match="cannot hold q8 weights"):
        open_decoder(source, session).save(tmp_path / "folder")
    decoder.save(tmp_path / "folder")
    back = open_decoder(open_source(tmp_path / "folder"), session)
    np.testing.assert_array_equal(back.logits(IDS), decoder.logits(IDS))
    assert back.tokenizer is not None
    assert decoder.tokenizer is not None
    assert back.tokenizer.encode("def f(x):\n    return x") == decoder.tokenizer.encode("def f(x):\n    return x")
    assert back.tokenizer.chat_template == decoder.tokenizer.chat_template


def test_six_bits_are_those_of_the_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (4, 3 * 210), np.uint8)
    blocks = raw.reshape(-1, 210)
    blocks[:, 208:] = (rng.standard_normal(len(blocks)) / 100).astype(np.float16).view(np.uint8).reshape(-1, 2)

    def embeddings(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.9.ffn_up.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q6_K)

    path = write_model(ORACLES[0], tmp_path / "m.gguf", "f32", embeddings)
    with pytest.warns(KernelForgeWarning, match="mlp.up_proj.weight is stored as Q6_K, and widened to f16"):
        source = open_gguf(path)
    name = "model.layers.9.mlp.up_proj.weight"
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K).astype(np.float16)
    assert source.tensors.shape(name) == (4, 768)
    np.testing.assert_array_equal(source.tensors.tensor(name), want)


def test_verbs_and_core_take_the_file(tmp_path: Path) -> None:
    path = write_model(TINYPY, tmp_path / "tiny.gguf", "q4", tinypy_tokenizer)
    assert LlmImporter().claims(str(path))
    moved = path.rename(tmp_path / "no-ending")
    assert is_gguf(moved)
    assert not is_gguf(tmp_path)
    command = [sys.executable, "-m", "kernelforge", "--json", "llm-inference", "--model", str(moved)]
    done = subprocess.run([*command, "--max-tokens", "4"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["data"]["generated_tokens"] == 4
    moved.write_bytes(moved.read_bytes()[:-5000])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 13
    assert "is cut off: tensor" in done.stderr


REFUSED: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "experts": (lambda w: w.add_expert_count(8), "mixture of 8 experts"),
    "rope": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope_type 'yarn' is not supported"),
    "long": (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long"),
    "factors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
        "does not follow Llama 3's rule",
    ),
    "split": (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    "bias": (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(96, np.float32)), "some projections of the attention"),
    "tokenizer": (lambda w: w.add_tokenizer_model("t5"), "of model 't5'"),
    "token": (lambda w: w.add_string("tokenizer.huggingface.json", "["), "is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name: str, tmp_path: Path) -> None:
    more, message = REFUSED[name]
    with pytest.raises(AssetError, match=message):
        Model.make(open_source(write_model(ORACLES[0], tmp_path / "m.gguf", "f32", more)), default_registry())


def test_an_unknown_architecture_and_a_missing_key_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    add_tensor(writer, "token_embd.weight", np.zeros((4, 32), np.float32), "f32")
    finish(writer)
    with pytest.raises(AssetError, match="architecture 'mamba' is not supported") as caught:
        open_gguf(tmp_path / "a.gguf")
    assert caught.value.hint == "supported: llama, qwen2, qwen3"
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    add_tensor(writer, "token_embd.weight", np.zeros((4, 32), np.float32), "f32")
    finish(writer)
    with pytest.raises(AssetError, match=r"llama\.embedding_length is missing"):
        open_gguf(tmp_path / "b.gguf")


def test_a_missing_tensor_is_named_with_the_file(tmp_path: Path) -> None:
    path = write_model(ORACLES[0], tmp_path / "m.gguf", "f32")
    source: Any = open_source(path)
    source.tensors.entries.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(AssetError, match=r"m\.gguf has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        _ = Model.make(source, default_registry()).module
