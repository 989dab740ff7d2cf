"""Time a GPU: `python benchmarks/gpu.py [--peer torch-cuda] [--out reports/gpu.json]`, or `make bench-gpu`.

Products of the shapes of large models, then prefill and decode of a model of 1B parameters, each a `kernelforge` command in a
process of its own. Times of products are the GPU's own where it has timestamps: each says its `timing_source`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kernelforge.home import write_atomic

ROOT = Path(__file__).parent.parent
PRODUCTS = ((4096, 4096, 4096), (512, 2048, 8192), (1, 14336, 4096), (1, 4096, 14336))
"""m, n, k."""
DTYPES = ("f32", "f16")
WEIGHTS = ("f16", "q8", "q4")
LIMIT_S = 900


def ask(*words: str) -> dict[str, Any]:
    """What a command says, or why it failed."""
    command = [sys.executable, "-m", "kernelforge", "--json", "--target", "gpu", *words]
    sys.stderr.write(" ".join(words) + "\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return {"command": words, "ok": False, "errors": [done.stderr[-2000:]]}
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], help="numpy, torch or torch-cuda; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "gpu.json", help="the report")
    options = parser.parse_args()
    peers = [word for name in options.peer for word in ("--peer", name)]
    found = []
    for m, n, k in PRODUCTS:
        for dtype in DTYPES:
            sizes = ("--m", str(m), "--n", str(n), "--k", str(k), "--dtype", dtype)
            found.append(ask("benchmark-matmul", *sizes, *peers))
    shape = ("--random", "llama-1b", "--prompt-tokens", "512", "--explain")
    found += [ask("llm-bench", *shape, "--weights", weights) for weights in WEIGHTS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{options.out}\n")


if __name__ == "__main__":
    main()
