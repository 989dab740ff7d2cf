"""Whole models on a GPU: the oracles of every architecture, `tinypy`, and quantised weights beside the CPU's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelforge.dialects.transformer.sampling import choose
from kernelforge.errors import KernelForgeWarning
from kernelforge.session import Session
from kernelforge_llm.decoder import Decoder, open_decoder
from kernelforge_llm.importer import LlmImporter
from kernelforge_llm.sampling import Draws, Sampling, greedy, make_sampler
from kernelforge_llm.source import TINYPY, open_source
from kernelforge_llm.weights import WeightFormat
from kernelforge_metal.adapters import list_adapters
from kernelforge_metal.kernel import GpuKernel

Array = np.ndarray[Any, np.dtype[Any]]

DATA = Path(__file__).parent.parent / "kernelforge-llm" / "tests" / "data"
FOLDERS = sorted((DATA / "oracles").iterdir())

TOLERANCE = 5e-4
"""Largest difference over largest logit."""
CLOSE_DRAW = 3e-4
"""A number so near to the boundary of two tokens' probabilities may fall on the other one when logits are rounded otherwise."""
ROUNDED_APART = 3e-2
"""The same from the token on of which sums in another order round one number to another int8: 1/254 of its group's largest, from
which others follow."""
CLOSE_MARGIN = 5e-3
"""A token that won by less may be another one when sums are taken in another order."""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if not list_adapters():
        pytest.skip("no GPU adapter here; on Debian and Ubuntu: apt install mesa-vulkan-drivers libvulkan1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelForgeWarning)  # a software GPU says so
        session = Session("gpu")
    with session:
        yield session


def error(found: Array, want: Array) -> float:
    assert found.shape == want.shape
    return float(abs(found - want).max() / abs(want).max())


def check(decoder: Decoder, golden: Any, prompt: str, most: int) -> int:
    """Logits after every token of the prompt, and greedy tokens up to the first that won narrowly: how many."""
    ids = golden[f"{prompt}_ids"].tolist()
    assert error(decoder.logits(ids), golden[f"{prompt}_logits"]) < TOLERANCE
    close = np.flatnonzero(golden[f"{prompt}_greedy_margin"] < CLOSE_MARGIN)
    count = min(int(close[0]) if close.size else most, most)
    tokens = [t.id for t in decoder.generate(ids, count, ignore_eos=True) if t.id is not None]
    assert tokens == golden[f"{prompt}_greedy"][:count].tolist()
    return count


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_architecture(gpu: Session, folder: Path) -> None:
    decoder = open_decoder(open_source(folder), gpu, weights="f32", sequences=2)
    golden = np.load(folder / "golden.npz")
    assert check(decoder, golden, "short", 12) + check(decoder, golden, "long", 6) > 3
    ids = golden["short_ids"].tolist()
    for one, other in zip(decoder.logits_batch([ids[:3], ids]), (ids[:3], ids), strict=True):
        assert error(one, decoder.logits(other)) < 1e-5


def test_the_token_stays_on_the_device(gpu: Session) -> None:
    decoder = open_decoder(open_source(FOLDERS[0]), gpu, weights="f32")
    cache = decoder.new_cache()
    tokens = [greedy(decoder.feed(cache, [5, 6, 7]))]
    while len(tokens) < 12:
        tokens.append(greedy(decoder.feed(cache, tokens[-1:])))
    answer = decoder.generate([5, 6, 7], 12, ignore_eos=True)
    assert [next(answer).id for _ in range(4)] == tokens[:4]
    del answer  # with a step under way
    stopped = decoder.generate([5, 6, 7], 12, stop_ids=[tokens[6]], ignore_eos=True)
    assert [t.id for t in stopped] == tokens[: tokens.index(tokens[6])]
    assert [t.id for t in decoder.generate([5, 6, 7], 12, ignore_eos=True)] == tokens


def test_a_seed_draws_the_same_tokens_as_on_the_host(gpu: Session) -> None:
    """Up to where a number is so near a boundary that the logits' own differences decide."""
    sampling = Sampling(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=8)
    prompt = [5, 6, 7]
    with Session("reference") as host:
        decoder = open_decoder(open_source(FOLDERS[0]), host, weights="f32")
        cache, draws = decoder.new_cache(), Draws(sampling.seed)
        want: list[int] = []
        scores = decoder.feed(cache, prompt)
        while len(want) < 16:
            u = float(draws.take())
            choice = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            found = {choose(scores, *choice, uniform) for uniform in (u, max(u - CLOSE_DRAW, 0.0), u + CLOSE_DRAW)}
            if len(found) > 1:
                break
            want += found
            scores = decoder.feed(cache, want[-1:])
    assert len(want) > 3
    decoder = open_decoder(open_source(FOLDERS[0]), gpu, weights="f32")
    step = decoder.model.sampled
    plan = gpu.plan(step.module, dims=step.dims)
    assert [(s.problem.op, s.variant) for s in plan.steps][-1] == ("transformer.sample", "wgsl")
    answer = decoder.generate(prompt, len(want), make_sampler(sampling), ignore_eos=True)
    assert [t.id for t in answer] == want
    drawn = decoder.explain(1, 8, sampler=make_sampler(sampling), repeats=1)
    assert [use.op for use in drawn.steps][-1] == "transformer.sample"
    assert "transformer.sample" not in [use.op for use in decoder.explain(1, 8, repeats=1).steps]
    programs = LlmImporter().load(str(FOLDERS[0]), device=gpu.device.info).programs
    assert [program.name for program in programs] == ["decode", "prefill", "decode-sampled"]


def test_tinypy(gpu: Session) -> None:
    decoder = open_decoder(open_source(TINYPY), gpu, weights="f32")
    assert check(decoder, np.load(DATA / "tinypy" / "golden.npz"), "p0", 12) > 3


@pytest.mark.parametrize("weights", ["q8", "q4", "f16", "bf16"])
def test_narrow_weights_give_what_the_reference_gives(gpu: Session, weights: WeightFormat) -> None:
    source = open_source(FOLDERS[0])
    ids = np.load(FOLDERS[0] / "golden.npz")["long_ids"].tolist()
    with Session("reference") as reference:
        want = open_decoder(source, reference, weights=weights, kv_dtype="f32").logits(ids)
    assert error(open_decoder(source, gpu, weights=weights, kv_dtype="f32").logits(ids), want) < TOLERANCE
    found = open_decoder(source, gpu, weights=weights).logits(ids)  # keys and values in f16
    assert error(found, want) < 1e-2


@pytest.mark.parametrize("weights", ["q8", "q4"])
def test_activations_in_8_bits_give_what_they_give_on_the_cpu(gpu: Session, weights: WeightFormat) -> None:
    """As the CPU multiplies by default: prompts, and a step of one token each. No op runs on the host. Where a number was rounded
    to another int8, what follows differs by more than its sums: so the prompts are short. The caches are in f32, as in a narrower
    type a GPU's newest row counts before it is rounded."""
    folder = DATA / "oracles" / "qwen2-bias"
    source = open_source(folder)
    ids = np.load(folder / "golden.npz")["long_ids"].tolist()

    def logits(session: Session) -> Array:
        decoder = open_decoder(source, session, weights=weights, activations="q8", kv_dtype="f32")
        cache, rows = decoder.new_cache(), []
        for start in range(0, 16, 4):
            cache.truncate(0, 0)
            rows += [decoder.feed(cache, part) for part in (ids[start : start + 4], ids[start + 4 : start + 5])]
        return np.stack(rows)

    with Session("cpu") as cpu:
        want = logits(cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelForgeWarning)
        found = logits(gpu)
    apart, size = abs(found - want).max(axis=1), abs(want).max()
    assert np.median(apart) < TOLERANCE * size
    assert apart.max() < ROUNDED_APART * size
    second, first = np.sort(want, axis=1)[:, -2:].T
    clear = first - second > CLOSE_MARGIN * size
    clear &= apart < TOLERANCE * size
    assert clear.sum() > len(want) / 3
    np.testing.assert_array_equal(found.argmax(axis=1)[clear], want.argmax(axis=1)[clear])


def test_a_cache_in_q8_gives_what_it_gives_on_the_cpu(gpu: Session) -> None:
    """Heads of 32 elements, whose odd groups share words; prefill, and steps of one token. No op runs on the host."""
    folder = DATA / "oracles" / "llama3-rope"
    source = open_source(folder)
    ids = np.load(folder / "golden.npz")["long_ids"].tolist()[:24]

    def logits(session: Session) -> Array:
        decoder = open_decoder(source, session, weights="f32", kv_dtype="q8")
        cache = decoder.new_cache()
        assert {b.dtype for b in cache.buffers.values()} == {"q8"}
        return np.stack([decoder.feed(cache, ids[:20]), *(decoder.feed(cache, [i]) for i in ids[20:])])

    with Session("cpu") as cpu:
        want = logits(cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelForgeWarning)
        found = logits(gpu)
    assert error(found, want) < TOLERANCE


def test_all_ops_of_a_model_have_kernels(gpu: Session) -> None:
    decoder = open_decoder(open_source(TINYPY), gpu, weights="q4")
    explanation = decoder.explain(1, 8, repeats=1)
    assert [use.op for use in explanation.steps if use.variant == "reference"] == []
    assert all(use.seconds and use.seconds > 0 for use in explanation.steps)


@pytest.mark.parametrize("weights", ["f16", "q4"])
def test_dispatches_of_a_decode_step(gpu: Session, weights: WeightFormat) -> None:
    """Each costs more than a microsecond. A layer: q, k and v with their norm, RoPE, caches and attention, its projection, both
    halves of the MLP; beyond 128 tokens a merge for attention. Besides: the token's row, the head with the last norm, the best
    logit."""
    model = open_decoder(open_source(TINYPY), gpu, weights=weights).model
    one, many = model.programs
    plan = gpu.plan(one.module, dims=one.dims, max_dims=one.max_dims)
    short = long = 0
    for step in plan.steps:
        kernel = gpu.registry.variant("gpu", step.problem.op, step.variant)
        built = kernel.build_kernel(step.problem, step.config, gpu.device.info)
        assert isinstance(built, GpuKernel)
        short += sum(d.unless is None for d in built.dispatches)
        long += sum(d.only is None for d in built.dispatches)
    layers = model.config.num_layers
    assert (short, long) == (5 * layers + 3, 6 * layers + 3)
    prefill = [step.problem.op for step in gpu.plan(many.module, dims=many.dims, max_dims=many.max_dims).steps]
    assert "transformer.rms_norm_matmul" not in prefill  # norm and product apart, as tiles want them
