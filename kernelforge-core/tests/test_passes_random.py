"""Random programs: every pass, the default pipeline and pipelines in any order keep what a program computes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from pass_checks import REGISTRY, check

from kernelforge.graph import Graph, Tensor
from kernelforge.passes import DEFAULT

WIDTHS = (4, 6)
PASSES = [
    "canonicalize",
    "cse",
    "fuse-add-norm",
    "fuse-epilogue",
    "fuse-epilogue{residual=false}",
    "fuse-glu",
    "fuse-qkv",
]


class Program:
    """A graph that grows at random, over tensors of shape [tokens, 4 or 6], rich in what the passes look for."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.g = Graph()
        self.dtype = self.rng.choice(("f64", "f64", "f32"))
        self.pool = [self.g.input(f"x{i}", ("tokens", w), self.dtype) for i, w in enumerate(WIDTHS * 2)]
        self.constants = 0

    def constant(self, *shape: int, dtype: str | None = None) -> Tensor:
        self.constants += 1
        return self.g.constant(f"c{self.constants}", shape, dtype or self.dtype)

    def pick(self, width: int | None = None) -> Tensor:
        """A recent tensor, so that programs are deep."""
        fitting = [t for t in self.pool if width is None or t.shape[1] == width]
        return self.rng.choice(fitting[-4:])

    def linear(self, x: Tensor, n: int) -> Tensor:
        k = x.shape[1]
        assert isinstance(k, int)
        dtype = self.rng.choice((self.dtype, self.dtype, "bf16"))
        bias = self.constant(n) if self.rng.random() < 0.2 else None
        if self.rng.random() < 0.3:
            return self.g.matmul(x, self.constant(k, n, dtype=dtype), bias)
        if self.rng.random() < 0.3:
            return self.g.matmul(x, self.constant(n, k, dtype=dtype).T, bias)
        return self.g.matmul(x, self.constant(n, k, dtype=dtype), bias, transpose_rhs=True)

    def activation(self, x: Tensor) -> Tensor:
        choice = self.rng.randrange(3)
        return self.g.silu(x) if choice == 0 else self.g.gelu(x, approximate=("none", "tanh")[choice - 1])

    def width(self) -> int:
        return self.rng.choice(WIDTHS)

    def several(self) -> Tensor:
        x = self.pick()
        made = [self.linear(x, self.width()) for _ in range(self.rng.randrange(2, 4))]
        self.pool += made
        return made[0]

    def feed_forward(self) -> Tensor:
        x, n = self.pick(), self.width()
        parts = [self.activation(self.linear(x, n)), self.linear(x, n)]
        self.rng.shuffle(parts)
        return parts[0] * parts[1]

    def biased(self) -> Tensor:
        x = self.linear(self.pick(), self.width())
        n = x.shape[1]
        assert isinstance(n, int)
        parts = [x, self.constant(n)]
        self.rng.shuffle(parts)
        return parts[0] + parts[1]

    def sum(self) -> Tensor:
        x = self.pick()
        width = x.shape[1]
        assert isinstance(width, int)
        return x + self.pick(width)

    def norm(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        assert isinstance(n, int)
        return self.g.rms_norm(x, self.constant(n))

    def layout(self) -> Tensor:
        x = self.pick()
        n = x.shape[1]
        assert isinstance(n, int)
        return self.rng.choice(
            (
                lambda: x.reshape("tokens", 2, n // 2).reshape("tokens", n),
                lambda: x.reshape("tokens", 2, n // 2).transpose(0, 2, 1).reshape("tokens", n),
                lambda: x.T.T,
                lambda: x.cast("f64").cast(self.dtype),
                lambda: x.cast("bf16").cast("f32").cast(self.dtype),
                lambda: self.g.concat(*reversed(x.split((1, n - 1)))),
                lambda: x[:, :n],
            )
        )()

    def grow(self, steps: int) -> Graph:
        kinds: list[Callable[[], Tensor]] = [
            self.several,
            self.feed_forward,
            self.biased,
            self.sum,
            lambda: self.norm(self.pick()),
            self.layout,
            lambda: self.activation(self.pick()),
            lambda: self.norm(self.sum()),
            lambda: self.linear(self.pick(), self.width()),
        ]
        for _ in range(steps):
            self.pool.append(self.rng.choice(kinds)())
        for i, t in enumerate(self.rng.sample(self.pool, 3) + self.pool[-2:]):
            self.g.output(t, f"y{i}")
        return self.g


@pytest.mark.parametrize("seed", range(30))
def test_default_pipeline(seed: int) -> None:
    check(Program(seed).grow(16), DEFAULT)


@pytest.mark.parametrize("seed", range(40, 60))
def test_passes_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    module = Program(seed).grow(16).module(REGISTRY)
    for name in rng.choices(PASSES, k=6):
        module = check(module, name, again=name != "cse")  # MLIR's own finds more dead code each time
