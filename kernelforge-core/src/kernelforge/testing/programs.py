"""Random programs over the transformer dialect, and what they compute on the reference target."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kernelforge.constant import ArraySource
from kernelforge.dtype import FLOATS, epsilon, from_numpy, to_numpy
from kernelforge.graph import Graph, Tensor
from kernelforge.planning import make_plan
from kernelforge.quant import quantize
from kernelforge.reference import INFO, ReferenceDevice
from kernelforge.selection import Selection, select
from kernelforge.testing.case import Failure

if TYPE_CHECKING:
    from kernelforge.module import Function, Module
    from kernelforge.problem import Problem
    from kernelforge.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]

WIDTHS = (4, 6)
ROUNDINGS = 64
"""Of the result's type: every op that is fused away is a rounding less."""


class Program:
    """A graph that grows at random, over tensors of shape [tokens, 4 or 6], rich in what fusions look for."""

    def __init__(self, seed: int, dtype: str = "") -> None:
        self.rng = random.Random(seed)
        self.g = Graph()
        self.dtype = dtype or self.rng.choice(("f64", "f64", "f32"))
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

    def attend(self) -> Tensor:
        """softmax(x y^T) y over two heads, op by op."""
        x = self.pick()
        n = x.shape[1]
        assert isinstance(n, int)
        q, k = (t.reshape("tokens", 2, n // 2).transpose(1, 0, 2) for t in (x, self.pick(n)))
        weights = self.g.softmax(self.g.matmul(q, k, transpose_rhs=True))
        return self.g.matmul(weights, k).transpose(1, 0, 2).reshape("tokens", n)

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
            self.attend,
            lambda: self.activation(self.pick()),
            lambda: self.norm(self.sum()),
            lambda: self.linear(self.pick(), self.width()),
        ]
        for _ in range(steps):
            self.pool.append(self.rng.choice(kinds)())
        for i, t in enumerate(self.rng.sample(self.pool, 3) + self.pool[-2:]):
            self.g.output(t, f"y{i}")
        return self.g


def program_inputs(function: Function, seed: int, size: int = 3) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and constants, dynamic dimensions of `size`: normal floats, and integers in 0..2."""
    rng = np.random.default_rng(seed)
    dims = dict.fromkeys(function.dims, size)
    inputs: dict[str, Array] = {}
    constants: dict[str, Array] = {}
    for arg in function.args:
        shape = arg.type.static_shape(dims)
        floats = arg.type.quantised or arg.type.dtype in FLOATS
        values = np.asarray(rng.standard_normal(shape) if floats else rng.integers(0, 3, shape))
        made = quantize(values, arg.type.dtype) if arg.type.quantised else values.astype(to_numpy(arg.type.dtype))
        (constants if arg.constant else inputs)[arg.name] = made
    return inputs, constants


def execute(
    module: Module, inputs: Mapping[str, Array], constants: Mapping[str, Array], registry: Registry
) -> dict[str, Array]:
    """The module's outputs by name, computed by the numpy references."""
    function = module.function()

    def choose(problem: Problem) -> Selection:
        return select(problem, registry.variants(problem.op, INFO.target), INFO)

    plan = make_plan(function, registry.ops, choose, target=INFO.target)
    executable = ReferenceDevice().compile(plan, ArraySource(constants), registry)
    outputs = [np.asarray(o) for o in executable.run(inputs)]
    return dict(zip(function.output_names, outputs, strict=True))


def compare_programs(
    want: Mapping[str, Array], have: Mapping[str, Array], what: str, roundings: float = ROUNDINGS
) -> None:
    """Raises Failure unless the outputs are the same, but for so many roundings of their types."""
    if list(want) != list(have):
        raise Failure("wrong-values", f"{what} has outputs {list(have)}, must have {list(want)}")
    for name, expected in want.items():
        got = have[name]
        if got.shape != expected.shape:
            raise Failure("wrong-shape", f"output '{name}' of {what} is {got.shape}, must be {expected.shape}")
        if got.dtype != expected.dtype:
            raise Failure("wrong-dtype", f"output '{name}' of {what} is {got.dtype}, must be {expected.dtype}")
        exact = expected.astype(np.float64)
        allowed = roundings * epsilon(from_numpy(expected.dtype)) * max(1.0, float(np.abs(exact).max(initial=0.0)))
        difference = float(np.abs(got.astype(np.float64) - exact).max(initial=0.0))
        if not difference <= allowed:
            raise Failure(
                "wrong-values", f"output '{name}' of {what} is off by {difference:.2e}, allowed {allowed:.2e}"
            )
