"""The same prompt, answered by Cerebras (or any other server of OpenAI's chat completions), for a comparison.

The protocol: https://inference-docs.cerebras.ai/api-reference/chat-completions
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from kernelforge.errors import AssetError, KernelForgeError, KernelForgeWarning, UsageError

DEFAULT_API_BASE = "https://api.cerebras.ai/v1"
DEFAULT_MODEL = "gpt-oss-120b"
KEY_VARIABLE = "CEREBRAS_API_KEY"

_MOST_BYTES = 1 << 24
_HINTS = {
    401: f"check the key in {KEY_VARIABLE}",
    403: f"check the key in {KEY_VARIABLE} and what it may use",
    404: "check the model's name and the address; the address followed by /models lists the models",
    429: "wait a while: the account's limit is reached",
}


@dataclass(frozen=True)
class RemoteAnswer:
    """A server's answer and its speed."""

    text: str
    model: str
    completion_tokens: int | None
    """As counted by the server; None if it does not say."""
    seconds: float
    """From sending the request to the end of the answer."""
    tokens_per_second: float | None
    """By the server's own clock where it tells the time (`time_info`), else over `seconds`."""


def require_key(environment: Mapping[str, str]) -> str:
    """The key in `CEREBRAS_API_KEY`, to be asked for before work whose result it would spoil. Raises `AssetError`."""
    return _usable_key(environment.get(KEY_VARIABLE))


def require_address(api_base: str) -> None:
    """To be asked, as for the key, before work whose result it would spoil. Raises `UsageError` for an address that is not
    http(s), or has no host."""
    try:
        parts = urllib.parse.urlsplit(api_base)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is left open
        usable = False
    if not usable or not api_base.isascii() or not api_base.isprintable() or " " in api_base:
        raise UsageError(f"the address must begin with https:// or http:// and name a host, not {api_base!r}")


def complete(
    prompt: str,
    *,
    api_key: str | None,
    api_base: str = DEFAULT_API_BASE,
    model: str = DEFAULT_MODEL,
    max_tokens: int = 128,
    timeout: float = 60.0,
) -> RemoteAnswer:
    """The model's answer, of at most `max_tokens` tokens, to one user message.

    It waits at most `timeout` seconds for the next bytes. Raises `AssetError` without a usable key,
    `UsageError` for an address that is not http(s), `KernelForgeError` if the server refuses, fails, stays silent or
    answers with something else. The key is in no message.
    """
    key = _usable_key(api_key)
    require_address(api_base)
    url = f"{api_base.rstrip('/')}/chat/completions"
    message = {"role": "user", "content": prompt}
    request = urllib.request.Request(
        url,
        json.dumps({"model": model, "messages": [message], "max_completion_tokens": max_tokens}).encode(),
        # The default User-Agent of urllib is turned away by the network that stands before the API.
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "User-Agent": "kernelforge-llm"},
    )
    start = time.perf_counter()
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
            body = response.read(_MOST_BYTES)
    except urllib.error.HTTPError as error:
        with error:
            reason = _server_message(error).replace(key, "***")
        raise KernelForgeError(f"{url} answered {error.code}{reason}", hint=_HINTS.get(error.code)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreachable(url, error, timeout) from None
    return _parse(body, url, model, time.perf_counter() - start)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _usable_key(api_key: str | None) -> str:
    key = (api_key or "").strip()
    if not key:
        raise AssetError("there is no API key", hint=f"get one at https://cloud.cerebras.ai and set {KEY_VARIABLE}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AssetError("the API key has characters that no key has", hint=f"set {KEY_VARIABLE} anew")
    return key


def _server_message(error: IO[bytes]) -> str:
    """What an error's body says, in one line, led by a colon; empty if it cannot be read."""
    try:
        text = error.read(4096).decode(errors="replace")
    except OSError:
        return ""
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        text = inner.get("message", text) if isinstance(inner, dict) else str(inner)
    except (ValueError, AttributeError):
        pass
    line = " ".join(str(text).split())[:300]
    return f": {line}" if line else ""


def _unreachable(url: str, error: Exception, timeout: float) -> KernelForgeError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return KernelForgeError(f"{url} did not answer within {timeout:g} seconds", hint="try again")
    return KernelForgeError(f"{url} cannot be reached: {reason}", hint="check the address and the connection")


def _parse(body: bytes, url: str, model: str, seconds: float) -> RemoteAnswer:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise KernelForgeError(f"{url} answered with something that is not JSON: {body[:80]!r}") from None
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
    except (LookupError, TypeError, AttributeError):
        raise KernelForgeError(f"{url} answered with JSON that holds no answer (choices[0].message)") from None
    if not isinstance(text, str):
        raise KernelForgeError(f"{url} answered with a content that is not text")
    if not text and choice.get("finish_reason") == "length":
        warnings.warn(f"{model} spent all its tokens on reasoning: ask for more", KernelForgeWarning, stacklevel=3)
    tokens = _number(answer, "usage", "completion_tokens")
    server_seconds = _number(answer, "time_info", "completion_time")
    return RemoteAnswer(
        text=text,
        model=str(answer.get("model") or model),
        completion_tokens=None if tokens is None else int(tokens),
        seconds=seconds,
        tokens_per_second=None if tokens is None else tokens / (server_seconds or seconds),
    )


def _number(answer: Mapping[str, Any], part: str, key: str) -> float | None:
    """A positive number in a part of the answer that may be absent."""
    value = answer[part].get(key) if isinstance(answer.get(part), dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
