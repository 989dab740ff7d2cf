"""Other decoders, timed beside ours: the same checkpoint, tokens and threads, in turn, in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernelforge.bench.process import PeerProcess
from kernelforge.errors import UsageError

if TYPE_CHECKING:
    from kernelforge_llm.source import Source

PEERS = ("transformers",)

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
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=dtype).eval()
except Exception as error:
    reply(error=f"{type(error).__name__}: {error}")
    sys.exit()

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
    reply(**measure(question["prompt"], question["steps"]))
"""


class DecoderPeer:
    """transformers, in a process of the environment that KERNELFORGE_PEER_PYTHON names."""

    def __init__(self, name: str, source: Source, weights: str, threads: int) -> None:
        """Raises UsageError for an unknown peer or a model that is not in a folder, AssetError when it cannot be had."""
        if name not in PEERS:
            raise UsageError(f"unknown peer '{name}'", hint=f"one of: {', '.join(PEERS)}")
        if source.folder is None:
            raise UsageError(
                f"the peer '{name}' reads a checkpoint's folder, {source.name} has none", hint="use --model"
            )
        setup = {"folder": str(source.folder), "weights": weights, "threads": threads}
        self._process = PeerProcess(name, _TRANSFORMERS, setup, threads)
        self.version = str(self._process.greeting["version"])

    def measure(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Seconds of a prefill and of `steps` greedy steps after it (`prefill_s`, `decode_s`), and the tokens chosen."""
        return self._process.ask({"prompt": prompt, "steps": steps})

    def close(self) -> None:
        self._process.close()
