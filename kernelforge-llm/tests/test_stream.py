from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from kernelforge.errors import UsageError
from kernelforge_llm import tokenizer as tokenizer_module
from kernelforge_llm.stream import StopStrings, TextStream
from kernelforge_llm.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
TINYPY = Path(tokenizer_module.__file__).parent / "assets" / "tinypy"

TEXTS = [
    "def f(x):\n    return x  # naïve\n",
    "你好, 世界! 🎉🎉 👩‍👩‍👧",
    "a 你 b 🎉c",
    "e\u0301 \u00a0 ﷽",
    "lone \ufffd\ufffd\ufffd你 and more",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer.load(TINYPY)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Whole words with a leading space, and a token per byte for the rest, as Llama 2 and Mistral have them."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "!",
        "▁a",
        "▁b",
        "c",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, frozenset([1]), {}, None)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt_ids)
    return [*(stream.push(token) for token in ids), stream.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token per byte."""
    if (first := tokenizer.backend.token_to_id("<0x00>")) is not None:
        return [first + byte for byte in data]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = [tokenizer.backend.token_to_id(alphabet[byte]) for byte in data]
    assert None not in ids
    return [token for token in ids if token is not None]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_pieces_join_to_the_text(byte_level: Tokenizer, text: str) -> None:
    pieces = pieces_of(byte_level, byte_level.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_single_bytes_join_to_the_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    # SentencePiece's own decoding drops a leading space only, of which there is none here.
    pieces = pieces_of(tokenizer, byte_ids(tokenizer, text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all(len(piece) <= 1 for piece in pieces)


def test_text_is_not_held_back(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("import numpy as np\n", add_special=False)
    stream = TextStream(byte_level)
    assert [stream.push(token) for token in ids] == [byte_level.decode([token]) for token in ids]
    assert stream.flush() == ""


def test_a_character_waits_for_its_last_byte(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level)
    assert [stream.push(token) for token in byte_ids(byte_level, "x🎉y".encode())] == ["x", "", "", "", "🎉", "y"]


def test_greedy_golden_texts(byte_level: Tokenizer) -> None:
    golden = np.load(DATA / "tinypy" / "golden.npz")
    for number, prompt in enumerate(json.loads((DATA / "tinypy" / "golden_prompts.json").read_text(encoding="utf-8"))):
        prompt_ids, ids = golden[f"p{number}_ids"].tolist(), golden[f"p{number}_greedy"].tolist()
        text = "".join(pieces_of(byte_level, ids, prompt_ids))
        assert prompt + text == byte_level.decode([*prompt_ids, *ids])


def test_spaces_of_sentencepiece(sentencepiece: Tokenizer) -> None:
    hello, world, bang = (sentencepiece.backend.token_to_id(piece) for piece in ("▁Hello", "▁world", "!"))
    assert hello is not None
    assert world is not None
    assert bang is not None
    assert pieces_of(sentencepiece, [hello, world, bang, hello]) == ["Hello", " world", "!", " Hello", ""]
    assert pieces_of(sentencepiece, [world, bang], [hello]) == [" world", "!", ""]
    # A special token has no text, and takes no space from the next.
    assert pieces_of(sentencepiece, [hello, 1, world]) == ["Hello", "", " world", ""]
    party = byte_ids(sentencepiece, "🎉".encode())
    assert pieces_of(sentencepiece, [hello, *party, *party, world]) == [
        *["Hello", "", "", "", "🎉", "", "", "", "🎉", " world", ""]
    ]


def test_special_and_unknown_ids_have_no_text(byte_level: Tokenizer) -> None:
    ids = byte_ids(byte_level, "你".encode())
    assert pieces_of(byte_level, [0, ids[0], 0, ids[1], 5000, ids[2], 0]) == ["", "", "", "", "", "你", "", ""]


def test_an_unfinished_character_shows_at_the_end(byte_level: Tokenizer) -> None:
    assert pieces_of(byte_level, byte_ids(byte_level, "a🎉".encode()[:3])) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_invalid_bytes_do_not_stop_the_stream(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in byte_ids(tokenizer, b"\x80" * 50)]
    assert sum(map(len, shown)) == 47
    assert "".join(shown) + stream.flush() == "\ufffd" * 50
    # What follows them is whole again, in whatever state they leave the stream.
    for count in range(8):
        ids = byte_ids(tokenizer, b"a" + b"\x80" * count + "你🎉b".encode())
        assert "".join(pieces_of(tokenizer, ids)) == "a" + "\ufffd" * count + "你🎉b"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_equal_a_lossy_decode(byte_level: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    alphabet = [b"a", b" ", b"\x80", b"\xe4", b"\xf0", "é".encode(), "你".encode(), "🎉".encode(), "\ufffd".encode()]
    data = b"".join(chance.choices(alphabet, k=60))
    pieces = pieces_of(byte_level, byte_ids(byte_level, data))
    assert "".join(pieces) == data.decode(errors="replace")


def test_tokens_that_end_one_character_and_begin_the_next() -> None:
    parts = ["x\u00e4", "½łä", "½łä", "½łä", "½łä", "½łä", "½ł"]  # 你 is e4 bd a0: ä ½ ł in the byte alphabet
    vocab = {part: number for number, part in enumerate(dict.fromkeys(parts))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, frozenset(), {}, None)
    ids = [vocab[part] for part in parts]
    assert pieces_of(tokenizer, ids) == ["x", "你", "你", "你", "你", "你", "你", ""]


def test_a_prompt_may_end_within_a_character(byte_level: Tokenizer) -> None:
    ids = byte_ids(byte_level, "你".encode())
    for cut in (1, 2):
        assert "".join(pieces_of(byte_level, ids[cut:], byte_level.encode("a") + ids[:cut])) == "你"
    assert pieces_of(byte_level, byte_ids(byte_level, b"b"), byte_level.encode("a\ufffd")) == ["b", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, [1, 2])
    assert [stream.push(3), stream.flush()] == ["", ""]


def stopped(stops: Sequence[str], *texts: str) -> tuple[list[str], str | None]:
    stop = StopStrings(stops)
    return [*(stop.push(text) for text in texts), stop.flush()], stop.hit


@pytest.mark.parametrize(
    ("stops", "texts", "shown", "hit"),
    [
        ([], ["a", "b"], ["a", "b", ""], None),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], "\n\n"),
        (["END"], ["xE", "N", "X"], ["x", "", "ENX", ""], None),
        (["END"], ["xEN"], ["x", "EN"], None),
        (["END"], ["xENDy", "z"], ["x", "", ""], "END"),
        (["END", "D"], ["aEND"], ["a", ""], "END"),
        (["b", "a"], ["xab"], ["x", ""], "a"),
        (["abcd", "bc"], ["xab", "c"], ["x", "a", ""], "bc"),
        (["aab"], ["aaab"], ["a", ""], "aab"),
        (["ababc"], ["abab", "abc", "d"], ["", "ab", "", ""], "ababc"),
        ("stop", ["a stop"], ["a ", ""], "stop"),
    ],
)
def test_stop_strings(stops: list[str], texts: list[str], shown: list[str], hit: str | None) -> None:
    assert stopped(stops, *texts) == (shown, hit)


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_in_any_split(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("ab", k=40))
    stops = ["".join(chance.choices("ab", k=chance.randint(3, 6))) for _ in range(3)]
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    cuts = sorted(chance.choices(range(41), k=8))
    shown, hit = stopped(stops, *(text[i:j] for i, j in zip([0, *cuts], [*cuts, 40], strict=True)))
    assert (hit is not None) == (first < len(text))
    # A shorter stop string may complete first although a longer one began before it; both begin after the text shown.
    assert text.startswith("".join(shown))
    assert "".join(shown) == text[:first] if hit is None else not any(stop in "".join(shown) for stop in stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopStrings(["a", ""])
