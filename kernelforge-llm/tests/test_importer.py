from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.errors import AssetError, UsageError
from kernelforge.importer import Importer
from kernelforge.lazy import resolve
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge.variant import INT8_ACTIVATIONS
from kernelforge_llm.decoder import open_decoder
from kernelforge_llm.importer import LlmImporter
from kernelforge_llm.source import TINYPY, open_source

LLAMA = Path(__file__).parent / "data" / "oracles" / "llama-gqa"


@pytest.fixture
def importer() -> Importer:
    return LlmImporter()


def test_it_is_registered() -> None:
    assert resolve(default_registry().importers["llm"].load) is LlmImporter


def test_claims_models_and_nothing_else(importer: Importer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (str(LLAMA), str(LLAMA / "model.safetensors"), "tinypy", "llama-1b", "org/name-1.5B"):
        assert importer.claims(source), source
    (tmp_path / "model.onnx").touch()
    for source in (str(tmp_path), str(tmp_path / "model.onnx"), str(tmp_path / "gone"), "llama", "a/b/c", ""):
        assert not importer.claims(source), source
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-1b").mkdir()
    assert not importer.claims("llama-1b"), "a folder of that name is meant, and it holds no model"


def test_programs_of_a_checkpoint(importer: Importer) -> None:
    model = importer.load(str(LLAMA), weights="bf16")
    decode, prefill = model.programs
    assert (model.name, decode.name, prefill.name) == ("llama-gqa", "decode", "prefill")
    assert decode.module == prefill.module
    assert decode.dims == {"tokens": 1, "rows": 1}
    assert prefill.dims == {}
    assert set(prefill.max_dims) == {"tokens", "rows"}
    assert 'dtype = "bf16"' in decode.module
    assert "model.norm.weight" in model.constants.names()
    with Session("reference") as session:
        executable = session.compile(decode.module, constants=model.constants, dims=decode.dims)
        plan = executable.plan
        one = np.ones(1, np.int32)
        caches = {
            v.name: np.zeros(v.type.static_shape({}), np.float32)
            for v in (plan.values[i] for i in plan.inputs)
            if v.donated
        }
        outputs = executable.run({"tokens": one, "positions": one * 0, "slots": one * 0, "rows": one * 0, **caches})
        assert len(outputs) == len(plan.outputs)


@pytest.mark.parametrize("weights", ["native", "q4", "q8"])
def test_programs_for_a_device_are_what_a_decoder_runs(importer: Importer, session: Session, weights: Any) -> None:
    """So that `tune` measures, and `why` explains, the problems that there will be: on the CPU those of 8-bit activations."""
    model = importer.load("tinypy", weights=weights, device=session.device.info)
    decoder = open_decoder(open_source(), session, weights=weights)
    assert [(p.module, p.dims) for p in model.programs] == [(p.module, p.dims) for p in decoder.model.programs]
    integers = weights != "native" and session.target == "cpu" and INT8_ACTIVATIONS in session.device.info.features
    assert ("transformer.q8a" in model.programs[0].module) == integers
    plain = importer.load("tinypy", weights=weights, activations="f32", device=session.device.info)
    assert "transformer.q8a" not in plain.programs[0].module


def test_the_cache_is_in_the_format_that_was_asked_for(importer: Importer, session: Session) -> None:
    model = importer.load("tinypy", kv_dtype="q8", device=session.device.info)
    decoder = open_decoder(open_source(), session, kv_dtype="q8")
    assert decoder.model.cache_dtype == "q8"
    assert [p.module for p in model.programs] == [p.module for p in decoder.model.programs]


def test_the_cache_holds_the_context_that_was_asked_for(importer: Importer, session: Session) -> None:
    model = importer.load("tinypy", context=96, device=session.device.info)
    decoder = open_decoder(open_source(), session, context=96)
    assert [(p.module, p.max_dims) for p in model.programs] == [(p.module, p.max_dims) for p in decoder.model.programs]
    assert importer.load("tinypy").programs[0].module != model.programs[0].module


def test_tinypy_is_real_and_other_shapes_are_random(importer: Importer) -> None:
    assert importer.load("tinypy").name == "tinypy"
    np.testing.assert_array_equal(
        importer.load("tinypy").constants.tensor("model.norm.weight"),
        importer.load(str(TINYPY)).constants.tensor("model.norm.weight"),
    )
    assert importer.load("smollm2-135m").name == "random smollm2-135m"


def test_what_is_wrong_is_an_error(importer: Importer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown weight format 'int3'"):
        importer.load("tinypy", weights="int3")
    with pytest.raises(UsageError, match="unknown format of activations 'int3'"):
        importer.load("tinypy", activations="int3")
    with pytest.raises(UsageError, match="unknown cache format 'int3'"):
        importer.load("tinypy", kv_dtype="int3")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match=r"has neither model.safetensors nor"):
        importer.load(str(tmp_path))
