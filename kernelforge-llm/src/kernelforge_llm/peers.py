"""Other decoders, timed beside ours: the same weights, tokens and threads, in turn, in the same run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernelforge import home
from kernelforge.bench.process import PeerProcess
from kernelforge.errors import AssetError, UsageError
from kernelforge_llm.gguf import is_gguf
from kernelforge_llm.gguf.writer import write_gguf
from kernelforge_llm.shapes import RandomCheckpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kernelforge_llm.config import ModelConfig
    from kernelforge_llm.source import Source

_TRANSFORMERS = """
import json, sys, time

def reply(**values):
    print(json.dumps(values), flush=True)

try:
    import torch, transformers
    setup = json.loads(sys.argv[1])
    torch.set_num_threads(setup["threads"])
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    dtype = dtypes.get(setup["weights"], "auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["path"], dtype=dtype).eval()
except Exception as error:
    reply(error=f"{type(error).__name__}: {error}")
    sys.exit()

@torch.no_grad()
def logits(prompt):
    out = model(input_ids=torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
    return dict(logits=out.logits[0, -1].float().tolist())

@torch.no_grad()
def measure(prompt, steps):
    ids = torch.tensor([prompt])
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefill = time.perf_counter() - start
    tokens = [int(token)]
    start = time.perf_counter()
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
    return dict(prefill_s=prefill, decode_s=time.perf_counter() - start, tokens=tokens)

reply(version=f"{transformers.__version__}, torch {torch.__version__}")
for line in sys.stdin:
    question = json.loads(line)
    reply(**{"logits": logits, "measure": measure}[question.pop("ask")](**question))
"""

_LLAMA_CPP = """
import ctypes, json, sys, time

def reply(**values):
    print(json.dumps(values), flush=True)

setup = json.loads(sys.argv[1])
try:
    import llama_cpp as L, numpy as np
    silent = L.llama_log_callback(lambda level, text, data: None)
    L.llama_log_set(silent, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(setup["path"].encode(), L.llama_model_default_params())
    if not model:
        raise RuntimeError("it does not load " + setup["path"])
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch = setup["depth"] + setup["room"], 512
    params.n_threads = params.n_threads_batch = setup["threads"]
    context = L.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("it makes no context of %d tokens" % params.n_ctx)
    memory = L.llama_get_memory(context)
    vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
except Exception as error:
    reply(error=f"{type(error).__name__}: {error}")
    sys.exit()

def feed(tokens):
    for start in range(0, len(tokens), 512):
        part = tokens[start : start + 512]
        array = (L.llama_token * len(part))(*part)  # the batch only points at it
        if L.llama_decode(context, L.llama_batch_get_one(array, len(part))):
            raise RuntimeError("llama_decode failed")
    return np.ctypeslib.as_array(L.llama_get_logits(context), (vocabulary,))  # waits for the result

def rewind():
    L.llama_memory_seq_rm(memory, 0, setup["depth"], -1)

def logits(prompt):
    found = feed(prompt).tolist()
    rewind()
    return dict(logits=found)

def measure(prompt, steps):
    start = time.perf_counter()
    token = int(feed(prompt).argmax())
    prefill = time.perf_counter() - start
    rewind()
    tokens = [token]
    start = time.perf_counter()
    for _ in range(steps):
        token = int(feed([token]).argmax())
        tokens.append(token)
    decode = time.perf_counter() - start
    rewind()
    return dict(prefill_s=prefill, decode_s=decode, tokens=tokens)

if setup["depth"]:
    feed(setup["before"])
reply(version=L.__version__, build=L.llama_print_system_info().decode().strip())
for line in sys.stdin:
    question = json.loads(line)
    reply(**{"logits": logits, "measure": measure}[question.pop("ask")](**question))
"""

_SCRIPTS = {"transformers": _TRANSFORMERS, "llama.cpp": _LLAMA_CPP}
PEERS = tuple(_SCRIPTS)


class DecoderPeer:
    """A decoder in a process of the environment that KERNELFORGE_PEER_PYTHON names."""

    def __init__(
        self, name: str, path: Path, weights: str, threads: int, *, room: int = 1024, before: Sequence[int] = ()
    ) -> None:
        """`path` is what it reads: see `readable`. Every measurement starts behind the tokens `before` and appends up to `room`.

        Raises UsageError when no environment is named, AssetError when the peer cannot be had.
        """
        self.name = name
        setup = {"path": str(path), "weights": weights, "threads": threads, "room": room}
        self._process = PeerProcess(
            name, _SCRIPTS[name], setup | {"depth": len(before), "before": list(before)}, threads
        )
        self.version = str(self._process.greeting["version"])
        self.build = str(self._process.greeting.get("build", ""))
        """What it says of how it was built: instruction sets, for instance."""

    def logits(self, prompt: Sequence[int]) -> NDArray[np.float64]:
        """The scores [vocab] after a prompt."""
        import numpy as np

        return np.array(self._process.ask({"ask": "logits", "prompt": list(prompt)})["logits"])

    def measure(self, prompt: Sequence[int], steps: int) -> dict[str, Any]:
        """Seconds of a prefill and of `steps` greedy steps (`prefill_s`, `decode_s`), and the tokens chosen."""
        return self._process.ask({"ask": "measure", "prompt": list(prompt), "steps": steps})

    def close(self) -> None:
        self._process.close()


def check_peers(names: Sequence[str], depth: int) -> None:
    """Raises UsageError for an unknown peer, or one that cannot start with tokens in its cache."""
    for name in names:
        if name not in PEERS:
            raise UsageError(f"unknown peer '{name}'", hint=f"one of: {', '.join(PEERS)}")
        if depth and name == "transformers":
            raise UsageError("the peer 'transformers' is measured from an empty cache", hint="leave --depth out")


@contextmanager
def readable(
    name: str, source: Source, config: ModelConfig, weights: str, say: Callable[[str], None]
) -> Iterator[Path]:
    """What a peer reads: the checkpoint's folder for transformers, a GGUF file with our weights for llama.cpp.

    A model that is one is read itself. One that is written of random weights is kept in the cache, any other is deleted at the
    end; `say` is told of both. Raises UsageError for a model that the peer cannot have, AssetError when the file cannot be
    written.
    """
    if name == "transformers":
        if source.folder is None:
            raise UsageError(
                f"the peer '{name}' reads a checkpoint's folder, {source.name} has none", hint="use --model"
            )
        yield source.folder
        return
    if source.path is not None and is_gguf(source.path) and weights == "native":
        yield source.path
        return
    if isinstance(source.tensors, RandomCheckpoint):
        parts = (json.dumps(dict(source.config), sort_keys=True), source.tensors.seed, weights)
        key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]
        path = home.cache_dir() / "gguf" / f"{source.name.replace(' ', '-')}-{weights}-{key}.gguf"
        if not path.exists():
            _write(source, config, path, weights, say)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kernelforge-") as folder:
        path = Path(folder) / f"{weights}.gguf"
        _write(source, config, path, weights, say)
        yield path


def _write(source: Source, config: ModelConfig, path: Path, weights: str, say: Callable[[str], None]) -> None:
    draft = path.with_suffix(f".{os.getpid()}")
    say(f"writing {source.name} in {weights} as {path} for the peer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(source, config, draft, weights)
        draft.replace(path)
    except OSError as error:
        raise AssetError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
