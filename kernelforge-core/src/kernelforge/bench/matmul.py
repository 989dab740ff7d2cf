"""The matrix product beside its peers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from kernelforge.bench.harness import gigas, prepare
from kernelforge.bench.latency import Latency
from kernelforge.bench.peers import HOST, open_peer
from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, WEIGHT_FORMATS
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.problem import Problem, TensorType
from kernelforge.tune.measure import Subject, measure_in_turn
from kernelforge.variant import INT8_ACTIVATIONS

if TYPE_CHECKING:
    from kernelforge.bench.peers import Peer
    from kernelforge.registry import Registry
    from kernelforge.session import Session
    from kernelforge.variant import DeviceInfo

MATMUL = "transformer.matmul"

ACTIVATIONS = ("auto", "f32", "q8")
"""What quantised weights may be multiplied by."""

_TURN_S = 0.1
_PAUSE_S = 0.1
"""Thread pools spin for a while after their last run (OpenBLAS: about 30 ms) and would slow down who comes next."""
_WARM_S = 0.02
"""What a core needs after a pause to be as fast as it gets."""


def matmul_problem(
    registry: Registry,
    m: int,
    n: int,
    k: int,
    dtype: str = "f32",
    *,
    constant: bool = True,
    activations: str = "auto",
    device: DeviceInfo | None = None,
) -> Problem:
    """f32[m,k] @ dtype[k,n], the right operand a weight if `constant`. One of "q8" or "q4" is [n,k] and transposed, for its
    groups lie along k, and always a weight; the left one is in 8 bits for `activations` = "q8", or "auto" where `device` is
    fastest so.

    Raises UsageError for sizes below 1, a k that is no multiple of a group, or a type that is neither.
    """
    if activations not in ACTIVATIONS:
        raise UsageError(f"unknown format of activations '{activations}'", hint=f"one of: {', '.join(ACTIVATIONS)}")
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size < 1:
            raise UsageError(f"--{name} must be at least 1, got {size}")
    op = registry.ops[MATMUL]
    if dtype in WEIGHT_FORMATS:
        if k % GROUP:
            raise UsageError(f"--k must be a multiple of {GROUP} for {dtype} weights, got {k}")
        if not constant:
            raise UsageError(f"{dtype} weights are constants", hint="leave --no-constant out")
        if activations == "auto":
            activations = "q8" if device is not None and INT8_ACTIVATIONS in device.features else "f32"
        lhs = TensorType((m, k), ACTIVATION_FORMAT if activations == "q8" else "f32")
        return op.problem((lhs, TensorType((n, k), dtype, constant=True)), {"transpose_rhs": True})
    if dtype not in FLOATS:
        raise UsageError(f"matmul has no dtype '{dtype}'", hint=f"one of: {', '.join((*FLOATS, *WEIGHT_FORMATS))}")
    lhs = TensorType((m, k), "f64" if dtype == "f64" else "f32")
    return op.problem((lhs, TensorType((k, n), dtype, constant=constant)), {})


def benchmark_matmul(
    session: Session,
    problems: Sequence[Problem],
    *,
    variant: str | None = None,
    peers: Mapping[str, Peer] | None = None,
    repeat: int = 7,
    copies: int = 1,
) -> list[dict[str, Any]]:
    """Verify, then time ours and each peer in turn for `repeat` rounds of about 0.1 s; from 2 `copies` on, also as many of
    ours in sequence.

    The problems differ in the type of the weights alone; peers multiply those of the first, f32 in place of quantised ones.
    Returns for each the report of `Prepared`, m, n, k, dtype, activations (a dtype), threads, and `peers` by name: latency_ms,
    gflops, ratio (our speed over the peer's), version, device, computes (a dtype). Peers on the processor of a target that is
    none are named in a warning. Raises WrongResultError before anything is timed; UsageError and AssetError for peers that fail.
    """
    m, k = problems[0].operand(0).static_shape()
    n = problems[0].results[0].static_shape()[1]
    opened = peers or {}
    first = problems[0].operand(1)
    computes = {name: peer.load(m, n, k, "f32" if first.quantised else first.dtype) for name, peer in opened.items()}
    ours = [prepare(session, problem, variant=variant, copies=copies) for problem in problems]
    theirs = {name: Subject(peer.run) for name, peer in opened.items()}
    subjects = [*(subject for own in ours for subject in own.subjects), *theirs.values()]
    pause = _PAUSE_S if theirs else 0.0
    measure_in_turn(subjects, seconds=_TURN_S * repeat, rounds=repeat, pause=pause, warm=_WARM_S)
    on_host = [name for name, peer in opened.items() if peer.device == HOST]
    if on_host and ours[0].subject.source != "host-clock":
        what = f"{' and '.join(on_host)}: measured on the processor, not on {session.device.info.name}"
        warnings.warn(KernelForgeWarning(f"{what}; --peer torch-cuda is a peer on a CUDA device"), stacklevel=2)
    reports = []
    for problem, own in zip(problems, ours, strict=True):
        report = own.report() | {"m": m, "n": n, "k": k, "dtype": problem.operand(1).dtype}
        report["activations"] = problem.operand(0).dtype
        report["threads"] = session.device.info.threads
        report["peers"] = {
            name: {
                "latency_ms": Latency.of(subject.samples).milliseconds()["median"],
                "latency": Latency.of(subject.samples).milliseconds(),
                "gflops": gigas(own.cost.flops, subject.median),
                "ratio": float(f"{subject.median / own.subject.median:.4g}"),
                "version": opened[name].version,
                "device": opened[name].device,
                "computes": computes[name],
            }
            for name, subject in theirs.items()
        }
        reports.append(report)
    return reports


@contextmanager
def open_peers(names: Sequence[str], threads: int) -> Iterator[dict[str, Peer]]:
    """Peers by name, closed at the end. Raises UsageError for an unknown one, AssetError when one cannot be had."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(open_peer(name, threads))) for name in names}


def summary(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each type of weights: `best_peer`, our speed over the quicker peer's (geometric mean and least); `first_dtype`, over
    our own speed with the first type. Types and comparisons that are not there are left out."""
    found: dict[str, dict[str, float]] = {}
    first = {(r["m"], r["n"], r["k"]): r["latency_ms"] for r in reversed(reports)}
    for dtype in dict.fromkeys(r["dtype"] for r in reports):
        own = [r for r in reports if r["dtype"] == dtype]
        against = {"best_peer": [min(p["ratio"] for p in r["peers"].values()) for r in own if r["peers"]]}
        if dtype != reports[0]["dtype"]:
            against["first_dtype"] = [first[r["m"], r["n"], r["k"]] / r["latency_ms"] for r in own]
        found[dtype] = {
            f"{name}_{kind}": float(f"{value:.4g}")
            for name, ratios in against.items()
            if ratios
            for kind, value in (("geomean", geometric_mean(ratios)), ("min", min(ratios)))
        }
    return found
