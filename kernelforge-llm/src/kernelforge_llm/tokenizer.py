"""Text to token ids and back, through the `tokenizer.json` of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.chat_template import read_chat_template, render_chat_template
from kernelforge_llm.config_keys import shorten
from kernelforge_llm.files import read_json_object

if TYPE_CHECKING:
    import tokenizers

_MOST_BYTES = 1 << 28
_MOST_IDS = 1 << 24


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of the `tokenizers` library, the special ids it knows, and the chat template that came with it.

    What is put before and after a text (such as the id that opens a document) is what the file's post-processor says.
    """

    backend: tokenizers.Tokenizer
    special_ids: frozenset[int]
    config: Mapping[str, Any]
    """The content of tokenizer_config.json, empty if there is none."""
    chat_template: str | None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in a folder; None if it has no tokenizer.json. Raises `AssetError` if that is broken."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        content = read_json_object(path, _MOST_BYTES)
        config_path = folder / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        return cls.from_content(content, config, read_chat_template(folder, config), str(path))

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], config: Mapping[str, Any], chat_template: str | None, where: str
    ) -> Tokenizer:
        """The tokenizer that the content of a tokenizer.json describes. Raises `AssetError`, naming `where`."""
        _check_prefix(where, content)
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(json.dumps(content))
            backend.no_truncation()
            backend.no_padding()
            backend.encode("a")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the library's native code is no Exception
            raise AssetError(f"{where} is not a tokenizer: {str(error)[:300]}") from None
        special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        if chat_template is not None and not isinstance(chat_template, str):
            raise AssetError(f"{where} has a chat template that is not text")
        return cls(backend, special, config, chat_template)

    def save(self, folder: Path) -> None:
        """Write it into a folder, as `load` reads it. Raises `AssetError` if an id is beyond what vocabularies have."""
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= _MOST_IDS:  # the library writes out every id up to the largest: minutes and gigabytes
            raise AssetError(f"the tokenizer has the token id {largest}; ids must be below {_MOST_IDS}")
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {**self.config, **({} if self.chat_template is None else {"chat_template": self.chat_template})}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included. A model may have more rows than that, as padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`. Raises `UsageError` if it is not valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error}", hint="give it as UTF-8") from None
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; ids the tokenizer does not know have none. Raises `UsageError` for a negative id."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 32:
            raise UsageError(f"token ids must be from 0 to {self.vocab_size - 1}, not {min(ids)} to {max(ids)}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def has_text(self, token_id: int) -> bool:
        """Whether this id is known and stands for text, not for a special mark."""
        return token_id not in self.special_ids and self.backend.id_to_token(token_id) is not None

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation of `{"role": ..., "content": ...}`; encode it with `add_special=False`.

        Raises `AssetError` if there is no template or a broken one (with the line), `UsageError` if it refuses them.
        """
        if self.chat_template is None:
            raise AssetError(
                "the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja)",
                hint="use a plain prompt, or a model tuned for chat",
            )
        return render_chat_template(self.chat_template, messages, self._special_tokens(), add_generation_prompt)

    def _special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like, by which templates refer to special tokens."""
        tokens = {}
        for key, value in self.config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
        return tokens


def _check_prefix(where: str, content: Mapping[str, Any]) -> None:
    """Refuses merges that do not carry the model's subword prefix: the library aborts the process on them."""
    model = content.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(prefix, str) or not isinstance(model.get("merges"), list):
        return
    for merge in model["merges"]:
        right = (
            merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] if isinstance(merge, list) and merge else ""
        )
        if not isinstance(right, str) or not right.startswith(prefix):
            raise AssetError(f"{where} is not a tokenizer: merge {shorten(merge)} lacks the prefix {shorten(prefix)}")
