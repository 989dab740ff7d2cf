"""Compare KernelForge with the peers that are here: `python benchmarks/run.py [--quick] [--out reports]`, or `make bench`.

Every measurement is a `kernelforge` command in a process of its own; what each said is kept as JSON in the folder, and
`index.html` there shows it all. Peers are numpy, and torch, transformers and llama.cpp (llama-cpp-python) in the environment
whose Python interpreter KERNELFORGE_PEER_PYTHON names; one that is missing is said and left out. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page import page

from kernelforge import __version__
from kernelforge.bench.process import PEER_PYTHON
from kernelforge.home import write_atomic
from kernelforge.machine import probe

ROOT = Path(__file__).parent.parent

ROWS = (1, 4, 16, 64, 256, 512)
SHAPES = ("576x576", "1536x576", "2048x2048", "8192x2048", "2048x8192")
DTYPES = ("f32", "bf16", "f16")
IN_PEER = {"torch": "torch", "transformers": "transformers", "llama.cpp": "llama_cpp"}
"""Peers of the other environment, by what is imported there."""
STEP_S = 1200
"""A step that takes longer has hung."""

Found = dict[str, Any]


class Decoder(NamedTuple):
    """A measurement of llm-bench."""

    model: tuple[str, ...]
    weights: str
    peer: str
    depth: int = 0
    sizes: tuple[str, ...] = ("--gen-tokens", "48", "--repeat", "5")
    explain: bool = False

    @property
    def name(self) -> str:
        model = self.model[-1] if self.model else "tinypy"
        return f"{model}-{self.weights}" + (f"-{self.depth}" if self.depth else "")


SMALL, LARGE = ("--random", "smollm2-135m"), ("--random", "llama-1b")
BRIEF = ("--gen-tokens", "24", "--repeat", "3")
DECODERS = (
    Decoder((), "native", "transformers"),
    Decoder(SMALL, "q4", "llama.cpp", explain=True),
    Decoder(SMALL, "q8", "llama.cpp"),
    Decoder(SMALL, "f16", "llama.cpp"),
    Decoder(SMALL, "q4", "llama.cpp", depth=2048, explain=True),
    Decoder(LARGE, "q4", "llama.cpp", sizes=BRIEF, explain=True),
    Decoder(LARGE, "q8", "llama.cpp", sizes=BRIEF),
    Decoder(LARGE, "f16", "llama.cpp", sizes=BRIEF),
)
QUICK = ("--prompt-tokens", "8", "--gen-tokens", "4", "--repeat", "1")
QUICK_DECODERS = (
    Decoder((), "native", "transformers", sizes=QUICK),
    Decoder(("--random", "tinypy"), "q4", "llama.cpp", depth=16, sizes=QUICK, explain=True),
)


class Runs:
    """The commands of one report, and what they found."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.folder = folder
        self.failed: dict[str, str] = {}
        self._threads = () if threads is None else ("--threads", str(threads))

    def kernelforge(self, name: str, *arguments: str) -> Found | None:
        """`data` of a command's envelope, also written to NAME.json; None when it fails, which is noted."""
        start = time.monotonic()
        say(f"{name}: kernelforge {' '.join(arguments)}")
        command = [sys.executable, "-m", "kernelforge", "--json", *self._threads, *arguments]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=STEP_S, check=False)
            envelope = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            self._fail(name, f"it took more than {STEP_S} s")
            return None
        except ValueError:
            self._fail(name, f"it ended with {done.returncode} and no envelope")
            return None
        write_atomic(self.folder / f"{name}.json", json.dumps(envelope, indent=1) + "\n")
        if not envelope["ok"]:
            self._fail(name, envelope["errors"][0]["message"])
            return None
        say(f"   {time.monotonic() - start:.0f} s")
        found: Found = envelope["data"]
        return found

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        say(f"   failed: {why}")


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def find_peers() -> tuple[dict[str, str | None], dict[str, str]]:
    """Versions of the peers by name, None for those that are not here, and why they are not."""
    import numpy as np

    versions: dict[str, str | None] = {"numpy": np.__version__}
    missing: dict[str, str] = {}
    python = os.environ.get(PEER_PYTHON)
    for name, module in IN_PEER.items():
        versions[name] = None
        if not python:
            missing[name] = f"{PEER_PYTHON} is not set"
            continue
        code = f"import {module}; print({module}.__version__)"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            missing[name] = f"{python}: {error}"
            continue
        if done.returncode:
            missing[name] = (done.stderr.strip().splitlines() or [f"{python} ended with {done.returncode}"])[-1]
        else:
            versions[name] = done.stdout.split()[-1]
    return versions, missing


def measured(runs: Runs, versions: dict[str, str | None], *, quick: bool) -> Found:
    """Run everything."""

    def beside(*names: str) -> list[str]:
        return [word for name in names if versions[name] for word in ("--peer", name)]

    doctor = runs.kernelforge("doctor", "doctor", "--target", "cpu", "--measure")
    device = doctor["devices"]["cpu"][0] if doctor else None
    rows, shapes, dtypes = ((1, 3), ("64x32", "32x64"), ("f32", "f16")) if quick else (ROWS, SHAPES, DTYPES)
    sizes = [*_repeated("--m", rows), *_repeated("--shape", shapes), *_repeated("--dtype", dtypes)]
    rounds = ("--repeat", "1" if quick else "5")
    matmul = runs.kernelforge("matmul", "benchmark-matmul", *sizes, *rounds, *beside("numpy", "torch"))
    only = ("--filter", "decoder_mha", "--repeat", "1") if quick else ()
    baseline = ("--output", str(runs.folder / "cpu_baseline.json"))
    suite = runs.kernelforge("suite", "benchmark-suite", *baseline, *only)
    llm = []
    for case in QUICK_DECODERS if quick else DECODERS:
        line = ["llm-bench", *case.model, "--weights", case.weights, "--depth", str(case.depth), *case.sizes]
        found = runs.kernelforge(f"llm-{case.name}", *line, *["--explain"] * case.explain, *beside(case.peer))
        llm += [found] if found else []
    return {
        "roofline": device and device["roofline"],
        "threads": device and device["threads"],
        "matmul": matmul,
        "suite": suite,
        "llm": llm,
    }


def _repeated(option: str, values: Sequence[object]) -> list[str]:
    return [word for value in values for word in (option, str(value))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="sizes so small that it takes seconds: does it work at all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "reports", help="folder for the JSON files and index.html")
    parser.add_argument("--threads", type=int, help="threads of ours and of the peers (default: the physical cores)")
    options = parser.parse_args()
    versions, missing = find_peers()
    for name, why in missing.items():
        say(f"not measured beside {name}: {why}")
    runs = Runs(options.out, options.threads)
    report: Found = {
        "version": __version__,
        "machine": probe().cpu,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "quick": options.quick,
        "peers": versions,
        "missing": missing,
        **measured(runs, versions, quick=options.quick),
        "failed": runs.failed,
    }
    write_atomic(options.out / "report.json", json.dumps(report, indent=1) + "\n")
    write_atomic(options.out / "index.html", page(report))
    say(f"\nreport: {options.out / 'index.html'}")
    for name, why in runs.failed.items():
        say(f"failed: {name}: {why}")
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
