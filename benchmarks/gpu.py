"""Time a GPU: `python benchmarks/gpu.py [--quick] [--out reports/gpu.json]`, or `make bench-gpu`.

The roofline, products of the shapes of large models, then prefill and decode of a model of 1B parameters, each a `kernelforge`
command in a process of its own. Times of products are the GPU's own where it has timestamps: each says its `timing_source`.
Where KERNELFORGE_PEER_PYTHON names a Python whose torch sees a CUDA device, products are measured beside cuBLAS, and the model
beside transformers on that device, eager and compiled. Ends with 1 when something failed; the report says what.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from kernelforge.bench.process import PEER_PYTHON
from kernelforge.home import write_atomic
from kernelforge_llm.shapes import NAMED_SHAPES

ROOT = Path(__file__).parent.parent
LIMIT_S, PEER_LIMIT_S = 900, 150
HAS_CUDA = "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'"

PARTS = ("prefill", "decode_eager", "decode_compiled")
"""Of what transformers does."""

Found = dict[str, Any]


class Work(NamedTuple):
    """What is timed."""

    matrices: tuple[tuple[int, int, int], ...]
    """m, n, k of matrix times matrix."""
    vectors: tuple[tuple[int, int], ...]
    """n, k of vector times matrix."""
    copies: int
    """Such products in a row: the ends of a compute pass hardly count, and no cache holds all their weights."""
    model: str
    prompt: int
    more: tuple[str, ...] = ()
    """Arguments of all commands but doctor."""


FULL = Work(((4096, 4096, 4096), (512, 2048, 8192)), ((14336, 4096), (4096, 14336)), 16, "llama-1b", 512)
QUICK = Work(((64, 64, 64),), ((64, 96),), 3, "tinypy", 16, ("--repeat", "1"))
WEIGHTS = ("f16", "q8", "q4")
BY_F32, BY_Q8 = ("--activations", "f32"), ("--activations", "q8")
VECTORS = (("f32",), ("f16",), *((dtype, *by) for dtype in ("q8", "q4") for by in (BY_F32, BY_Q8)))
"""Weights that vectors are multiplied by, and quantised ones by what."""


def ask(*words: str) -> Found:
    """What a command says, or why it failed."""
    command = [sys.executable, "-m", "kernelforge", "--json", "--target", "gpu", *words]
    say(" ".join(words))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        said: Found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        said = {"ok": False, "errors": [{"message": f"it took more than {LIMIT_S} s"}]}
    except json.JSONDecodeError:
        said = {"ok": False, "errors": [{"message": f"it ended with {done.returncode}: {done.stderr[-2000:]}"}]}
    if not said["ok"]:
        say(f"   failed: {said['errors'][0]['message']}")
    return {"asked": " ".join(words), **said}


def run_peer(*arguments: str) -> str:
    """What a Python of the peers' environment prints. Raises RuntimeError with the last line of its complaint."""
    python = os.environ.get(PEER_PYTHON)
    if not python:
        raise RuntimeError(f"{PEER_PYTHON} is not set")
    try:
        done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=PEER_LIMIT_S, check=False)
    except OSError as error:
        raise RuntimeError(str(error)) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {PEER_LIMIT_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1])
    return done.stdout


def transformers(work: Work) -> Found:
    """What benchmarks/transformers_decoder.py finds; each part in a process of its own, with `error` where it fails."""
    found: Found = {}
    for part in PARTS:
        say(f"transformers: {work.model} {part}")
        # Decoding starts with one token in the cache, as that of llm-bench does.
        prompt = work.prompt if part == "prefill" else 1
        setup = json.dumps({"config": NAMED_SHAPES[work.model], "prompt": prompt, "parts": [part]})
        try:
            found |= json.loads(run_peer(str(ROOT / "benchmarks" / "transformers_decoder.py"), setup))
        except (RuntimeError, json.JSONDecodeError) as error:
            say(f"   failed: {error}")
            found[part] = {"error": str(error)}
    return found


def measure(work: Work) -> Found:
    try:
        run_peer("-c", HAS_CUDA)
        missing = ""
    except RuntimeError as error:
        missing = str(error)
        say(f"not measured beside cuBLAS and transformers: {missing}")
    beside = () if missing else ("--peer", "torch-cuda")
    doctor = ask("doctor", "--measure")
    products = [
        ask("benchmark-matmul", "--m", str(m), "--shape", f"{n}x{k}", "--dtype", dtype, *beside, *work.more)
        for m, n, k in work.matrices
        for dtype in ("f32", "f16")
    ]
    row = ("--copies", str(work.copies))
    products += [
        ask("benchmark-matmul", "--m", "1", "--shape", f"{n}x{k}", "--dtype", *what, *row, *beside, *work.more)
        for n, k in work.vectors
        for what in VECTORS
    ]
    shape = ("--random", work.model, "--prompt-tokens", str(work.prompt), "--explain", *work.more)
    decoders = [ask("llm-bench", *shape, "--weights", weights) for weights in WEIGHTS]
    theirs = {} if missing else transformers(work)
    found = {"doctor": doctor, "products": products, "decoders": decoders, "transformers": theirs}
    return {**found, "missing": missing or None, "summary": summary(found)}


def summary(found: Found) -> list[Found]:
    """One row for each figure that has a goal: work, ours, unit, peer, ratio (our speed over the peer's), timing_source."""
    rows = []
    for r in (said["data"] for said in found["products"] if said["ok"]):
        unit = "GB/s" if r["m"] == 1 else "GFLOP/s"
        speed = "gbytes_s" if r["m"] == 1 else "gflops"
        by = "" if r["activations"] == "f32" else f" by {r['activations']}"
        row = {"work": f"{r['dtype']}{by} {r['m']}x{r['n']}x{r['k']}", "ours": r[speed], "unit": unit}
        peer, ratio = None, None
        for name, p in r["peers"].items():
            peer, ratio = f"{name} {p['computes']} {p['latency_ms']:.4g} ms, ours {r['latency_ms']:.4g} ms", p["ratio"]
        rows.append({**row, "peer": peer, "ratio": ratio, "timing_source": r["timing_source"]})
        if each := r.get("in_sequence"):
            work = f"{row['work']}, {each['copies']} in a row"
            timing = {"peer": None, "ratio": None, "timing_source": each["timing_source"]}
            rows.append({"work": work, "ours": each[speed], "unit": unit, **timing})
    theirs = found["transformers"]
    for r in (said["data"] for said in found["decoders"] if said["ok"]):
        for work, names in (("prefill", ("prefill",)), ("decode", ("decode_eager", "decode_compiled"))):
            ours = r[f"{work}_tok_s"]["median"]
            row = {"work": f"{r['weights']} {work}", "ours": ours, "unit": "tokens/s"}
            speeds = {name: theirs[name]["tok_s"] for name in names if "tok_s" in theirs.get(name, {})}
            for name, speed in speeds.items():
                peer, ratio = f"transformers f16 {name} {speed:.4g}", float(f"{ours / speed:.4g}")
                rows.append({**row, "peer": peer, "ratio": ratio, "timing_source": "host-clock"})
            if not speeds:
                rows.append({**row, "peer": None, "ratio": None, "timing_source": "host-clock"})
        step = r["decode_step"]
        row = {"work": f"{r['weights']} decode step, wall over device", "ours": step["wall_over_device"], "unit": ""}
        rows.append({**row, "peer": None, "ratio": None, "timing_source": step["timing_source"]})
    return rows


def table(rows: list[Found]) -> str:
    lines = [("work", "ours", "peer", "ratio", "timing_source")]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        ours = f"{row['ours']:.4g} {row['unit']}".strip()
        lines.append((row["work"], ours, row["peer"] or "", ratio, row["timing_source"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "gpu.json", help="the report")
    options = parser.parse_args()
    found = measure(QUICK if options.quick else FULL)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{table(found['summary'])}\n{options.out}\n")
    said = (found["doctor"], *found["products"], *found["decoders"])
    failed = any(not each["ok"] for each in said) or any(
        "error" in found["transformers"].get(part, {}) for part in PARTS
    )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
