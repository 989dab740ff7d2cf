"""Where cases run: the plugins, and opened devices with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kernelforge.selection import NO_RECORDS
from kernelforge.session import Session
from kernelforge.testing.case import THREADS

if TYPE_CHECKING:
    import numpy as np

    from kernelforge.graph import Graph
    from kernelforge.mlir import ir
    from kernelforge.module import Module
    from kernelforge.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]


class Bench:
    """Sessions without records, so that measurements made on this machine change no result."""

    def __init__(
        self,
        registry: Registry,
        *,
        threads: int = THREADS,
        factors: Mapping[str, float] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`factors` widen the tolerance of variants, by their keys. `note` is told what is being tried: the last word of
        a case that crashes."""
        self.registry = registry
        self.threads = threads
        self.note = note
        self._factors = factors or {}
        self._sessions: dict[tuple[str, int], Session] = {}

    def session(self, target: str, threads: int | None = None) -> Session:
        count = self.threads if threads is None else threads
        if (target, count) not in self._sessions:
            self._sessions[target, count] = Session(
                target, threads=count, registry=self.registry, records=NO_RECORDS, pipeline=""
            )
        return self._sessions[target, count]

    def module(self, graph: Graph) -> Module:
        """Parsed, in one context with all others: to make one takes longer than most cases."""
        from kernelforge.module import Module

        return Module.parse(graph.text(), self.registry, self._context)

    @cached_property
    def _context(self) -> ir.Context:
        from kernelforge.dialect import context_for

        return context_for(self.registry.ops)

    def factor(self, variant_key: str) -> float:
        """How much wider than the error model's a variant's tolerance is."""
        return self._factors.get(variant_key, 1.0)

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
