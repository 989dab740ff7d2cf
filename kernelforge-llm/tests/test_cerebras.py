from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kernelforge.errors import AssetError, KernelForgeError, KernelForgeWarning, UsageError
from kernelforge_llm.cerebras import complete, require_key

KEY = "csk-secret-0123456789"
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "model": "gpt-oss-120b",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Jumps over 你.", "reasoning": "?"},
        }
    ],
    "usage": {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14},
    "time_info": {"queue_time": 0.001, "prompt_time": 0.002, "completion_time": 0.005, "total_time": 0.008},
}


class Server(ThreadingHTTPServer):
    """Speaks the chat completions protocol: answers with `status` and `body`, remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body: bytes = json.dumps(ANSWER).encode()
        self.headers: dict[str, str] = {}
        self.announced: int | None = None
        self.before: Callable[[], object] = lambda: None
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
        self.server.before()
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(self.server.announced or len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers), None))
        self.send_error(500)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, **options: Any) -> Any:
    return complete("the quick brown fox", **{"api_key": KEY, "api_base": server.base, "timeout": 20.0, **options})


def refusal(server: Server, **options: Any) -> KernelForgeError:
    with pytest.raises(KernelForgeError) as caught:
        ask(server, **options)
    assert KEY not in f"{caught.value} {caught.value.hint}"
    assert type(caught.value) is KernelForgeError
    assert caught.value.exit_code == 1
    return caught.value


def test_an_answer(server: Server) -> None:
    answer = ask(server, model="gpt-oss-120b", max_tokens=20)
    assert (answer.text, answer.model, answer.completion_tokens) == ("Jumps over 你.", "gpt-oss-120b", 10)
    assert answer.tokens_per_second == pytest.approx(10 / 0.005)
    assert 0 < answer.seconds < 20
    [(path, headers, request)] = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert "urllib" not in headers["User-Agent"]
    assert request == {
        "model": "gpt-oss-120b",
        "messages": [{"role": "user", "content": "the quick brown fox"}],
        "max_completion_tokens": 20,
    }


def test_a_base_with_a_slash_and_a_key_with_a_newline(server: Server) -> None:
    ask(server, api_base=server.base + "/", api_key=KEY + "\n")
    assert server.asked[0][0] == "/v1/chat/completions"
    assert server.asked[0][1]["Authorization"] == f"Bearer {KEY}"


def test_a_server_that_tells_no_time_and_counts_no_tokens(server: Server) -> None:
    server.body = json.dumps({**ANSWER, "time_info": None}).encode()
    answer = ask(server)
    assert answer.tokens_per_second == pytest.approx(10 / answer.seconds)
    server.body = json.dumps({"choices": ANSWER["choices"], "usage": {"completion_tokens": "many"}}).encode()
    answer = ask(server, model="mine")
    assert (answer.model, answer.completion_tokens, answer.tokens_per_second) == ("mine", None, None)


def test_an_answer_that_is_all_reasoning(server: Server) -> None:
    server.body = json.dumps({"choices": [{"finish_reason": "length", "message": {"content": None}}]}).encode()
    with pytest.warns(KernelForgeWarning, match="spent all its tokens on reasoning"):
        assert ask(server).text == ""


@pytest.mark.parametrize("key", [None, "", "  \n"])
def test_no_key(server: Server, key: str | None) -> None:
    with pytest.raises(AssetError, match="there is no API key") as caught:
        ask(server, api_key=key)
    assert caught.value.exit_code == 13
    assert "CEREBRAS_API_KEY" in str(caught.value.hint)
    assert server.asked == []


def test_the_key_of_an_environment() -> None:
    assert require_key({"CEREBRAS_API_KEY": f" {KEY}\n"}) == KEY
    with pytest.raises(AssetError, match="there is no API key"):
        require_key({})


@pytest.mark.parametrize("key", ["csk-a\r\nX-Other: b", "csk-ключ", "csk a"])
def test_a_key_that_is_none(server: Server, key: str) -> None:
    with pytest.raises(AssetError, match="the API key has characters that no key has") as caught:
        ask(server, api_key=key)
    assert key not in f"{caught.value} {caught.value.hint}"
    assert server.asked == []


@pytest.mark.parametrize(
    "base",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/v1",
        "127.0.0.1/v1",
        "",
        "http://",
        "https://[::1/v1",
        "http://a:b/",
        "http://a b/",
    ],
)
def test_an_address_that_is_not_http(server: Server, base: str) -> None:
    with pytest.raises(UsageError, match="the address must begin with https:// or http://"):
        ask(server, api_base=base)


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "check the key"),
        (403, "check the key"),
        (404, "check the model's name"),
        (429, "wait a while"),
        (500, "None"),
        (503, "None"),
    ],
)
def test_a_refusal(server: Server, status: int, hint: str) -> None:
    server.status = status
    server.body = json.dumps({"error": {"message": f"Wrong\nkey {KEY}", "code": "x"}}).encode()
    error = refusal(server)
    assert str(error) == f"{server.base}/chat/completions answered {status}: Wrong key ***"
    assert str(error.hint).startswith(hint)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", ""),
        (b"<html>busy</html>", ": <html>busy</html>"),
        (b'{"message": "no such model", "type": "not_found_error"}', ": no such model"),
        (b'{"error": "gone"}', ": gone"),
        (b"[1]", ": [1]"),
        (b"\xff" * 1000, ": " + "\ufffd" * 300),
    ],
)
def test_what_refusals_say(server: Server, body: bytes, reason: str) -> None:
    server.status, server.body = 404, body
    assert str(refusal(server)) == f"{server.base}/chat/completions answered 404{reason}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"hello", "answered with something that is not JSON: b'hello'"),
        (b"", "something that is not JSON"),
        (b"[" * 100_000, "something that is not JSON"),
        (b"[]", "JSON that holds no answer"),
        (b"3", "JSON that holds no answer"),
        (b"{}", "JSON that holds no answer"),
        (b'{"choices": []}', "JSON that holds no answer"),
        (b'{"choices": [{"message": null}]}', "JSON that holds no answer"),
        (b'{"choices": [{"message": {"content": 3}}]}', "a content that is not text"),
    ],
)
def test_a_bad_answer(server: Server, body: bytes, message: str) -> None:
    server.body = body
    assert message in str(refusal(server))


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.status, server.headers, server.body = 302, {"Location": f"{server.base}/elsewhere"}, b""
    assert "answered 302" in str(refusal(server))
    assert len(server.asked) == 1


def test_a_server_that_is_silent(server: Server) -> None:
    done = threading.Event()
    server.before = lambda: done.wait(20)
    start = time.monotonic()
    error = refusal(server, timeout=0.2)
    done.set()
    assert str(error).endswith("did not answer within 0.2 seconds")
    assert time.monotonic() - start < 20


def test_a_server_that_breaks_off(server: Server) -> None:
    server.announced = len(server.body)
    server.body = server.body[:100]
    assert "something that is not JSON" in str(refusal(server))


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        base = server.base
    with pytest.raises(KernelForgeError, match="cannot be reached") as caught:
        complete("x", api_key=KEY, api_base=base, timeout=5)
    assert caught.value.hint == "check the address and the connection"
    with pytest.raises(UsageError, match="must begin with https:// or http:// and name a host"):
        complete("x", api_key=KEY, api_base="http://127.0.0.1:port/v1")
