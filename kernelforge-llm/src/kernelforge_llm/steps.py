"""The compiled steps of a model: tokens go into a cache, and logits come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kernelforge.locks import ForkLock

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Executable
    from kernelforge.importer import Program
    from kernelforge.session import Session
    from kernelforge_llm.cache import KVCache
    from kernelforge_llm.model import Model

Logits = NDArray[np.float32]


class Step(NamedTuple):
    executable: Executable
    logits: int
    """Which of its outputs they are."""


class _Bound(NamedTuple):
    """A step for one token on the memory of one cache: what each call reads is written into these arrays."""

    token: NDArray[np.int32]
    position: NDArray[np.int32]
    slot: NDArray[np.int32]
    call: Callable[[], tuple[NDArray[Any] | Buffer, ...]]


Numbers = Sequence[int] | NDArray[np.int32]


def step_inputs(
    cache: KVCache, tokens: Numbers, positions: Numbers, slots: Numbers, rows: Numbers
) -> dict[str, NDArray[Any] | Buffer]:
    """Of a step: for each token its id, position and slot of the cache; the rows whose logits are wanted."""
    numbers = {"tokens": tokens, "positions": positions, "slots": slots, "rows": rows}
    return {**{name: np.asarray(values, np.int32) for name, values in numbers.items()}, **cache.buffers}


class Steps:
    """Each is compiled when it is first needed. Threads take turns, step by step; a cache is for one at a time."""

    def __init__(self, model: Model, session: Session) -> None:
        self._model, self._session = model, session
        self.compile_s = 0.0
        """Seconds spent compiling so far."""
        self._compiled: dict[str, Step] = {}
        self._compiling = ForkLock()
        self._bound: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()

    @property
    def one(self) -> Step:
        """The step for one token of one sequence."""
        return self._compiled.get("one") or self._make("one", lambda: self._model.programs[0])

    @property
    def sampled(self) -> Step:
        """The step for one token of one sequence that draws the next."""
        return self._compiled.get("sampled") or self._make("sampled", lambda: self._model.sampled)

    @property
    def many(self) -> Step:
        """The step for any number of tokens and rows."""
        return self._compiled.get("many") or self._make("many", lambda: self._model.programs[1])

    def _make(self, name: str, program: Callable[[], Program]) -> Step:
        with self._compiling:
            if name not in self._compiled:  # no other thread did while this one waited
                self._compiled[name] = self._compile(program())
            return self._compiled[name]

    def _compile(self, program: Program) -> Step:
        start = time.perf_counter()
        tensors = self._model.source.tensors
        executable = self._session.compile(
            program.module, constants=tensors, dims=program.dims, max_dims=program.max_dims
        )
        names = [executable.plan.values[value].name for value in executable.plan.outputs]
        self.compile_s += time.perf_counter() - start
        return Step(executable, names.index("logits"))

    def run(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        rows: Sequence[int],
    ) -> Logits:
        """The logits [rows, vocab] after these tokens, which go into the cache; arguments as of `step_inputs`."""
        if len(tokens) == 1:
            return self._run_one(cache, tokens[0], positions[0], slots[0])
        compiled = self.many
        inputs = step_inputs(cache, tokens, positions, slots, rows)
        return cast("Logits", compiled.executable.run(inputs)[compiled.logits])

    def _run_one(self, cache: KVCache, token: int, position: int, slot: int) -> Logits:
        compiled, bound = self.one, self._bound.get(cache)
        if bound is None:
            # A target may run what it binds: it then writes what this step is to write.
            tokens, positions, slots = (np.array([n], np.int32) for n in (token, position, slot))
            call = compiled.executable.bind(step_inputs(cache, tokens, positions, slots, (0,)))
            bound = self._bound[cache] = _Bound(tokens, positions, slots, call)
        bound.token[0], bound.position[0], bound.slot[0] = token, position, slot
        return cast("Logits", bound.call()[compiled.logits]).copy()  # the next call overwrites them
