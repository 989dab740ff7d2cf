"""Generating text from the command line: in processes of their own, and for errors through the same `main`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kernelforge.cli.app import main
from kernelforge_llm import sampling
from kernelforge_llm.source import TINYPY

ORACLE = Path(__file__).parents[1] / "kernelforge-llm" / "tests" / "data" / "oracles" / "llama-gqa"
REFERENCE = ("--target", "reference")
FOX = "the quick brown fox"
KEY = "csk-secret-0123456789"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A state folder for all of these tests, so that kernels are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNELFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("CEREBRAS_API_KEY", raising=False)
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a small model without a tokenizer, to be broken."""
    folder = tmp_path / "model"
    shutil.copytree(ORACLE, folder)
    return folder


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "kernelforge", *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", **options)


def run(*arguments: str, code: int = 0, text: str = "", **options: Any) -> tuple[str, str]:
    """stdout and stderr of a process that must end with `code`."""
    with start(*arguments, **options) as process:
        stdout, stderr = process.communicate(text, timeout=300)
    assert process.returncode == code, stderr
    return stdout, stderr


def data_of(stdout: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(stdout)["data"]
    return found


# Text, figures and the envelope.


def test_text_on_stdout_figures_on_stderr() -> None:
    options = ("llm-inference", "--max-tokens", "20")
    stdout, stderr = run(*options, "--prompt", FOX)
    assert re.fullmatch(
        r"\[ready in \d+\.\d\d s \| 11 prompt tokens at \d+/s \| first token after \d+ ms \| 20 tokens at \d+/s"
        r" \| peak memory \d+ MB \| cpu, \d+ threads?\]\n",
        stderr,
    ), stderr
    envelope = json.loads(run("--json", *options, "--prompt", "-", text=FOX)[0])
    assert (envelope["schema"], envelope["command"], envelope["ok"]) == (1, "llm-inference", True)
    assert envelope["warnings"] == envelope["errors"] == []
    data = envelope["data"]
    assert data["text"] + "\n" == stdout
    assert len(data["ids"]) == data["generated_tokens"] == 20
    assert (data["model"], data["target"], data["prompt_tokens"]) == ("tinypy", "cpu", 11)
    for figure in ("load_s", "time_to_first_token_s", "prefill_tok_s", "decode_tok_s", "peak_anonymous_bytes"):
        assert data[figure] > 0


def test_equal_seeds_give_equal_text_and_stop_strings_end_it() -> None:
    options = ("llm-inference", "--max-tokens", "24", "--temperature", "0.9", "--top-k", "50", "--ignore-eos")
    first, _ = run(*options, "--seed", "5", "--threads", "1")
    stop = first[8:12]
    data = data_of(run("--json", *options, "--seed", "5", "--stop", stop, "--threads", "1")[0])
    assert data["threads"] == 1
    assert data["text"] == first[: first.index(stop)]
    assert data_of(run("--json", *options, "--seed", "6")[0])["text"] != first[:-1]


def test_ids_of_a_model_without_a_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = (*REFERENCE, "llm-inference", "--model", str(ORACLE), "--max-tokens", "3", "--prompt-ids", "1,15, 29")
    assert main(options) == 0
    ids = capsys.readouterr().out
    assert re.fullmatch(r"\d+,\d+,\d+\n", ids)
    exported = tmp_path / "exported"
    assert main(("llm-export", str(exported), "--model", str(ORACLE), "--weights", "bf16")) == 0
    assert re.fullmatch(r"wrote llama-gqa to .*exported \(0\.\d MB\)\n", capsys.readouterr().out)
    assert main(("--json", *options, "--model", str(exported))) == 0
    assert len(data_of(capsys.readouterr().out)["ids"]) == 3
    assert main(("llm-export", str(exported / "config.json"))) == 2
    assert "config.json is a file, not a folder" in capsys.readouterr().err


def test_prompts_from_files_and_through_a_chat_template(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "chatty"
    shutil.copytree(TINYPY, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}# {{ m.content }}\n{% endfor %}")
    (tmp_path / "prompt.txt").write_text(FOX)
    options = (*REFERENCE, "--json", "llm-inference", "--model", str(folder), "--max-tokens", "2")
    assert main((*options, "--prompt", f"# {FOX}\n")) == 0
    plain = data_of(capsys.readouterr().out)
    assert main((*options, "--prompt-file", str(tmp_path / "prompt.txt"), "--chat")) == 0
    chat = data_of(capsys.readouterr().out)
    assert chat["prompt_tokens"] == plain["prompt_tokens"] - 1, "the template writes what opens a document, if anything"
    assert main((*REFERENCE, "llm-inference", "--chat")) == 13
    assert "has no chat template" in capsys.readouterr().err


# Errors.


def test_errors_of_a_process() -> None:
    stdout, stderr = run("--target", "abacus", "llm-inference", code=2)
    assert stdout == ""
    assert re.fullmatch(r"error: unknown target 'abacus'\nhint: one of: cpu, .*reference.*\n", stderr)
    stdout, stderr = run("--json", *REFERENCE, "llm-inference", "--model", "no/such/model/folder", code=13)
    (error,) = json.loads(stdout)["errors"]
    assert (error["type"], error["exit_code"]) == ("AssetError", 13)
    assert error["message"].startswith("there is no model at no")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--model", str(ORACLE), "--prompt", FOX), 13, "'llama-gqa' has no tokenizer.json"),
        (("--model", str(ORACLE), "--prompt-ids", "1,320"), 2, "token id 320 is out of range"),
        (("--model", str(ORACLE), "--prompt-ids", "1", "--weights", "int3"), 2, "--weights"),
        (("--model", "tinypy", "--random", "tinypy"), 2, "--model and --random exclude each other"),
        (("--random", "llama-900b"), 2, "there is no shape 'llama-900b'"),
        (("--prompt-ids", "1,x"), 2, "--prompt-ids '1,x' is not a list of numbers"),
        (("--prompt-ids", "1", "--prompt", "a"), 2, "--prompt and --prompt-ids exclude each other"),
        (("--prompt", "a", "--api-model", "m"), 2, "--api-base and --api-model need --compare-with-cerebras"),
        (("--prompt-file", "nowhere.txt"), 13, "cannot read the prompt from nowhere.txt"),
        (("--prompt", "x " * 600, "--context", "64"), 2, "tokens, the context holds 64"),
        (("--context", "1025"), 2, "a context of 1025 positions is not possible: the model was made for up to 1024"),
        (("--max-tokens", "0"), 2, "--max-tokens 0 is not possible"),
        (("--temperature", "-1"), 2, "temperature must be a number from 0"),
        (("--chat", "--prompt-ids", "1"), 2, "--chat needs a text prompt"),
        (("--compare-with-cerebras",), 13, "there is no API key"),
        (("--compare-with-cerebras", "--api-base", "ftp://a/v1"), 2, "the address must begin with https:// or http://"),
        (("--compare-with-cerebras", "--api-base", ""), 2, "the address must begin with https:// or http://"),
        (("--compare-with-cerebras", "--api-timeout", "0"), 2, "--api-timeout 0 is not possible"),
        (("--compare-with-cerebras", "--prompt-ids", "1"), 2, "--compare-with-cerebras needs a text prompt"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, message: str) -> None:
    assert main((*REFERENCE, "llm-inference", *arguments)) == code
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert message in stderr


@pytest.mark.parametrize("verb", ["why", "tune --budget-s 0", "emit-mlir"])
def test_verbs_about_a_model_take_the_context_that_it_runs_with(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    arguments = (*REFERENCE, "--json", *verb.split(), "--model", str(ORACLE), "--context")
    assert main((*arguments, "48")) == 0
    data = json.dumps(json.loads(capsys.readouterr().out)["data"])
    assert ("tensor<1x48x2x16xf32>" if verb == "emit-mlir" else "f32[1,48,2,16]") in data
    assert main((*arguments, "5000")) == 2
    assert "a context of 5000 positions is not possible" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    [
        "llm-inference --prompt-ids 1",
        "llm-bench",
        "llm-eval --text config.json",
        "llm-quantize --output out",
        "llm-export out",
        "why",
        "tune",
        "emit-mlir",
    ],
)
def test_an_empty_name_is_not_the_model_that_lies_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, verb: str
) -> None:
    """As from a variable of a script that is not set."""
    monkeypatch.chdir(model)
    assert main((*REFERENCE, *verb.split(), "--model", "")) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("error: the model's name is empty\nhint: ")
    assert not (model / "out").exists()


def test_broken_checkpoints(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    config, weights = model / "config.json", model / "model.safetensors"
    whole_config, whole_weights = config.read_text(), weights.read_bytes()

    def refused() -> str:
        assert main((*REFERENCE, "llm-inference", "--model", str(model), "--prompt-ids", "1")) == 13
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        return stderr

    config.write_text("{'hidden_size': 3}")
    assert "config.json is not JSON" in refused()
    for size, shown in (("-5", "-5"), ("9" * 30, "9" * 30), ('"big"', "'big'")):
        config.write_text(re.sub(r'"hidden_size": \d+', f'"hidden_size": {size}', whole_config))
        assert re.search(rf"config.json: hidden_size must be .*, not {shown}", refused())
    config.write_text(whole_config)
    weights.write_bytes(whole_weights[:1000])
    assert "model.safetensors is cut off or no safetensors file" in refused()
    weights.write_bytes(whole_weights[:-8])
    assert re.search(r"ends at byte \d+ of a file that has \d+", refused())
    weights.unlink()
    assert "has neither model.safetensors nor" in refused()


# Interruption.


@pytest.mark.skipif(sys.platform == "win32", reason="a process on Windows cannot be sent Ctrl-C alone")
@pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_an_interruption_keeps_the_text_so_far(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int, told: str
) -> None:
    # A process that was started in the background of a shell ignores SIGINT, and so would its children.
    options = (*REFERENCE, "llm-inference", "--max-tokens", "900", "--ignore-eos", "--prompt", FOX)
    with start(*options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stdout is not None
        shown = process.stdout.read(12)
        process.send_signal(number)
        rest, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert len(shown) == 12
    assert rest.endswith("\n")
    assert stderr == told
    assert main((*REFERENCE, "llm-inference", "--max-tokens", "5", "--prompt", FOX)) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.skipif(sys.platform == "win32", reason="a process on Windows ends at once")
def test_sigterm_leaves_no_half_folder(tmp_path: Path) -> None:
    with start("llm-quantize", "--random", "smollm2-135m", "-o", str(tmp_path / "model")) as process:
        weights = tmp_path / ".model.kernelforge-draft" / "weights.kfq"
        # Not before there are numbers: what numpy.random is loaded by drops any exception that comes meanwhile.
        while not (weights.exists() and weights.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (143, "terminated\n")
    assert not list(tmp_path.iterdir())


def test_an_interruption_keeps_the_data_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiring(logits: Any, history: Any) -> int:
        if len(history) == 11 + 3:
            raise KeyboardInterrupt
        return sampling.greedy(logits)

    monkeypatch.setattr(sampling, "make_sampler", lambda _: tiring)
    assert main(("--json", *REFERENCE, "llm-inference", "--prompt", FOX)) == 130
    envelope = json.loads(capsys.readouterr().out)
    assert not envelope["ok"]
    assert (envelope["errors"][0]["type"], envelope["errors"][0]["exit_code"]) == ("KeyboardInterrupt", 130)
    assert len(envelope["data"]["ids"]) == envelope["data"]["generated_tokens"] == 3
    assert envelope["data"]["text"] != ""


# The comparison.


class Server(ThreadingHTTPServer):
    """Speaks the chat completions protocol of OpenAI: answers as it is told, remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.body = json.dumps(
            {
                "model": "big-model",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": "jumps over the lazy dog"}}],
                "usage": {"completion_tokens": 6},
                "time_info": {"completion_time": 0.003},
            }
        )
        self.silent = threading.Event()
        self.released = threading.Event()
        self.asked: list[tuple[str, str, Any]] = []

    @property
    def options(self) -> tuple[str, ...]:
        return ("--compare-with-cerebras", "--api-base", f"http://127.0.0.1:{self.server_port}/v1")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        if self.server.silent.is_set():
            self.server.released.wait(60)
            return
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("CEREBRAS_API_KEY", KEY)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def test_comparison_with_a_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = (*REFERENCE, "llm-inference", "--prompt", FOX, "--max-tokens", "3", *server.options)
    stdout, _ = run(*options, "--api-model", "some-model")
    lines = stdout.splitlines()
    assert lines[-7:-3] == ["", "--- big-model ---", "jumps over the lazy dog", ""]
    assert lines[-3].split() == ["model", "tokens", "tokens/s"]
    assert lines[-2].split()[:3] == ["here", "tinypy", "3"]
    assert lines[-1].split() == ["there", "big-model", "6", "2000"]
    path, authorization, body = server.asked[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["max_completion_tokens"]) == ("some-model", 3)
    assert body["messages"] == [{"role": "user", "content": FOX}]
    assert main(("--json", *options)) == 0
    there = data_of(capsys.readouterr().out)["cerebras"]
    assert there.pop("seconds") > 0
    assert there == {
        "model": "big-model",
        "text": "jumps over the lazy dog",
        "generated_tokens": 6,
        "decode_tok_s": 2000.0,
    }


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, '{"message": "Wrong API Key"}', "answered 401: Wrong API Key\nhint: check the key in CEREBRAS_API_KEY"),
        (429, "slow down", "answered 429: slow down\nhint: wait a while"),
        (200, "<html>", "answered with something that is not JSON: b'<html>'"),
        (200, '{"choices": []}', "answered with JSON that holds no answer"),
    ],
)
def test_bad_answers_keep_our_own(
    server: Server, capsys: pytest.CaptureFixture[str], status: int, body: str, message: str
) -> None:
    server.status, server.body = status, body
    assert main((*REFERENCE, "llm-inference", "--prompt", FOX, "--max-tokens", "2", *server.options)) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout.strip()
    assert message in stderr
    assert KEY not in stderr


def test_a_server_that_stays_silent_or_is_not_there(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--json", *REFERENCE, "llm-inference", "--prompt", FOX, "--max-tokens", "2")
    server.silent.set()
    assert main((*options, *server.options, "--api-timeout", "0.2")) == 1
    envelope = json.loads(capsys.readouterr().out)
    assert "did not answer within 0.2 seconds" in envelope["errors"][0]["message"]
    assert len(envelope["data"]["ids"]) == 2
    assert main((*options, "--compare-with-cerebras", "--api-base", "http://127.0.0.1:1/v1")) == 1
    assert "cannot be reached" in json.loads(capsys.readouterr().out)["errors"][0]["message"]


# Benchmarks and help.


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--random", "tinypy", "--prompt-tokens", "6", "--gen-tokens", "2", "--depth", "3", "--repeat", "2")
    assert main(("--json", *REFERENCE, "llm-bench", *options, "--weights", "f32")) == 0
    data = data_of(capsys.readouterr().out)
    for name in ("prefill_tok_s", "decode_tok_s", "time_to_first_token_s"):
        figure = data[name]
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    step = data["decode_step"]
    assert step["timing_source"] == "host-clock"
    assert step["wall_s"] == pytest.approx(1 / data["decode_tok_s"]["median"])
    assert step["wall_over_device"] == pytest.approx(step["wall_s"] / step["device_s"])
    assert data["peak_anonymous_bytes"] > 1e6
    expected = {"model": "random tinypy", "weights": "f32", "depth": 3, "repeat": 2, "target": "reference"}
    assert {name: data[name] for name in expected} == expected
    assert main((*REFERENCE, "llm-bench", *options)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "random tinypy, weights native, activations f32, reference, 1 thread, 3 tokens in the cache"
    assert [line[:12].strip() for line in lines[1:5]] == ["", "prefill 6, t", "decode 2, to", "first token,"]
    assert lines[5].startswith("a decode step takes ")
    assert re.fullmatch(r"peak memory \d+ MB, compiled in \d+\.\d s", lines[6])
    assert main((*REFERENCE, "llm-bench", "--depth", "1000")) == 2
    assert "a context of 1256 positions is not possible" in capsys.readouterr().err
    assert main((*REFERENCE, "llm-bench", "--repeat", "0")) == 2
    assert "--repeat 0 is not possible" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    program = """
import sys
from kernelforge.cli.app import main
for verb in ("llm-inference", "llm-bench", "llm-export"):
    assert main([verb, "--help"]) == 0
heavy = {"numpy", "torch_mlir", "llvmlite", "numba", "wgpu", "tokenizers", "safetensors", "jinja2", "rich.progress"}
print("loaded:", *sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "loaded:"
    for option in ("--compare-with-cerebras", "--prompt-tokens", "--weights"):
        assert option in done.stdout
