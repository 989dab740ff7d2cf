from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from kernelforge.errors import AssetError, KernelForgeError, UsageError
from kernelforge_llm import checkpoint as checkpoint_module
from kernelforge_llm import safetensors_file
from kernelforge_llm.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    resolve_model,
    save_checkpoint,
)
from kernelforge_llm.shapes import random_checkpoint

ORACLES = Path(__file__).parent / "data" / "oracles"
TINYPY = Path(checkpoint_module.__file__).parent / "assets" / "tinypy"


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: list[Any], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def open_bytes(folder: Path, content: bytes) -> Checkpoint:
    (folder / WEIGHTS_FILE).write_bytes(content)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("folder", [TINYPY, *sorted(ORACLES.iterdir())], ids=lambda folder: folder.name)
def test_reads_what_safetensors_reads(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / WEIGHTS_FILE)
    assert set(checkpoint.names()) == set(expected)
    for name, array in expected.items():
        found = checkpoint.tensor(name)
        assert (
            (found.dtype, found.shape) == (array.dtype, array.shape) == (checkpoint.dtype(name), checkpoint.shape(name))
        )
        assert found.tobytes() == array.tobytes()


def test_tensors_are_read_only_views_of_the_file() -> None:
    checkpoint = Checkpoint.open(TINYPY)
    name = "model.layers.0.mlp.up_proj.weight"
    array = checkpoint.tensor(name)
    assert array.dtype == ml_dtypes.bfloat16
    assert np.shares_memory(array, checkpoint.tensor(name))
    assert isinstance(checkpoint.maps[TINYPY / WEIGHTS_FILE].base, np.memmap)
    assert array.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    header = json.dumps({"a": tensor([3], 0, 12)}).encode()
    header += b" " * ((9 - (8 + len(header)) % 8) % 8)  # the data begins at an odd offset
    data = np.arange(3, dtype=np.float32)
    array = open_bytes(tmp_path, pack(header, data.tobytes())).tensor("a")
    assert array.flags.aligned
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, data)


def test_scalars_empty_tensors_and_metadata(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "s": tensor([], 0, 4),
        "e": tensor([0, 5], 4, 4),
        "t": tensor([1], 4, 8),
    }
    checkpoint = open_bytes(tmp_path, pack(header, np.array([1.5, 2.5], np.float32).tobytes()))
    assert checkpoint.tensor("s").shape == ()
    assert float(checkpoint.tensor("s")) == 1.5
    assert checkpoint.tensor("e").shape == (0, 5)
    assert float(checkpoint.tensor("t")[0]) == 2.5
    assert checkpoint.names() == ("s", "e", "t")


@pytest.mark.parametrize(("code", "name"), [(c, n) for c, (n, _) in safetensors_file._DTYPES.items()])
def test_every_dtype(tmp_path: Path, code: str, name: str) -> None:
    size = safetensors_file._DTYPES[code][1]
    array = open_bytes(tmp_path, pack({"a": tensor([4], 0, 4 * size, code)}, bytes(4 * size))).tensor("a")
    assert array.dtype == np.dtype(getattr(ml_dtypes, name, name))
    assert array.nbytes == 4 * size


def test_a_missing_tensor_is_named() -> None:
    checkpoint = Checkpoint.open(TINYPY)
    for read in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(AssetError, match=r"has no tensor 'model\.norm\.wieght'") as caught:
            read("model.norm.wieght")
        assert caught.value.hint == "the closest is 'model.norm.weight'"


ONE = {"a": tensor([2], 0, 8)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off or no safetensors file"),
        (b"\x01\x00", "cut off or no safetensors file"),
        (pack(ONE)[:20], "cut off or no safetensors file: a header of"),
        (pack(ONE, bytes(8), length=1 << 60), "cut off or no safetensors file"),
        (pack(ONE, bytes(8), length=0), "header is not JSON"),
        (b"PK\x03\x04" + bytes(200), "cut off or no safetensors file|header is not JSON"),
        (pack(b"{not json}"), "header is not JSON"),
        (pack(b"[" * 5000), "header is not JSON"),
        (pack(b"\xff" * 16), "header is not JSON"),
        (pack([1]), "header is a JSON list"),
        (pack(b'{"a": {}, "a": {}}'), "'a' is there twice"),
        (pack({"a": 3}), "tensor 'a' is described by 3"),
        (pack(ONE, bytes(7)), "ends at byte"),
        (pack(ONE, bytes(9)), "1 bytes after the last tensor"),
        (pack({"a": tensor([2], 0, 8, "F31")}, bytes(8)), "dtype 'F31', which is not supported"),
        (pack({"a": tensor([2], 0, 8, "I4")}, bytes(8)), "dtype 'I4'"),
        (pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "dtype None"),
        (pack({"a": tensor([3], 0, 8)}, bytes(8)), r"of shape \[3\] and dtype F32 needs 12 bytes and has 8"),
        (pack({"a": tensor([1 << 62, 1 << 62], 0, 8)}, bytes(8)), "needs .* bytes and has 8"),
        (pack({"a": tensor([-2, -1], 0, 8)}, bytes(8)), r"has shape \[-2, -1\]"),
        (pack({"a": tensor([True, 2], 0, 8)}, bytes(8)), r"has shape \[True, 2\]"),
        (pack({"a": tensor([2.0], 0, 8)}, bytes(8)), r"has shape \[2.0\]"),
        (pack({"a": tensor([1] * 40, 0, 4)}, bytes(4)), "has shape"),
        (pack({"a": tensor([2], 8, 0)}, bytes(8)), r"data_offsets \[8, 0\]"),
        (pack({"a": tensor([2], -8, 0)}, bytes(8)), r"data_offsets \[-8, 0\]"),
        (pack({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)), r"data_offsets \[0\]"),
        (pack({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)), "'b' overlaps the tensor before it"),
        (pack({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(8)), "'b' overlaps the tensor before it"),
        (pack({"a": tensor([2], 0, 8), "b": tensor([1], 12, 16)}, bytes(16)), "'b' leaves a gap before it"),
        (pack({"a": tensor([1], 4, 8)}, bytes(8)), "'a' leaves a gap before it"),
    ],
)
def test_refuses_a_lying_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(AssetError, match=message) as caught:
        open_bytes(tmp_path, content)
    assert str(tmp_path / WEIGHTS_FILE) in str(caught.value)


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    content = (ORACLES / "llama-gqa" / WEIGHTS_FILE).read_bytes()
    for size in [0, 7, 8, 9, 100, 3000, 3095, 3096, 4000, len(content) // 2, len(content) - 1]:
        with pytest.raises(AssetError):
            open_bytes(tmp_path, content[:size])


def sharded(folder: Path) -> dict[str, Any]:
    """Writes an oracle in shards and gives its index back."""
    source = ORACLES / "qwen2-bias"
    config = json.loads((source / "config.json").read_text())
    save_checkpoint(folder, config, Checkpoint.open(source), shard_bytes=300_000)
    index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
    return index


def same_tensors(left: Checkpoint, right: Checkpoint) -> bool:
    return set(left.names()) == set(right.names()) and all(
        left.dtype(name) == right.dtype(name) and left.tensor(name).tobytes() == right.tensor(name).tobytes()
        for name in left.names()
    )


def test_shards_and_their_index(tmp_path: Path) -> None:
    index = sharded(tmp_path / "model")
    source = Checkpoint.open(ORACLES / "qwen2-bias")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(source.tensor(name).nbytes for name in source.names())
    for shard in shards:
        assert (tmp_path / "model" / shard).stat().st_size < 310_000
    assert same_tensors(Checkpoint.open(tmp_path / "model"), source)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\b.safetensors", "b.bin", 3]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(AssetError, match="which is no plain file name"):
        Checkpoint.open(tmp_path)


def test_refuses_a_lying_index(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    index = sharded(folder)
    shards = sorted(set(index["weight_map"].values()))
    name = next(iter(index["weight_map"]))

    def refused(changed: Any, message: str) -> None:
        (folder / INDEX_FILE).write_text(json.dumps(changed))
        with pytest.raises(AssetError, match=message):
            Checkpoint.open(folder)

    refused({"weight_map": {}}, "has no weight_map")
    refused({"weight_map": [1]}, "has no weight_map")
    refused({**index, "weight_map": {**index["weight_map"], "new": shards[0]}}, "places tensor 'new'")
    refused({**index, "weight_map": {**index["weight_map"], name: shards[-1]}}, f"places tensor '{name}'")
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(AssetError, match="is not JSON"):
        Checkpoint.open(folder)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / shards[1]).rename(folder / "away")
    with pytest.raises(AssetError, match=f"{shards[1]} is missing"):
        Checkpoint.open(folder)
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    with pytest.raises(AssetError, match="is both in"):
        Checkpoint.open(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"has neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(AssetError, match=r"only pytorch_model\.bin") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.hint == "convert the weights to safetensors"


def test_saves_a_standard_folder(tmp_path: Path) -> None:
    source = Checkpoint.open(TINYPY)
    config = json.loads((TINYPY / "config.json").read_text())
    save_checkpoint(tmp_path / "deep" / "out", config, source, generation={"eos_token_id": 0}, tokenizer_from=TINYPY)
    out = tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "tokenizer.json").read_bytes() == (TINYPY / "tokenizer.json").read_bytes()
    assert same_tensors(Checkpoint.open(out), source)


class Sliced:
    """Tensors that are not laid out row by row."""

    arrays: ClassVar[dict[str, NDArray[np.float32]]] = {
        "t": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "s": np.array(3, np.float32),
    }

    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.arrays[name].dtype

    def tensor(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def test_saves_any_layout(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "out", {}, Sliced())
    saved = Checkpoint.open(tmp_path / "out")
    np.testing.assert_array_equal(saved.tensor("t"), Sliced.arrays["t"])
    assert saved.shape("s") == ()


def test_saving_over_a_checkpoint_leaves_no_stale_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sharded(folder)
    (folder / "notes.txt").write_text("mine")
    tinypy = Checkpoint.open(TINYPY)
    save_checkpoint(folder, {"now": 1}, tinypy)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert same_tensors(Checkpoint.open(folder), tinypy)
    sharded(folder)
    assert not (folder / WEIGHTS_FILE).exists()
    assert same_tensors(Checkpoint.open(folder), Checkpoint.open(ORACLES / "qwen2-bias"))


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Sliced):
        def tensor(self, name: str) -> NDArray[Any]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "out", {}, Failing())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        save_checkpoint(tmp_path / "file", {}, Sliced())
    with pytest.raises(KernelForgeError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "file" / "below", {}, Sliced())
    assert caught.value.exit_code == 1


def test_resolves_folders_and_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(TINYPY) == TINYPY
    assert resolve_model(str(TINYPY / WEIGHTS_FILE)) == TINYPY
    sharded(tmp_path / "model")
    assert resolve_model(tmp_path / "model" / INDEX_FILE) == tmp_path / "model"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(AssetError, match=r"other\.safetensors is not named as a checkpoint's weights are"):
        resolve_model(tmp_path / "other.safetensors")
    with pytest.raises(AssetError, match="there is no model at"):
        resolve_model(tmp_path / "nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"


def resolve_in_subprocess(model: str, home: Path, **environment: str) -> str:
    """What `resolve_model` gives or raises in a process of its own: the Hub's client reads settings at import."""
    code = (
        "import sys; from kernelforge.errors import KernelForgeError\n"
        "from kernelforge_llm.checkpoint import resolve_model\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except KernelForgeError as error: print(error.exit_code, error, '|', error.hint)"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(home), **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_hub_names_offline(tmp_path: Path) -> None:
    revision = "0123456789012345678901234567890123456789"
    cached = tmp_path / "hub" / "models--some-org--some.model"
    snapshot = cached / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    assert Path(resolve_in_subprocess("some-org/some.model", tmp_path, HF_HUB_OFFLINE="1")) == snapshot
    missing = resolve_in_subprocess("some-org/another", tmp_path, HF_HUB_OFFLINE="1")
    assert missing.startswith("13 some-org/another is neither a folder nor in the cache")
    assert "HF_HUB_OFFLINE is set | run once without HF_HUB_OFFLINE" in missing
    assert "could not be fetched" in resolve_in_subprocess("bad--name/x", tmp_path, HF_HUB_OFFLINE="1")


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for a gated and for an unknown repository."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_hub_names_that_the_hub_refuses(tmp_path: Path, hub: str) -> None:
    gated = resolve_in_subprocess("org/gated", tmp_path, HF_ENDPOINT=hub)
    assert gated.startswith("13 org/gated is gated")
    assert f"ask for access at {hub}/org/gated" in gated
    unknown = resolve_in_subprocess("org/unknown", tmp_path, HF_ENDPOINT=hub)
    assert unknown.startswith(f"13 there is no folder org/unknown, and no such model (or a private one) at {hub}")


def test_hub_that_does_not_answer(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        closed = f"http://127.0.0.1:{server.server_port}"
    answer = resolve_in_subprocess("org/model", tmp_path, HF_ENDPOINT=closed)
    assert answer.startswith("13 org/model is neither a folder nor in the cache")
    assert f"{closed} did not answer" in answer


def test_importing_the_package_is_cheap() -> None:
    modules = "config checkpoint tokenizer stream sampling shapes cerebras"
    code = (
        f"import sys, importlib\nfor name in {modules!r}.split(): importlib.import_module('kernelforge_llm.' + name)\n"
        "print([m for m in ('numpy', 'ml_dtypes', 'tokenizers', 'jinja2', 'huggingface_hub', 'safetensors') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_random_checkpoint_can_be_saved(tmp_path: Path) -> None:
    source = random_checkpoint("tinypy", seed=3)
    save_checkpoint(tmp_path / "out", source.config, source)
    saved = Checkpoint.open(tmp_path / "out")
    assert saved.tensor("model.norm.weight").tobytes() == source.tensor("model.norm.weight").tobytes()
    assert saved.names() != ()
