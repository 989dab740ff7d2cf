"""GGUF files that are written for peers: parsed here by the letter of the format."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kernelforge.errors import UsageError
from kernelforge.quant import dequantize, quantize
from kernelforge.registry import default_registry
from kernelforge_llm.architecture import find_architecture
from kernelforge_llm.checkpoint import Checkpoint
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.config_file import read_config
from kernelforge_llm.gguf.writer import ALIGNMENT, TYPES, gguf_name, write_gguf
from kernelforge_llm.source import open_source

ORACLES = Path(__file__).parent / "data" / "oracles"


class Parsed(NamedTuple):
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    data: dict[str, bytes]


def parsed(path: Path) -> Parsed:
    raw = path.read_bytes()
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def text() -> str:
        return bytes(take(f"{take('Q')}s")).decode()

    assert take("4sI") == (b"GGUF", 3)
    tensors, pairs = take("QQ")
    metadata = {}
    for _ in range(pairs):
        key, kind = text(), take("I")
        metadata[key] = text() if kind == 8 else take({4: "I", 6: "f"}[kind])
    shapes, types, offsets = {}, {}, {}
    for _ in range(tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))]
        shapes[name] = tuple(reversed(shape))  # the fastest axis comes first in the file
        types[name], offsets[name] = take("IQ")
    start = -(-at // ALIGNMENT) * ALIGNMENT
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    ends = [*sorted(offsets.values())[1:], len(raw) - start]
    after = dict(zip(sorted(offsets.values()), ends, strict=True))
    return Parsed(metadata, shapes, types, {n: raw[start + o : start + after[o]] for n, o in offsets.items()})


def written(folder: Path, path: Path, weights: str) -> Parsed:
    source = open_source(folder)
    write_gguf(source, config_of(folder), path, weights)
    return parsed(path)


def config_of(folder: Path) -> ModelConfig:
    config, generation = read_config(folder)
    return find_architecture(config, default_registry(), source=str(folder)).config(
        config, generation, source=str(folder)
    )


@pytest.mark.parametrize("weights", ["native", "f32", "f16", "bf16", "q8", "q4"])
def test_every_format_holds_the_checkpoints_numbers(tmp_path: Path, weights: str) -> None:
    folder = ORACLES / "llama-gqa"
    found, tensors, config = written(folder, tmp_path / "a.gguf", weights), Checkpoint.open(folder), config_of(folder)
    assert len(found.shapes) == len(tensors.names())
    for name in tensors.names():
        array, stored = tensors.tensor(name), gguf_name(name)
        assert found.shapes[stored] == array.shape
        if name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            half = config.head_dim // 2
            # Row r of a head goes to 2 r, row r + D/2 beside it: llama.cpp turns neighbours.
            order = [h * 2 * half + i // 2 + (i % 2) * half for h in range(heads) for i in range(2 * half)]
            array = array[order]
        kind = "f32" if array.ndim == 1 or weights == "native" else weights
        assert found.types[stored] == TYPES[kind]
        if kind in ("q8", "q4"):
            groups = quantize(array, kind)
            read = np.frombuffer(found.data[stored][: groups.nbytes], groups.dtype).reshape(groups.shape)
            assert np.array_equal(dequantize(read), dequantize(groups))
        else:
            expected = array.astype(np.float32) if kind != "bf16" else array.astype("bfloat16")
            expected = expected.astype(np.float16) if kind == "f16" else expected
            assert found.data[stored][: expected.nbytes] == expected.tobytes()


def test_the_metadata_is_that_of_the_config(tmp_path: Path) -> None:
    found, config = written(ORACLES / "llama-gqa", tmp_path / "a.gguf", "f32"), config_of(ORACLES / "llama-gqa")
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.block_count"] == config.num_layers
    assert found.metadata["llama.attention.head_count_kv"] == config.num_kv_heads
    assert found.metadata["llama.rope.dimension_count"] == config.head_dim
    assert found.metadata["llama.rope.freq_base"] == config.rope.theta
    assert found.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)


@pytest.mark.parametrize(("folder", "family"), [("qwen2-bias", "qwen2"), ("qwen3-qknorm", "qwen3")])
def test_other_families(tmp_path: Path, folder: str, family: str) -> None:
    found = written(ORACLES / folder, tmp_path / "a.gguf", "q8")
    assert found.metadata["general.architecture"] == family
    assert f"{family}.block_count" in found.metadata
    tensors = Checkpoint.open(ORACLES / folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    groups = quantize(tensors.tensor(name), "q8")  # in the checkpoint's order: these turn halves
    assert found.data["blk.0.attn_q.weight"][: groups.nbytes] == groups.tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "has RoPE of kind linear"),
        ({"architectures": ["ParallelLlamaForCausalLM"]}, "ParallelLlamaForCausalLM is not written as GGUF"),
    ],
)
def test_what_the_file_cannot_say(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ORACLES / "llama-gqa", folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        written(folder, tmp_path / "a.gguf", "f16")


def test_tensors_without_a_name_there() -> None:
    assert gguf_name("model.layers.12.mlp.up_proj.bias") == "blk.12.ffn_up.bias"
    with pytest.raises(UsageError, match=r"GGUF has no name for tensor 'model\.layers\.0\.moe\.gate\.weight'"):
        gguf_name("model.layers.0.moe.gate.weight")


@pytest.mark.parametrize("weights", ["f32", "q8", "q4"])
def test_what_is_written_is_what_is_read(tmp_path: Path, weights: str) -> None:
    folder = ORACLES / "llama-gqa"
    written(folder, tmp_path / "a.gguf", weights)
    source, config = open_source(tmp_path / "a.gguf"), config_of(folder)
    tensors = Checkpoint.open(folder)
    assert set(source.tensors.names()) == set(tensors.names())
    for name in tensors.names():
        array, read = tensors.tensor(name), source.tensors.tensor(name)
        expected = array if weights == "f32" or array.ndim == 1 else quantize(array, weights)
        assert read.tobytes() == expected.tobytes(), name
    write_gguf(source, config, tmp_path / "b.gguf", "native")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    if weights != "f32":
        with pytest.raises(UsageError, match=f"is {weights} already"):
            write_gguf(source, config, tmp_path / "c.gguf", "f16")
