"""Text from a stream of token ids, whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

from kernelforge.errors import UsageError
from kernelforge_llm.tokenizer import Tokenizer

_OPEN = "\ufffd"
_MOST_OPEN = 3
"""Tokens that can be waiting for the end of one character, whose UTF-8 has at most four bytes."""


class Token(NamedTuple):
    """One generated token."""

    id: int | None
    """None for the text that was held back when generation ended."""
    text: str
    """The text that became complete with it: at times empty, never the beginning of a character."""


class TextStream:
    """Turns token ids into text as they come. A token may end within a character: its text waits for the rest.

    A decoder may treat its first token differently (SentencePiece's drops a leading space), so a lone token is decoded
    behind those before it. `prompt_ids` are what the first one stands behind; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int] = ()) -> None:
        """Without a tokenizer every text is empty."""
        self._tokenizer = tokenizer
        self._context = list(prompt_ids)
        self._run: list[int] = []  # tokens since the text last ended with a whole character
        self._shown = 0  # characters of the run's text that were handed out
        self._waiting = 0  # tokens since the run last gained a whole character

    def push(self, token_id: int) -> str:
        """The text that this token completes: mostly all of its own, at times none."""
        if self._tokenizer is None or not self._tokenizer.has_text(token_id):
            return ""
        self._run.append(token_id)
        text = self._run_text()
        whole = text.rstrip(_OPEN)
        if whole == text:
            self._waiting = 0
            return self._hand_out(text, len(self._run))
        self._waiting = 1 if len(whole) > self._shown else self._waiting + 1
        if self._waiting > _MOST_OPEN:
            return self._give_up()
        new = whole[self._shown :]
        self._shown += len(new)
        return new

    def flush(self) -> str:
        """What is left when no more tokens come; an unfinished character shows as U+FFFD."""
        return self._hand_out(self._decode(self._run), len(self._run))

    def _give_up(self) -> str:
        """Hands out the first of too many waiting tokens, with those after it that belong to the same U+FFFD."""
        first = len(self._run) - _MOST_OPEN
        texts = [self._decode(self._run[:tokens]) for tokens in range(first, len(self._run))]
        more = max(n for n, text in enumerate(texts) if len(text) == len(texts[0]))
        self._waiting = _MOST_OPEN - more
        return self._hand_out(texts[more], first + more)

    def _run_text(self) -> str:
        # If there are several tokens, the first ends within a character: bytes, which no decoder trims.
        if len(self._run) > 1 or not self._context:
            return self._decode(self._run)
        before, both = self._decode(self._context), self._decode(self._context + self._run)
        return both[len(before if both.startswith(before) else before.rstrip(_OPEN)) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids) if self._tokenizer else ""

    def _hand_out(self, text: str, tokens: int) -> str:
        """The part of `text`, that of the run's first tokens, which was not shown yet; they become the context."""
        new = text[self._shown :]
        self._context = self._run[:tokens] if text else self._context + self._run[:tokens]
        self._run = self._run[tokens:]
        self._shown = 0
        return new


class StopStrings:
    """Ends a text before the first of some strings; holds back an ending that may become one of them."""

    def __init__(self, stops: str | Sequence[str]) -> None:
        """Raises `UsageError` for an empty stop string, which every text would contain."""
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(self._stops):
            raise UsageError("a stop string is empty", hint="leave it out")
        self._held = ""
        self.hit: str | None = None
        """The stop string that was met, None as long as there is none."""

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string; nothing once one was met."""
        if not self._stops:
            return text
        if self.hit is not None:
            return ""
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, self.hit = min(found)
            self._held = ""
            return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back and never became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def with_text(
    tokens: Generator[int, None, None], history: list[int], stream: TextStream, stop: StopStrings, ends: Collection[int]
) -> Iterator[Token]:
    """`tokens` up to one of `ends` or a stop string, which are not among them, each with its text and added to `history`."""
    with closing(tokens):
        for token in tokens:
            if token in ends:
                break
            history.append(token)
            text = stop.push(stream.push(token))
            yield Token(token, text)
            if stop.hit is not None:
                break
    rest = stop.push(stream.flush()) + stop.flush()
    if rest:
        yield Token(None, rest)
