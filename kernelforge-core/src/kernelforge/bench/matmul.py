"""The matrix product beside its peers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from kernelforge.bench.harness import gigas, prepare
from kernelforge.bench.latency import Latency
from kernelforge.bench.peers import open_peer
from kernelforge.dtype import FLOATS
from kernelforge.errors import UsageError
from kernelforge.problem import Problem, TensorType
from kernelforge.tune.measure import Subject, measure_in_turn

if TYPE_CHECKING:
    from kernelforge.registry import Registry
    from kernelforge.session import Session

MATMUL = "transformer.matmul"

_TURN_S = 0.1
_PAUSE_S = 0.05
"""Thread pools spin for a while after their last run (OpenBLAS: about 30 ms) and would slow down who comes next."""


def matmul_problem(registry: Registry, m: int, n: int, k: int, dtype: str = "f32", *, constant: bool = True) -> Problem:
    """f32[m,k] @ dtype[k,n], the right operand a weight if `constant`. Raises UsageError for sizes below 1 or a type
    that is no float."""
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size < 1:
            raise UsageError(f"--{name} must be at least 1, got {size}")
    if dtype not in FLOATS:
        raise UsageError(f"matmul has no dtype '{dtype}'", hint=f"one of: {', '.join(FLOATS)}")
    activations = "f64" if dtype == "f64" else "f32"
    lhs, rhs = TensorType((m, k), activations), TensorType((k, n), dtype, constant=constant)
    return registry.ops[MATMUL].problem((lhs, rhs), {})


def benchmark_matmul(
    session: Session, problem: Problem, *, variant: str | None = None, peers: Sequence[str] = (), repeat: int = 7
) -> dict[str, Any]:
    """Verify, then time ours and each peer in turn for `repeat` rounds of about 0.1 s.

    The report of `Prepared`, and `peers` by name: latency_ms, gflops, ratio (our speed over the peer's), version,
    computes. Raises WrongResultError before anything is timed; UsageError and AssetError for peers that cannot be
    had.
    """
    m, k = problem.operand(0).static_shape()
    n, dtype = problem.operand(1).static_shape()[1], problem.operand(1).dtype
    threads = session.device.info.threads
    with ExitStack() as stack:
        opened = {name: stack.enter_context(closing(open_peer(name, m, n, k, dtype, threads))) for name in peers}
        ours = prepare(session, problem, variant=variant)
        theirs = {name: Subject(peer.run) for name, peer in opened.items()}
        pause = _PAUSE_S if theirs else 0.0
        measure_in_turn([ours.subject, *theirs.values()], seconds=_TURN_S * repeat, rounds=repeat, pause=pause)
        report = ours.report()
        report["threads"] = threads
        report["peers"] = {
            name: {
                "latency_ms": Latency.of(subject.samples).milliseconds()["median"],
                "latency": Latency.of(subject.samples).milliseconds(),
                "gflops": gigas(ours.cost.flops, subject.median),
                "ratio": float(f"{subject.median / ours.subject.median:.4g}"),
                "version": opened[name].version,
                "computes": opened[name].computes,
            }
            for name, subject in theirs.items()
        }
    return report
