"""Vocabularies of GGUF files: text to tokens as their own tokenizers do it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import add_tensor, finish, small_writer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kernelforge.errors import AssetError
from kernelforge_llm.gguf import open_gguf
from kernelforge_llm.gguf.pre_tokenizers import PATTERNS
from kernelforge_llm.source import TINYPY
from kernelforge_llm.tokenizer import Tokenizer

SPACE = "\u2581"
TEXTS = (
    "def f(x):\n    return x ** 2  # a comment\n\n\n",
    "Hello, World! It's 1234567 o'clock; we'LL see...",
    "  leading and trailing  ",
    "tabs\tand\r\nnew\n\n lines \n",
    "Größe, été, 東京 мир, e\u0301 \U0001f600!",
    "<s>marks</s> inside<s>",
    "",
    " ",
    "\x00\x07\x1b",
)


def tokenizer(path: Path, **metadata: Any) -> Tokenizer:
    """Of a file with a table of embeddings and these values after `tokenizer.ggml.`."""
    writer = small_writer(path)
    for name, value in metadata.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    add_tensor(writer, "token_embd.weight", np.zeros((4, 32), np.float32), "f32")
    finish(writer)
    found = open_gguf(path).tokenizer
    assert found is not None
    return found


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    words = ["self", "return", " ", "  ", "\n", "\t", "1", "23", "(", ")", "_", "'s", "'", "ß", "é", "\u6771", "X", "i"]
    return ["".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """The vocabulary of tinypy."""
    model = json.loads((TINYPY / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"model": "gpt2", "tokens": tokens, "token_type": [3] + [1] * (len(tokens) - 1), "merges": merges}


def test_byte_level_vocabulary_equals_that_of_tokenizers(byte_level: dict[str, Any], tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", **byte_level, pre="smollm", add_bos_token=True, bos_token_id=0)
    vocab = {token: i for i, token in enumerate(byte_level["tokens"])}
    want = Backend(models.BPE(vocab, [tuple(m.split(" ")) for m in byte_level["merges"]]))
    want.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    want.decoder = decoders.ByteLevel()
    for text in (*TEXTS, *random_texts(200)):
        ids = want.encode(text).ids
        assert found.encode(text) == [0, *ids]
        assert found.encode(text, add_special=False) == ids
        assert found.decode(ids) == text
    assert found.encode("a<|endoftext|>b", add_special=False)[1] == 0
    assert found.special_ids == {0}
    assert found.config["bos_token"] == "<|endoftext|>"


# Lengths of the pieces of one text, told apart by digits, letter cases, apostrophes and spaces.
PIECES = {
    "gpt-2": ["It", "'", "LL", " cost", " 12345", "  ", " $", "  \n"],
    "llama-bpe": ["It", "'LL", " cost", " ", "123", "45", "  ", " $", "  \n"],
    "qwen2": ["It", "'LL", " cost", " ", "1", "2", "3", "4", "5", "  ", " $", "  \n"],
    "smollm": ["It", "'", "LL", " cost", " ", "1", "2", "3", "4", "5", "  ", " $", "  \n"],
    "tekken": ["It", "'LL", " cost", " ", "1", "2", "3", "4", "5", "  ", " $", "  \n"],
    "default": ["It", "'", "LL", " cost", " ", "123", "45", "   ", "$", "  \n"],
}


@pytest.mark.parametrize("name", PIECES)
def test_a_text_is_split_as_the_name_says(name: str, byte_level: dict[str, Any], tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", **byte_level, pre=name)
    pieces = found.backend.pre_tokenizer.pre_tokenize_str("It'LL cost 12345   $  \n")
    assert [("It'LL cost 12345   $  \n"[a:b]) for _, (a, b) in pieces] == PIECES[name]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_way_of_splitting_keeps_the_text(name: str, byte_level: dict[str, Any], tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", **byte_level, pre=name)
    for text in TEXTS[:4]:
        assert found.decode(found.encode(text, add_special=False)) == text


def pieces() -> dict[str, Any]:
    """A vocabulary of SentencePiece: marks, bytes, letters, and words made of them, each with a score of its own."""
    rng = random.Random(0)
    letters = list(SPACE + "abcdefgh")
    words = dict.fromkeys(letters)
    while len(words) < 300:
        left, right = rng.choices(list(words), k=2)
        if len(left + right) < 9:
            words[left + right] = None
    made = list(words)[len(letters) :]
    rng.shuffle(made)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "[user]", *made, *letters]
    kinds = [2, 3, 3] + [6] * 256 + [4] + [1] * (len(made) + len(letters))
    scores = [0.0] * 260 + [-float(i) for i in range(len(made))] + [-1e4] * len(letters)
    return {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "bos_token_id": 1}


def merged(text: str, vocabulary: dict[str, Any]) -> list[int]:
    """SentencePiece's rule, word for word: the best pair of neighbours, the first of several, until none is a piece."""
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    symbols = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        pairs = [
            (-vocabulary["scores"][ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in ids
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])]


def test_sentencepiece_merges_the_best_pair_first(tmp_path: Path) -> None:
    vocabulary = pieces()
    found = tokenizer(tmp_path / "m.gguf", **vocabulary)
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choices("abcdefgh  zé", k=rng.randrange(0, 30)))
        ids = found.encode(text)
        assert ids == [1, *merged(text, vocabulary)]
        assert found.decode(ids) == text
    assert found.encode("[user]", add_special=False) == [259]
    assert found.has_text(259)
    assert found.special_ids == {0, 1, 2}


def test_without_a_space_before_the_text(tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "m.gguf", **pieces(), add_space_prefix=False, add_bos_token=False)
    assert found.encode("zz") == [3 + ord("z")] * 2
    assert found.decode(found.encode(" ab")) == " ab"


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"model": "gpt2", "pre": "gpt-2"}, "has no list tokenizer.ggml.tokens"),
    "no merges": ({"model": "gpt2", "tokens": ["a"]}, "has no list tokenizer.ggml.merges"),
    "merge": ({"model": "gpt2", "tokens": ["a"], "merges": ["a"]}, "has a merge 'a'"),
    "empty merge": ({"model": "gpt2", "tokens": ["a"], "merges": [""]}, "has a merge ''"),
    "strange merge": ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, "is not a tokenizer"),
    "pre": (
        {"model": "gpt2", "tokens": ["a"], "merges": ["a a"], "pre": "x"},
        "in the way 'x', which is not supported",
    ),
    "types": ({"model": "llama", "tokens": ["a"], "token_type": [1, 1]}, "has 1 tokens and another number of"),
    "scores": ({"model": "llama", "tokens": ["a"], "scores": [float("nan")]}, "is not finite"),
    "bos": ({"model": "llama", "tokens": ["a"], "bos_token_id": 1}, "has bos_token_id 1 and 1 tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    metadata, message = BROKEN[name]
    with pytest.raises(AssetError, match=message):
        tokenizer(tmp_path / "m.gguf", **metadata)
