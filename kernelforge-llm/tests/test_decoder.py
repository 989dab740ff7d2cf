from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kernelforge_llm
from kernelforge.errors import AssetError, KernelForgeWarning, UsageError
from kernelforge.quant import dequantize, quantize
from kernelforge.registry import default_registry
from kernelforge.session import Session
from kernelforge_llm import decoder as decoder_module
from kernelforge_llm.cache import cache_dtype
from kernelforge_llm.decoder import Decoder, load, open_decoder
from kernelforge_llm.model import Model
from kernelforge_llm.source import TINYPY, any_source, open_source, random_source
from kernelforge_llm.stream import Token

ORACLES = Path(__file__).parent / "data" / "oracles"
LLAMA = ORACLES / "llama-gqa"
PROMPT = 'import numpy as np\n\ndef softmax(x):\n    """Return'


@pytest.fixture(scope="module")
def oracle(session: Session) -> Decoder:
    """No tokenizer, 320 ids, 4 layers, a context of 48."""
    return load(LLAMA, session=session, context=48)


@pytest.fixture(scope="module")
def tinypy(session: Session) -> Decoder:
    return load(session=session)


@pytest.fixture(scope="module")
def numpy_session() -> Session:
    return Session("reference")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(LLAMA, copy)
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def texts(tokens: Iterable[Token]) -> str:
    return "".join(token.text for token in tokens)


def ids_of(tokens: Iterable[Token]) -> list[int]:
    return [token.id for token in tokens if token.id is not None]


# What is generated, and when it ends.


def test_ids_in_ids_out_without_a_tokenizer(oracle: Decoder) -> None:
    tokens = list(oracle.generate([5, 9, 11], 6))
    assert len(tokens) == 6
    assert texts(tokens) == ""
    assert ids_of(oracle.generate(np.array([5, 9, 11]), 6)) == ids_of(tokens)  # type: ignore[arg-type]  # an array serves


def test_text_in_needs_a_tokenizer(oracle: Decoder) -> None:
    with pytest.raises(AssetError, match=r"'llama-gqa' has no tokenizer.json, so it cannot read text") as caught:
        oracle.generate("text", 1)
    assert caught.value.hint == "give token ids (--prompt-ids 1,2,3)"


def test_text_in_text_out(tinypy: Decoder) -> None:
    tokens = list(tinypy.generate(PROMPT, 12))
    assert len(tokens) == 12
    assert texts(tokens) == tinypy.tokenizer.decode(ids_of(tokens))  # type: ignore[union-attr]  # tinypy has one
    assert texts(tinypy.generate("the quick brown fox", 4)) != ""


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(oracle: Decoder) -> None:
    with pytest.raises(UsageError, match="the prompt has 49 tokens, the context holds 48"):
        oracle.generate([1] * 49, 1)
    with pytest.raises(UsageError, match="49 tokens do not fit the context of 48"):
        oracle.logits([1] * 49)


@pytest.mark.parametrize("token", [-1, 320, 1 << 40])
def test_ids_out_of_range_are_refused(oracle: Decoder, token: int) -> None:
    for call in (
        lambda: oracle.generate([1, token], 1),
        lambda: oracle.logits([1, token]),
        lambda: oracle.feed(oracle.new_cache(), [1, token]),
        lambda: oracle.step(oracle.new_cache(), [[1, token]]),
        lambda: oracle.generate([1], 1, stop_ids=[token]),
    ):
        with pytest.raises(UsageError, match=f"token id {token} is out of range") as caught:
            call()
        assert caught.value.hint == "ids are from 0 to 319"


def test_ids_must_be_integers(oracle: Decoder) -> None:
    for call in (
        lambda: oracle.generate([1, 2.5], 1),  # type: ignore[list-item]  # what is tested
        lambda: oracle.feed(oracle.new_cache(), [1, 2.5]),  # type: ignore[list-item]  # what is tested
    ):
        with pytest.raises(TypeError, match="float"):
            call()


def test_ids_may_be_an_array(oracle: Decoder) -> None:
    ids: Any = np.array([5, 9, 11])
    stepped = oracle.step(oracle.new_cache(), [ids], every_row=True)
    np.testing.assert_array_equal(stepped, oracle.step(oracle.new_cache(), [[5, 9, 11]], every_row=True))


def test_an_empty_prompt_is_refused(oracle: Decoder, tinypy: Decoder) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        oracle.generate([], 1)
    assert len(ids_of(tinypy.generate("", 1))) == 1, "its tokenizer opens even an empty document"
    with pytest.raises(UsageError, match="there are no tokens to run"):
        oracle.feed(oracle.new_cache(), [])
    with pytest.raises(UsageError, match="there are no tokens to run"):
        oracle.step(oracle.new_cache(), [[]], pad_to=4)


def test_max_tokens(oracle: Decoder) -> None:
    assert list(oracle.generate([1], 0)) == list(oracle.generate([1], -1)) == []
    assert len(list(oracle.generate([1], 1))) == 1


def test_the_step_for_one_token_is_compiled_only_for_a_second_token(numpy_session: Session, folder: Path) -> None:
    decoder = open_decoder(open_source(folder), numpy_session)
    assert len(list(decoder.generate([1, 2, 3], 1, ignore_eos=True))) == 1
    assert "one" not in decoder._steps._compiled
    assert len(list(decoder.generate([1, 2, 3], 2, ignore_eos=True))) == 2
    assert "one" in decoder._steps._compiled


def test_threads_that_begin_together_compile_a_step_once(
    numpy_session: Session, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile_really = [], numpy_session.compile

    def slowly(*given: Any, **more: Any) -> Any:
        compiled.append(given)
        time.sleep(0.2)
        return compile_really(*given, **more)

    monkeypatch.setattr(numpy_session, "compile", slowly)
    decoder = open_decoder(open_source(folder), numpy_session)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: decoder.feed(decoder.new_cache(), [5]), range(2))
    np.testing.assert_array_equal(one, other)
    assert len(compiled) == 1


def test_a_full_context_ends_generation(oracle: Decoder) -> None:
    # The last token needs no place in the cache: it is not read again.
    assert len(list(oracle.generate([3] * 44, 5, ignore_eos=True))) == 5
    for prompt_tokens, most in ((44, 5), (48, 1)):
        with pytest.warns(KernelForgeWarning, match="the context of 48 tokens is full"):
            assert len(list(oracle.generate([3] * prompt_tokens, 100, ignore_eos=True))) == most


def test_stop_ids_and_the_end_of_sequence_end_generation(oracle: Decoder) -> None:
    ids = ids_of(oracle.generate([5, 9, 11], 8, ignore_eos=True))
    first = ids.index(ids[3])
    assert ids_of(oracle.generate([5, 9, 11], 8, stop_ids=[ids[3]], ignore_eos=True)) == ids[:first]
    config = replace(oracle.config, eos_token_ids=(ids[3],))
    decoder = Decoder(replace(oracle.model, config=config), oracle.session)
    assert ids_of(decoder.generate([5, 9, 11], 8)) == ids[:first]
    assert ids_of(decoder.generate([5, 9, 11], 8, ignore_eos=True)) == ids


def test_a_stop_string_ends_generation_and_is_not_shown(tinypy: Decoder) -> None:
    whole = texts(tinypy.generate(PROMPT, 16))
    stop = whole[7:11]
    assert texts(tinypy.generate(PROMPT, 16, stop=[stop, "never there"])) == whole[: whole.index(stop)]
    # One that begins at the end and never completes was held back, and comes at last.
    assert texts(tinypy.generate(PROMPT, 16, stop=[whole[-3:] + "\0"])) == whole


def test_the_sampler_chooses_from_logits_and_history(oracle: Decoder) -> None:
    seen: list[tuple[int, list[int]]] = []

    def sampler(logits: Any, history: Sequence[int]) -> int:
        seen.append((logits.size, list(history)))
        return 7

    assert ids_of(oracle.generate([1, 2], 3, sampler)) == [7, 7, 7]
    assert seen == [(320, [1, 2]), (320, [1, 2, 7]), (320, [1, 2, 7, 7])]


# The cache and the batch.


def test_a_refused_step_leaves_the_cache_as_it_was(oracle: Decoder) -> None:
    cache = oracle.new_cache()
    oracle.feed(cache, [1, 2, 3])
    with pytest.raises(UsageError, match="49 tokens do not fit the context of 48"):
        oracle.feed(cache, [1] * 46)
    with pytest.raises(UsageError, match="49 tokens do not fit the context of 48"):
        oracle.step(cache, [[1] * 46])
    with pytest.raises(UsageError, match="got 2 sequences for a cache of 1"):
        oracle.step(cache, [[1], [2]])
    assert cache.lengths == [3]
    with pytest.raises(UsageError, match="sequence 0 holds 3 positions, cannot be cut to 4"):
        cache.truncate(0, 4)
    for refused in (
        lambda n: oracle.feed(cache, [1], n),
        lambda n: next(oracle.continue_greedily(cache, 1, 1, n)),
        lambda n: cache.truncate(n, 0),
    ):
        for number in (-1, 1):
            with pytest.raises(UsageError, match=f"there is no sequence {number}") as raised:
                refused(number)
            assert raised.value.hint == "sequences are from 0 to 0"
    assert cache.lengths == [3]


def test_a_batch_is_at_most_what_was_asked_for(oracle: Decoder) -> None:
    assert oracle.logits_batch([]) == []
    with pytest.raises(UsageError, match="2 sequences, the model was loaded for 1") as caught:
        oracle.logits_batch([[1], [2]])
    assert caught.value.hint == "load(sequences=N)"


# Weights: formats, saving, what is missing or wrong.


def test_weight_formats_agree_within_their_precision(session: Session) -> None:
    ids = list(range(2, 14))
    exact = load(LLAMA, session=session).logits(ids)
    for weights, tolerance in (("f32", 1e-6), ("f16", 5e-3), ("bf16", 4e-2)):
        found = load(LLAMA, session=session, weights=weights).logits(ids)  # type: ignore[arg-type]  # one of them
        assert abs(found - exact).max() / abs(exact).max() < tolerance, weights
        assert weights == "f32" or not np.array_equal(found, exact)


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_quantised_weights_are_those_of_the_quantiser(numpy_session: Session, folder: Path, weights: Any) -> None:
    """The same model with every matrix quantised and dequantised beforehand."""
    ids = list(range(2, 14))
    found = load(folder, session=numpy_session, weights=weights, kv_dtype="f32")
    assert f"!transformer.{weights}>" in found.model.module

    def rounded(tensors: dict[str, Any]) -> None:
        tensors.update({n: dequantize(quantize(a, weights)) for n, a in tensors.items() if a.ndim == 2})

    logits = found.logits(ids)
    edit_tensors(folder, rounded)
    np.testing.assert_allclose(load(folder, session=numpy_session).logits(ids), logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match=f"a safetensors folder cannot hold {weights} weights"):
        found.save(folder)


def test_matrices_that_cannot_be_quantised_stay_and_are_named(numpy_session: Session, folder: Path) -> None:
    edit_config(folder, intermediate_size=70)

    def narrower(tensors: dict[str, Any]) -> None:
        for name, a in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = a[:70].copy()
            if "down_proj" in name:
                tensors[name] = a[:, :70].copy()

    edit_tensors(folder, narrower)
    decoder = load(folder, session=numpy_session, weights="q8")
    with pytest.warns(KernelForgeWarning, match="not quantised, .*: model.layers.0.mlp.down_proj.weight, ") as caught:
        decoder.logits([1, 2])
    assert len(caught) == 1


@pytest.mark.parametrize("weights", ["native", "f32", "bf16", "f16"])
def test_a_saved_model_loads_and_is_the_same(numpy_session: Session, tmp_path: Path, weights: Any) -> None:
    decoder = load(ORACLES / "qwen2-bias", session=numpy_session, weights=weights)
    decoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved", session=numpy_session)
    assert again.config.eos_token_ids == decoder.config.eos_token_ids
    assert again.config.dtype == {"bf16": "bfloat16", "f16": "float16"}.get(weights, "float32")
    ids = [4, 8, 15]
    np.testing.assert_array_equal(again.logits(ids), decoder.logits(ids))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert len(modes) == 1, "who may read the config may read the weights"


def test_float64_weights_run_as_f32(numpy_session: Session, folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({n: a.astype(np.float64) for n, a in t.items()}))
    expected = load(LLAMA, session=numpy_session).logits([1, 2])
    np.testing.assert_array_equal(load(folder, session=numpy_session).logits([1, 2]), expected)


def test_an_unknown_weight_format_is_refused(numpy_session: Session) -> None:
    with pytest.raises(UsageError, match="unknown weight format 'int3'") as caught:
        load(LLAMA, session=numpy_session, weights="int3")  # type: ignore[arg-type]  # what is tested
    assert caught.value.hint == "one of: native, f32, bf16, f16, q8, q4"


@pytest.mark.parametrize(("kv_dtype", "error"), [("f16", 2e-3), ("bf16", 1.5e-2)])
def test_what_the_cache_keeps_is_a_choice(session: Session, oracle: Decoder, kv_dtype: Any, error: float) -> None:
    """Errors are those of the narrower numbers: there, and not more."""
    decoder = load(LLAMA, session=session, kv_dtype=kv_dtype, context=48)
    assert {b.dtype for b in decoder.new_cache().buffers.values()} == {kv_dtype}
    ids = list(range(7, 40))
    wanted, found = oracle.logits(ids), decoder.logits(ids)
    assert 1e-6 < np.abs(found - wanted).max() / np.abs(wanted).max() < error


def test_a_quantised_cache_is_near_and_needs_whole_groups(session: Session, tinypy: Decoder) -> None:
    decoder = load(session=session, kv_dtype="q8")
    assert {b.dtype for b in decoder.new_cache().buffers.values()} == {"q8"}
    ids = list(range(100, 160))
    wanted, found = tinypy.logits(ids), decoder.logits(ids)
    assert 1e-6 < np.abs(found - wanted).max() / np.abs(wanted).max() < 2e-2
    cache = decoder.new_cache()
    one_by_one = [decoder.feed(cache, [i]) for i in ids[:20]]
    np.testing.assert_allclose(one_by_one, found[:20], rtol=0, atol=2e-3 * np.abs(found).max())
    with pytest.raises(UsageError, match="a q8 cache holds heads of a multiple of 32 elements, this model's have 16"):
        load(LLAMA, session=session, kv_dtype="q8")


def test_by_default_the_cache_is_as_exact_as_the_weights() -> None:
    assert [cache_dtype("auto", w) for w in ("native", "f32", "bf16", "f16", "q8", "q4")] == ["f32"] * 3 + ["f16"] * 3
    assert cache_dtype("bf16", "q4") == "bf16"


def test_an_unknown_cache_format_is_refused(numpy_session: Session) -> None:
    with pytest.raises(UsageError, match="unknown cache format 'q3'") as caught:
        load(LLAMA, session=numpy_session, kv_dtype="q3")  # type: ignore[arg-type]  # what is tested
    assert caught.value.hint == "one of: auto, f32, f16, bf16, q8"


def test_more_layers_than_the_weights_have_are_refused_at_once(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1000)
    with pytest.raises(AssetError, match=r"config\.json: num_hidden_layers is 1000, but the weights have 3 layers"):
        Model.make(open_source(folder), default_registry())


def test_a_missing_tensor_is_named(numpy_session: Session, folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(AssetError, match=r"model has no tensor 'model.layers.2.mlp.up_proj.weight'") as caught:
        load(folder, session=numpy_session).logits([1])
    assert caught.value.hint is not None
    assert "mlp.up_proj.weight" in caught.value.hint


@pytest.mark.parametrize(("weights", "said"), [("native", "f32"), ("f16", "f32"), ("q8", "q8")])
def test_activations_are_quantised_only_beside_quantised_weights(
    numpy_session: Session, folder: Path, weights: Any, said: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KernelForgeWarning)
        decoder = open_decoder(open_source(folder), numpy_session, weights=weights, activations="q8")
    assert decoder.model.activation_dtype == said
    assert [str(w.message).startswith("activations stay in f32") for w in caught] == [True] * (said == "f32")


def test_a_misshapen_tensor_is_named(numpy_session: Session, folder: Path) -> None:
    edit_config(folder, intermediate_size=100)
    with pytest.raises(
        AssetError, match=r"'model.layers.0.mlp.gate_proj.weight' has shape \[.*\], its config.json asks"
    ):
        load(folder, session=numpy_session).logits([1])


def test_a_tensor_of_integers_is_named(numpy_session: Session, folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))
    with pytest.raises(AssetError, match=r"'model.norm.weight' holds int8 numbers, which is not supported"):
        load(folder, session=numpy_session).logits([1])


def test_unused_tensors_are_named_in_a_warning(numpy_session: Session, folder: Path) -> None:
    extra = {f"extra.{i}": np.zeros(2, np.float32) for i in range(5)}
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    edit_tensors(folder, lambda t: t.update({**extra, **derived}))
    with pytest.warns(
        KernelForgeWarning, match=r"has tensors that are not used: extra.0, extra.1, extra.2 and 2 more$"
    ):
        load(folder, session=numpy_session).logits([1])


def test_a_tied_head_that_is_there_twice_is_no_surprise(numpy_session: Session, tmp_path: Path) -> None:
    shutil.copytree(TINYPY, tmp_path / "model")
    table = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "model", lambda t: t.update({"lm_head.weight": t[table].astype(ml_dtypes.bfloat16)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "model", session=numpy_session).model.module  # noqa: B018 (builds the graph)


# Configurations, architectures, broken files.


def test_an_unknown_architecture_is_named(numpy_session: Session, folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(AssetError, match=r"config.json: architecture 'MambaForCausalLM' is unknown") as caught:
        load(folder, session=numpy_session)
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert known in str(caught.value.hint)


def test_the_model_type_stands_in_for_a_missing_architecture(numpy_session: Session, folder: Path) -> None:
    edit_config(folder, architectures=...)
    assert load(folder, session=numpy_session).logits([1]).shape == (1, 320)
    edit_config(folder, model_type="mamba")
    with pytest.raises(AssetError, match=r"config.json: architecture 'mamba' is unknown"):
        load(folder, session=numpy_session)
    edit_config(folder, model_type=...)
    with pytest.raises(AssetError, match=r"config.json: names no architecture"):
        load(folder, session=numpy_session)
    edit_config(folder, architectures="LlamaForCausalLM")
    with pytest.raises(AssetError, match=r"config.json: architectures must be a list of names"):
        load(folder, session=numpy_session)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -96}, "hidden_size must be from 1 to"),
        ({"vocab_size": 10**15}, "vocab_size must be from 1 to"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be an integer"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0 changes results and is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_parameters": ...}, "'yarn' is not supported"),
    ],
)
def test_what_the_config_cannot_mean_is_named_with_the_file(
    numpy_session: Session, folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(AssetError, match=r"model.config.json: ") as caught:
        load(folder, session=numpy_session)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "window"),
    [
        ("mistral", {"sliding_window": ...}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 7}, 7),
        ("qwen2", {"sliding_window": 7}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 0}, 4096),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": ...}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, 7),
        ("qwen3", {"use_sliding_window": None, "sliding_window": 7, "max_window_layers": 0}, None),
    ],
)
def test_windows_where_keys_are_absent_or_null(
    numpy_session: Session, folder: Path, architecture: str, changes: dict[str, Any], window: int | None
) -> None:
    edit_config(folder, architectures=[f"{architecture.capitalize()}ForCausalLM"], **changes)
    config = load(folder, session=numpy_session).config
    assert config.window(config.num_layers - 1) == window
    assert architecture != "qwen3" or config.window(0) is None


def test_key_value_heads_and_head_size_where_they_are_absent(numpy_session: Session, folder: Path) -> None:
    changes = {"num_attention_heads": 8, "head_dim": ..., "hidden_size": 64}
    edit_config(folder, num_key_value_heads=..., architectures=["MistralForCausalLM"], **changes)
    assert load(folder, session=numpy_session).config.num_kv_heads == 8
    edit_config(folder, num_attention_heads=16)
    assert load(folder, session=numpy_session).config.num_kv_heads == 8
    edit_config(folder, num_key_value_heads=None)
    assert load(folder, session=numpy_session).config.num_kv_heads == 16
    edit_config(folder, architectures=["Qwen3ForCausalLM"])
    assert load(folder, session=numpy_session).config.head_dim == 128


@pytest.mark.parametrize("context", [0, -1, 100_000])
def test_a_context_beyond_the_model_is_refused(numpy_session: Session, context: int) -> None:
    most = json.loads((LLAMA / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(UsageError, match=f"a context of {context} positions is not possible: .* up to {most}"):
        load(LLAMA, session=numpy_session, context=context)
    with pytest.raises(UsageError, match="cannot hold 0 sequences"):
        load(LLAMA, session=numpy_session, sequences=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{not json", r"config.json is not JSON"),
        ("config.json", b"[1, 2]", r"config.json holds a JSON list, not an object"),
        ("model.safetensors", b"\xff" * 64, r"model.safetensors is cut off or no safetensors file"),
        ("model.safetensors", b"\x02", r"model.safetensors is cut off or no safetensors file"),
        ("tokenizer.json", b'{"version": "1.0"}', r"tokenizer.json is not a tokenizer"),
    ],
)
def test_broken_files_are_named(numpy_session: Session, folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(AssetError, match=message):
        load(folder, session=numpy_session)


def test_truncated_and_lying_weights_are_named(numpy_session: Session, folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(AssetError, match=r"model.safetensors: tensor '.*' ends at byte \d+ of a file that has \d+"):
        load(folder, session=numpy_session)
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(b'"F32"', b'"F16"', 1)
    path.write_bytes(whole[:8] + header + whole[8 + length :])
    with pytest.raises(AssetError, match=r"of shape \[.*\] and dtype F16 needs \d+ bytes and has \d+"):
        load(folder, session=numpy_session)


def test_a_missing_model_or_target_is_named(numpy_session: Session, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"there is no model at .*nowhere"):
        load(tmp_path / "nowhere", session=numpy_session)
    with pytest.raises(AssetError, match=r"config.json cannot be read"):
        load(tmp_path, session=numpy_session)
    with pytest.raises(UsageError, match="unknown target 'abacus'"):
        load(target="abacus")


# Sources.


def test_random_shapes_run(session: Session) -> None:
    decoder = open_decoder(random_source("tinypy"), session)
    logits = decoder.logits([1, 2, 3])
    assert logits.shape == (3, 4096)
    assert 0.3 < logits.std() < 30, "activations keep their size"
    assert len(list(decoder.generate([1, 2, 3], 3))) == 3
    with pytest.raises(UsageError, match="there is no shape 'tiny'"):
        random_source("tiny")


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert open_source().name == open_source("tinypy").name == any_source("tinypy").name == "tinypy"
    assert any_source("llama-1b").name == "random llama-1b"
    assert open_source(folder / "model.safetensors").name == "model"
    monkeypatch.chdir(folder)
    assert open_source(".").name == "model"


def test_the_package_offers_load(numpy_session: Session) -> None:
    assert kernelforge_llm.load is load
    assert kernelforge_llm.Decoder is Decoder
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        kernelforge_llm.lode  # noqa: B018 (what is tested)
    assert decoder_module.load(session=numpy_session).compile_s == 0.0
