"""The vocabulary in a GGUF file as a tokenizer, by way of the content of a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.gguf.pre_tokenizers import ADD_BOS, BYTE_LEVEL, IGNORE_MERGES, NFC, PATTERNS
from kernelforge_llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kernelforge_llm.gguf.file import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""`tokenizer.ggml.token_type`."""

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def read_tokenizer(file: GgufFile) -> Tokenizer | None:
    """The tokenizer; None for a file without one. Raises `AssetError` if it is broken or not supported."""
    where = f"{file.path}: the tokenizer"
    values = {
        key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")
    }
    try:
        content = _content(values)
    except AssetError as error:
        raise AssetError(f"{where} {error}", hint=error.hint) from None
    if content is None:
        return None
    return Tokenizer.from_content(content, _special_tokens(values), values.get("chat_template"), where)


def _content(values: Mapping[str, Any]) -> dict[str, Any] | None:
    if (text := values.get("huggingface.json")) is not None:
        try:
            content = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise AssetError(f"(tokenizer.huggingface.json) is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise AssetError("(tokenizer.huggingface.json) is no JSON object")
        return content
    model = values.get("ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in _MODELS:
        raise AssetError(
            f"is of model {shorten(model)}, which is not supported", hint=f"supported: {', '.join(_MODELS)}"
        )
    tokens = _strings(values, "ggml.tokens")
    kinds = _numbers(values, "ggml.token_type", len(tokens))
    made: dict[str, Any] = _MODELS[model](values, tokens, kinds)
    bos = _added(values, tokens, "bos", default=model == "llama" or values.get("ggml.pre") in ADD_BOS)
    eos = _added(values, tokens, "eos", default=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, kinds),
        "post_processor": _template(bos, eos),
        **made,
    }


def _sentencepiece(values: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """SentencePiece's BPE: the neighbours that make the piece of the highest score are merged first."""
    scores = _numbers(values, "ggml.scores", len(tokens))
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    prefix = bool(values.get("ggml.add_space_prefix", True))
    start = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": any(kind == _BYTE for kind in kinds),
            "vocab": _vocab(tokens),
            "merges": _merges(tokens, kinds, scores),
        },
    }


def _merges(tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make another one, best first; of the same score, the longest left piece first."""
    whole = {token for token, kind in zip(tokens, kinds, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    found = [
        (score, cut, token)
        for token, score in zip(tokens, scores, strict=True)
        if token in whole
        for cut in range(1, len(token))
        if token[:cut] in whole and token[cut:] in whole
    ]
    found.sort(key=lambda merge: (-merge[0], -merge[1]))
    return [(token[:cut], token[cut:]) for _, cut, token in found]


def _byte_level(values: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """GPT-2's BPE over bytes, each written as a letter, after the text is split by the patterns of `ggml.pre`."""
    name = values.get("ggml.pre", "default")
    if name not in PATTERNS:
        raise AssetError(
            f"splits text in the way {shorten(name)}, which is not supported", hint=f"supported: {', '.join(PATTERNS)}"
        )
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[name]
    ]
    merges = []
    for merge in _strings(values, "ggml.merges"):
        left, space, right = merge[1:].partition(" ")  # the first piece is not empty, and may begin with a space
        if not space or not right:
            raise AssetError(f"has a merge {shorten(merge)} that is not two pieces")
        merges.append((merge[0] + left, right))
    return {
        "normalizer": {"type": "NFC"} if name in NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": name in IGNORE_MERGES,
            "vocab": _vocab(tokens),
            "merges": merges,
        },
    }


_MODELS = {"llama": _sentencepiece, "gpt2": _byte_level}


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for number, token in enumerate(tokens):
        vocab.setdefault(token, number)
    return vocab


def _added_tokens(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text as they are, before anything else is done to it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, "special": kind != _USER_DEFINED, **plain}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _added(values: Mapping[str, Any], tokens: Sequence[str], name: str, *, default: bool) -> tuple[str, int] | None:
    """The token that is put before (bos) or after (eos) a text, if one is."""
    if not values.get(f"ggml.add_{name}_token", default):
        return None
    number = values.get(f"ggml.{name}_token_id")
    return None if number is None else (_token(tokens, number, name), number)


def _template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None

    def mark(token: tuple[str, int] | None) -> list[dict[str, Any]]:
        return [] if token is None else [{"SpecialToken": {"id": token[0], "type_id": 0}}]

    parts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [*mark(bos), parts[0], *mark(eos)],
        "pair": [*mark(bos), *parts, *mark(eos)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in filter(None, (bos, eos))
        },
    }


def _special_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token` and the like, as a tokenizer_config.json has them."""
    tokens = values.get("ggml.tokens")
    if not isinstance(tokens, list):
        return {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {key: values.get(f"ggml.{name}_token_id") for name, key in names.items()}
    return {key: tokens[i] for key, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def _token(tokens: Sequence[str], number: Any, name: str) -> str:
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise AssetError(f"has {name}_token_id {shorten(number)} and {len(tokens)} tokens")
    return tokens[number]


def _strings(values: Mapping[str, Any], key: str) -> list[str]:
    found = values.get(key)
    if not isinstance(found, list):
        raise AssetError(f"has no list tokenizer.{key}")
    return found


def _numbers(values: Mapping[str, Any], key: str, count: int) -> Any:
    """A list of numbers, one a token; zeros where there is none."""
    import numpy as np

    found = values.get(key, np.zeros(count, np.int32))
    if not isinstance(found, np.ndarray) or len(found) != count:
        raise AssetError(f"has {count} tokens and another number of tokenizer.{key}")
    if not np.isfinite(found).all():
        raise AssetError(f"has a tokenizer.{key} that is not finite")
    return found.tolist()
