"""Time transformers' own decoder: `python benchmarks/transformers_decoder.py '{"config": {...}, "device": "cuda"}'`.

Run by the Python of an environment with torch and transformers, not by ours. Its JSON: a `LlamaForCausalLM` with random
weights in f16, batch 1: tokens a second of the prefill of a prompt, or of greedy decoding behind it, as it is (`eager`) and
compiled with CUDA graphs over a static cache (`compiled`), each the median of rounds. `parts` are those wanted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

PREFILLS, STEPS, ROUNDS, WARM = 7, 64, 5, 4
"""Prefills; decode steps of a round, and rounds; steps before that do not count, the first of which compile."""


class Decoder:
    def __init__(self, config: dict[str, Any], prompt: int, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        known = transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "dtype"})
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(known).half().eval()
        self.prompt = torch.randint(0, known.vocab_size, (1, prompt), device=device)
        self.length, self.device = prompt, device

    def prefill(self) -> float:
        """Tokens a second."""
        rounds = [self._seconds(lambda: self._prefilled(None)) for _ in range(1 + PREFILLS)]
        return self.length / statistics.median(rounds[1:])

    def decode(self, *, compiled: bool) -> float:
        """Tokens a second behind the prompt: each is the argmax of the logits before it, and stays on the device."""
        cache: Any = None
        if compiled:
            last = self.length + WARM + STEPS * ROUNDS
            cache = transformers.StaticCache(config=self.model.config, max_cache_len=last)
        out = self._prefilled(cache)
        cache = out.past_key_values
        token = out.logits.argmax(-1)
        position = torch.full((1, 1), self.length, device=self.device)

        def one(token: Any, position: Any) -> Any:
            out = self.model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
            return out.logits.argmax(-1)

        step = torch.compile(one, mode="reduce-overhead") if compiled else one

        def steps(count: int) -> None:
            nonlocal token, position
            for _ in range(count):
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                token = step(token, position).clone()  # the next replay overwrites its outputs
                position = position + 1

        steps(WARM)
        return STEPS / statistics.median([self._seconds(lambda: steps(STEPS)) for _ in range(ROUNDS)])

    def _prefilled(self, cache: Any) -> Any:
        return self.model(input_ids=self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _seconds(self, call: Callable[[], object]) -> float:
        """Until the device has done it."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    setup = json.loads(sys.argv[1])
    device = setup.get("device", "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(0) if device == "cuda" else device,
        "dtype": "f16",
    }
    with torch.no_grad():
        decoder = Decoder(setup["config"], setup["prompt"], device)
        parts: dict[str, Callable[[], float]] = {
            "prefill": decoder.prefill,
            "decode_eager": lambda: decoder.decode(compiled=False),
            "decode_compiled": lambda: decoder.decode(compiled=True),
        }
        for part in setup.get("parts", parts):
            found[part] = {"tok_s": float(f"{parts[part]():.4g}")}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
