"""`llm-quantize`: folders of quantised weights, and what is packed beside them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.backend import PackedSource
from kernelforge.errors import AssetError, KernelForgeError, KernelForgeWarning, UsageError
from kernelforge.quant import dequantize, quantize
from kernelforge.session import Session
from kernelforge_llm.decoder import open_decoder
from kernelforge_llm.model import Model
from kernelforge_llm.quantise import Recipe, quantised_tensors, relative_error, write_quantised
from kernelforge_llm.quantised_folder import PACKED, WEIGHTS, QuantisedFolder
from kernelforge_llm.scale_search import search_q4
from kernelforge_llm.source import TINYPY, open_source

HELD_OUT = Path(__file__).parent / "data" / "heldout.txt"
ORACLE = Path(__file__).parent / "data" / "oracles" / "llama-gqa"
IDS = [7, 3, 250, 91, 14, 0, 33, 120, 121, 122, 3, 3, 9, 310, 45, 46]


@pytest.fixture(scope="module")
def cpu() -> Iterator[Session]:
    with Session("cpu", threads=2) as session:
        yield session


@pytest.fixture(scope="module")
def q4(cpu: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "q4"
    write_quantised(open_source(ORACLE), folder, Recipe("q4"), cpu)
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_the_folder_computes_what_the_option_does(weights: Any, cpu: Session, tmp_path: Path) -> None:
    written = write_quantised(open_source(ORACLE), tmp_path / "out", Recipe(weights), cpu)
    source = open_source(tmp_path / "out")
    decoder = open_decoder(source, cpu)
    found = decoder.logits(IDS)
    assert decoder.model.activation_dtype == decoder.model.activations
    np.testing.assert_array_equal(found, open_decoder(open_source(ORACLE), cpu, weights=weights).logits(IDS))
    matrices = [t for t in written.tensors if t.error is not None]
    assert {t.dtype for t in matrices} == {weights}
    assert all(0 < (t.error or 0) < (0.11 if weights == "q4" else 0.008) for t in matrices)
    assert written.packed_bytes > 0.9 * sum(t.nbytes for t in matrices)
    for t in written.tensors:
        plain = open_source(ORACLE).tensors.tensor(t.name)
        want = quantize(plain, weights) if t.error is not None else plain
        assert source.tensors.tensor(t.name).tobytes() == want.tobytes()


def test_nothing_is_packed_again(q4: Path) -> None:
    kept = []

    class Watched(QuantisedFolder):
        def keep(self, constant: str, layout: str, array: Any) -> Any:
            kept.append((constant, layout))
            return array

    source = open_source(q4)
    object.__setattr__(source, "tensors", Watched(q4))
    assert isinstance(source.tensors, PackedSource)
    with Session("cpu", threads=2) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        open_decoder(source, session).prepare()
    assert kept == []


def test_other_layouts_are_packed_again_and_said_once(q4: Path, tmp_path: Path, cpu: Session) -> None:
    folder = copied(q4, tmp_path / "moved")
    content = (folder / PACKED).read_bytes()
    name = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["kernelforge.constants"]
    for key in json.loads(name):  # as if each had been packed in another layout
        content = content.replace(key.encode(), key[::-1].encode())
    (folder / PACKED).write_bytes(content)
    decoder = open_decoder(open_source(folder), cpu)
    with pytest.warns(KernelForgeWarning, match="made for another device or version") as said:
        found = decoder.logits(IDS)
    assert len(said) == 1
    np.testing.assert_array_equal(found, open_decoder(open_source(q4), cpu).logits(IDS))


def test_other_options_than_it_was_packed_for_are_told(q4: Path, cpu: Session) -> None:
    decoder = open_decoder(open_source(q4), cpu, weights="q8")
    with pytest.warns(KernelForgeWarning, match="or for other --weights and --activations: weights are packed again"):
        decoder.logits(IDS)


def test_without_the_packed_file_it_loads_all_the_same(q4: Path, tmp_path: Path, session: Session) -> None:
    folder = copied(q4, tmp_path / "portable")
    (folder / PACKED).unlink()
    found = open_decoder(open_source(folder), session).logits(IDS)
    want = open_decoder(open_source(ORACLE), session, weights="q4").logits(IDS)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_a_packed_file_of_other_weights_is_not_used(q4: Path, tmp_path: Path, cpu: Session) -> None:
    folder = tmp_path / "other"
    write_quantised(open_source(ORACLE), folder, Recipe("q8"), cpu)
    (folder / PACKED).write_bytes((q4 / PACKED).read_bytes())
    with pytest.warns(KernelForgeWarning, match="belongs to other weights"):
        found = open_decoder(open_source(folder), cpu).logits(IDS)
    np.testing.assert_array_equal(found, open_decoder(open_source(ORACLE), cpu, weights="q8").logits(IDS))


def test_a_shorter_constant_is_never_read_beyond_its_end(q4: Path, tmp_path: Path, cpu: Session) -> None:
    folder = copied(q4, tmp_path / "short")
    content = (folder / PACKED).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    sizes = {name: entry["shape"][0] for name, entry in header.items() if name != "__metadata__"}
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    names = json.loads(header["__metadata__"]["kernelforge.constants"])
    swapped = {smallest: largest, largest: smallest}
    header["__metadata__"]["kernelforge.constants"] = json.dumps({k: swapped.get(v, v) for k, v in names.items()})
    (folder / PACKED).write_bytes(content[:8] + json.dumps(header).encode().ljust(end - 8) + content[end:])
    with pytest.warns(KernelForgeWarning, match="another device or version"):
        found = open_decoder(open_source(folder), cpu).logits(IDS)
    np.testing.assert_array_equal(found, open_decoder(open_source(q4), cpu).logits(IDS))


def edited(path: Path, key: str, value: str) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"][key] = value
    path.write_bytes(content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + content[end:])


BROKEN = {
    "version": (WEIGHTS, "kernelforge.format", "9", "has version '9' of the format"),
    "formats": (WEIGHTS, "kernelforge.formats", "[]", "has no list kernelforge.formats"),
    "text": (WEIGHTS, "kernelforge.formats", "{", "has no list kernelforge.formats"),
    "tensor": (WEIGHTS, "kernelforge.formats", '{"absent":"q4"}', "'absent' is not of the format 'q4'"),
    "kind": (WEIGHTS, "kernelforge.formats", '{"model.norm.weight":"q4"}', "'model.norm.weight' is not of the format"),
    "format": (WEIGHTS, "kernelforge.formats", '{"lm_head.weight":"q3"}', "is not of the format 'q3'"),
    "constant": (PACKED, "kernelforge.constants", '{"key":"absent"}', "the constant 'key' is not there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name: str, q4: Path, tmp_path: Path) -> None:
    file, key, value, message = BROKEN[name]
    folder = copied(q4, tmp_path / "broken")
    edited(folder / file, key, value)
    with pytest.raises(AssetError, match=message):
        open_source(folder)
    content = (q4 / file).read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        copied(q4, tmp_path / f"cut{length}")
        (tmp_path / f"cut{length}" / file).write_bytes(content[:length])
        with pytest.raises(AssetError):
            open_source(tmp_path / f"cut{length}")


def test_overrides(cpu: Session, tmp_path: Path) -> None:
    recipe = Recipe("q4", embeddings="q8", head="none", skip=r"layers\.0\..*down_proj|layers\.1\.")
    written = write_quantised(open_source(ORACLE), tmp_path / "out", recipe, cpu)
    dtypes = {t.name: t.dtype for t in written.tensors}
    assert dtypes["model.embed_tokens.weight"] == "q8"
    assert dtypes["lm_head.weight"] == "f32"
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == "f32"
    assert dtypes["model.layers.1.mlp.up_proj.weight"] == "f32"
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == "q4"
    found = open_decoder(open_source(tmp_path / "out"), cpu).logits(IDS)
    assert np.isfinite(found).all()
    with pytest.raises(UsageError, match="is not a regular expression"):
        Recipe(skip="(")
    with pytest.warns(KernelForgeWarning, match=r"no tensor has 'layer_0' in its name: nothing is left out"):
        list(quantised_tensors(open_source(ORACLE).tensors, Recipe(skip="layer_0")))
    with pytest.raises(UsageError, match="embeddings cannot be 'q2'"):
        Recipe(embeddings="q2")  # type: ignore[arg-type]


def test_it_can_be_quantised_again_in_place(q4: Path, tmp_path: Path, cpu: Session) -> None:
    folder = copied(q4, tmp_path / "again")
    before = (folder / WEIGHTS).read_bytes()
    write_quantised(open_source(folder), folder, Recipe("q4"), cpu)
    want = open_decoder(open_source(q4), cpu).logits(IDS)
    np.testing.assert_array_equal(open_decoder(open_source(folder), cpu).logits(IDS), want)
    assert len((folder / WEIGHTS).read_bytes()) == len(before)
    written = write_quantised(open_source(folder), folder, Recipe("q8"), cpu)
    name = "model.layers.0.mlp.up_proj.weight"
    again = quantize(dequantize(quantize(open_source(ORACLE).tensors.tensor(name), "q4")), "q8")
    assert open_source(folder).tensors.tensor(name).tobytes() == again.tobytes()
    assert {t.dtype for t in written.tensors if t.error is not None} == {"q8"}


def test_nothing_of_others_is_replaced_and_nothing_half_written(tmp_path: Path, cpu: Session) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="holds something else"):
        write_quantised(open_source(ORACLE), tmp_path / "mine", Recipe(), cpu)
    source = open_source(ORACLE)
    broken: Any = source.tensors

    class Infinite:
        def __getattr__(self, name: str) -> Any:
            return getattr(broken, name)

        def tensor(self, name: str) -> Any:
            array = broken.tensor(name)
            return np.full_like(array, np.inf) if name == "lm_head.weight" else array

    object.__setattr__(source, "tensors", Infinite())
    with pytest.raises(UsageError, match=r"tensor 'lm_head\.weight': cannot quantise NaN or infinity"):
        write_quantised(source, tmp_path / "new", Recipe(), cpu)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    (tmp_path / "file").touch()
    with pytest.raises(KernelForgeError, match="is a file"):
        write_quantised(open_source(ORACLE), tmp_path / "file", Recipe(), cpu)


def test_nothing_of_the_model_that_was_there_is_left(tmp_path: Path, cpu: Session) -> None:
    """A tokenizer of another model, or its generation_config.json."""
    folder, exported = tmp_path / "quantised", tmp_path / "exported"
    for path in (TINYPY, ORACLE):
        source = open_source(path)
        write_quantised(source, folder, Recipe(), cpu)
        Model.make(source, cpu.registry).save(exported)
        for written in (folder, exported):
            (written / "notes.txt").write_text("mine")
            found = open_source(written)
            assert (found.config, found.generation) == (source.config, source.generation)
            assert (found.tokenizer is None) == (source.tokenizer is None)
    names = ["config.json", "generation_config.json", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, PACKED, WEIGHTS])
    assert sorted(path.name for path in exported.iterdir()) == sorted([*names, "model.safetensors"])
    with pytest.raises(UsageError, match="holds quantised weights"):
        Model.make(open_source(TINYPY), cpu.registry).save(folder)
    assert open_source(folder).tokenizer is None


def test_searched_scales_leave_less_error(cpu: Session, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    special = [np.zeros((1, 64)), np.full((1, 64), -3.5), np.full((1, 64), 1e-30), rng.integers(-8, 8, (4, 64)) * 0.5]
    x = np.concatenate([rng.standard_normal((500, 64)), *special]).astype(np.float32)
    found, plain = dequantize(search_q4(x)), dequantize(quantize(x, "q4"))
    errors = [np.square(x - made).reshape(-1, 32).sum(axis=1) for made in (found, plain)]
    assert np.mean(errors[0][:1000]) < 0.9 * np.mean(errors[1][:1000])
    assert (errors[0] <= errors[1] * 1.01 + 1e-12).all()
    with pytest.raises(UsageError, match="cannot quantise NaN"):
        search_q4(np.full((1, 32), np.nan, np.float32))
    written = write_quantised(open_source(ORACLE), tmp_path / "searched", Recipe("q4", search=True), cpu)
    ggml = write_quantised(open_source(ORACLE), tmp_path / "plain", Recipe("q4"), cpu)
    pairs = [(a.error, b.error) for a, b in zip(written.tensors, ggml.tensors, strict=True) if a.error and b.error]
    assert all(a < b for a, b in pairs)


def test_relative_error() -> None:
    want = np.array([3.0, 4.0], np.float32)
    assert relative_error(want, want) == 0
    assert relative_error(want, np.array([3.0, 3.5], np.float32)) == pytest.approx(0.1)
    assert relative_error(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0


def test_the_verb_writes_reports_and_is_read_by_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "tinypy-q4"
    command = [sys.executable, "-m", "kernelforge", "--json", "llm-quantize", "-o", str(folder)]
    done = subprocess.run(
        [*command, "--text", str(HELD_OUT), "--windows", "2"], capture_output=True, text=True, check=True
    )
    data = json.loads(done.stdout)["data"]
    assert 1 < data["perplexity"]["after"] / data["perplexity"]["before"] < 1.15
    assert data["bytes"] < 0.3 * (TINYPY / "model.safetensors").stat().st_size
    errors = [(t["error"], t["product_error"]) for t in data["tensors"] if t["error"] is not None]
    assert all(0.01 < product < 2 * of_weights for of_weights, product in errors)
    assert len(data["tensors"]) == len(open_source(TINYPY).tensors.names())
    run = [sys.executable, "-m", "kernelforge", "--json", "llm-inference", "--max-tokens", "8", "--model", str(folder)]
    ids = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)["data"]["ids"]
    run[-2:] = ["--weights", "q4"]
    assert json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)["data"]["ids"] == ids
    wrong = subprocess.run([*command, "--random", "llama-1b", "--text", str(HELD_OUT)], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--text needs a tokenizer" in wrong.stderr
    (tmp_path / "short.txt").write_text("")
    command[-1] = str(tmp_path / "unwritten")
    short = subprocess.run([*command, "--text", str(tmp_path / "short.txt")], capture_output=True, text=True)
    assert (short.returncode, (tmp_path / "unwritten").exists()) == (2, False)
    assert "the text has 0 tokens, of which none can be predicted" in short.stderr
