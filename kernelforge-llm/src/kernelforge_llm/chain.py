"""Decode steps in a chain: the token of one is the input of the next, on the device.

On devices that work while the host goes on, a step is started before the token of the one before it has come back, so that
the device never waits for the host. A sampled token depends on numbers that the host draws, and they on nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernelforge.variant import ASYNCHRONOUS
from kernelforge_llm.sampling import check_choice

if TYPE_CHECKING:
    from kernelforge.backend import Buffer, Device, Executable
    from kernelforge_llm.sampling import RandomSampler

    Fetch = Callable[[], NDArray[Any]]

AHEAD = 2
"""Steps that are under way at once where the device works while the host goes on."""


class Chain:
    """A step for one token, bound to the memory of one cache. To be started ahead it is bound several times: buffers take turns
    to hold the token that goes in, the one that comes out, and the logits. Serves one run at a time."""

    def __init__(
        self,
        executable: Executable,
        device: Device,
        caches: Mapping[str, Buffer],
        vocab: int,
        sampler: RandomSampler | None = None,
    ) -> None:
        """`executable`: with the inputs and outputs of `Model.module`, for one token and one row; those of `Model.sampled` where
        there is a `sampler`."""
        self._ahead = AHEAD if ASYNCHRONOUS in device.info.features else 1
        self._position, self._slot = np.full(1, -1, np.int32), np.zeros(1, np.int32)
        self._sampler, self._uniform = sampler, np.zeros(1, np.float32)
        turns = self._ahead + 1 if self._ahead > 1 else 1
        """One more than are under way: the logits of a step can be asked for behind the next start."""
        self._tokens = [device.allocate((1,), "i32") for _ in range(max(2, turns))]
        self._logits = [device.allocate((1, vocab), "f32") for _ in range(turns)]
        numbers = {"positions": self._position, "slots": self._slot, "rows": np.zeros(1, np.int32)}
        choice = {} if sampler is None else {**sampler.sampling.arrays(), "uniform": self._uniform}
        self._calls = [
            executable.bind(
                {**numbers, **choice, **caches, "tokens": self._tokens[i]},
                {"token": self._tokens[(i + 1) % len(self._tokens)], "logits": self._logits[i]},
            )
            for i in range(turns)
        ]

    def run(self, first: int, position: int, sequence: int, count: int) -> Generator[int, None, None]:
        """The `count` tokens after `first`, which stands at `position` of `sequence`. When one is given out, all before it
        are in the cache and its number is taken from the sampler's; a step may be under way and write behind them.

        Raises KernelForgeError as `kernelforge_llm.sampling.greedy` does, where a step is started ahead up to two tokens
        later, or when it is closed.
        """
        self._tokens[0].write(np.array([first], np.int32))
        self._slot[0] = sequence
        begun: deque[Fetch] = deque()
        unasked: deque[tuple[int, int]] = deque()
        """A step and the token that it chose."""
        unchecked: deque[tuple[int, Fetch]] = deque()

        def ask() -> None:
            while unasked:
                step, token = unasked.popleft()
                unchecked.append((token, self._logits[step % len(self._logits)].fetch(0, token)))

        def check(left: int) -> None:
            """All that was chosen but for some, whose logits are on their way."""
            ask()
            while len(unchecked) > left:
                token, logit = unchecked.popleft()
                check_choice(token, float(logit()))

        started = 0
        for done in range(count):
            while started < min(count, done + self._ahead):
                self._position[0] = position + started
                if self._sampler is not None:
                    self._uniform[0] = self._sampler.draws.ahead(started - done)
                i = started % len(self._calls)
                self._calls[i]()
                begun.append(self._tokens[(i + 1) % len(self._tokens)].fetch())
                started += 1
            ask()  # behind the start of a step: what is copied of both is copied at once
            token = begun.popleft()()
            chosen = int(token[0])
            if self._sampler is not None:
                self._sampler.draws.take()
            if self._ahead == 1:
                self._tokens[0].write(token)
            check(self._ahead - 1)  # a logit looked at before the token that it came with would have the device run dry
            unasked.append((done, chosen))
            if self._ahead == 1 or done + 1 == count:
                check(0)
            try:
                yield chosen
            except GeneratorExit:
                # What NaN logits choose is token 0, which ends the answers of many models: it must not pass for an end.
                check(0)
                raise
