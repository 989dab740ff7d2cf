"""A few rows times a quantised weight, multiplied in integers: as `gemv`, but for what a thread does with a unit.

Bytes take a fraction of the instructions of floats, so that four bits are read as fast as memory delivers them. A thread makes
integers of its part of lhs in registers, which pays when it has many columns to multiply it by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernelforge.variant import ConfigSpace, Reject
from kernelforge_metal.adapters import DOT4
from kernelforge_metal.kernels.matmul.gemv import (
    MAX_SUMS,
    build,
    memory_constraint,
    takes_gemv,
    takes_gemv_subgroups,
)
from kernelforge_metal.kernels.matmul.gemv_kernel import Gemv
from kernelforge_metal.kernels.matmul.geometry import product_of, rhs_of
from kernelforge_metal.kernels.matmul.integers import INTEGERS, UNIT
from kernelforge_metal.kernels.matmul.weights import QUAD, Quads

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_metal.kernel import GpuKernel

MAX_WORDS = 16
"""Of 16 bytes that a thread has under way: more leave too few registers to the other threads."""
ENOUGH, MANY = 128, 4096
"""Workgroups: one for each processor of a large GPU, and so many that the next ones are always at hand."""


def takes_integers(problem: Problem, device: DeviceInfo) -> Verdict:
    """Of the kernel that adds up in workgroup memory."""
    return _takes(problem, device) or takes_gemv(problem, device)


def takes_integers_subgroups(problem: Problem, device: DeviceInfo) -> Verdict:
    return _takes(problem, device) or takes_gemv_subgroups(problem, device)


def _takes(problem: Problem, device: DeviceInfo) -> Reject | None:
    weight = problem.operand(rhs_of(problem)[0])
    if not weight.quantised:
        return Reject(f"takes weights of q8 or q4, not {weight.dtype}")
    if DOT4 not in device.features:
        return Reject("the device has no dot products of bytes: made of other instructions they are slower than floats")
    return None


def integers_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    """As of `gemv`: `columns`, `threads` and `unroll`."""
    return _space(problem, device, subgroups=True)


def integers_shared_space(problem: Problem, device: DeviceInfo) -> ConfigSpace:
    return _space(problem, device, subgroups=False)


def _space(problem: Problem, device: DeviceInfo, *, subgroups: bool) -> ConfigSpace:
    g = product_of(problem)
    sums = len(g.rhs) * max(1, g.static_rows or 1)
    most = device.limit("max-compute-invocations-per-workgroup", 256)
    return ConfigSpace(
        (
            ("columns", (4, 8, 16)),
            ("threads", tuple(t for t in (32, 64, 128, 256, 512) if t <= most)),
            ("unroll", (1, 2, 4)),
        ),
        (
            (
                "the sums do not fit the registers",
                lambda c: c["columns"] == QUAD or int(c["columns"]) * sums <= MAX_SUMS,
            ),
            (
                "too many words are under way",
                lambda c: c["unroll"] == 1 or int(c["columns"]) // QUAD * int(c["unroll"]) * len(g.rhs) <= MAX_WORDS,
            ),
            memory_constraint(problem, device, subgroups=subgroups),
        ),
    )


def integers_default(problem: Problem, device: DeviceInfo) -> Config:
    return _default(problem, integers_space(problem, device))


def integers_shared_default(problem: Problem, device: DeviceInfo) -> Config:
    return _default(problem, integers_shared_space(problem, device))


def _default(problem: Problem, space: ConfigSpace) -> Config:
    """As many threads as share the units evenly; more columns where they still leave a large GPU enough workgroups, for lhs is
    made integers once in each. Measured on an NVIDIA H100."""
    g = product_of(problem)
    dtype = problem.operand(g.rhs[0]).dtype
    units = Quads(dtype, g.columns, g.inner).units
    threads = [int(t) for t in dict(space.parameters)["threads"]]
    fitting = [t for t in threads if t <= units] or threads[:1]
    shared = max((t for t in fitting if units % t == 0 and 2 * t >= fitting[-1]), default=fitting[-1])
    unroll = 2 if dtype == "q8" and units >= 2 * shared else 1
    wide = [c for c, workgroups in ((16 // len(g.rhs), MANY), (8 // len(g.rhs), ENOUGH)) if c * workgroups <= g.columns]
    fewer = [t for t in reversed(threads) if t <= shared]
    chosen = [{"columns": c, "threads": t, "unroll": unroll} for t in fewer for c in (*wide, QUAD)]
    return next(c for c in chosen if c in space)


class IntegerGemv(Gemv):
    """The text of a GEMV kernel that multiplies in integers."""

    @property
    def functions(self) -> str:
        assert isinstance(self.weights, Quads)
        whole = "".join(self.weights.functions(name) for name in self.names)
        return INTEGERS + UNIT[self.weights.dtype] + whole

    def products(self) -> Iterator[str]:
        for m in range(self.rows):
            yield f"var odd{m} = false;"
        yield from super().products()
        for m in range(self.rows):
            yield f"if (odd{m}) {{"
            yield from self.odd_numbers(m)
            yield "}"

    def quads(self, i: int) -> Iterator[str]:
        yield from self.numbers(i)
        for m in range(self.rows):
            numbers = ", ".join(f"x{i}_{m}_{j}" for j in range(self.vectors))
            yield f"let d{i}_{m} = integers({numbers}); odd{m} = odd{m} || d{i}_{m}.odd;"
        for n in range(len(self.names)):
            for c in range(self.columns):
                word, scale = self.word(i, n, c)
                for m in range(self.rows):
                    z = self.sum(n, m, c)
                    yield f"{z} = fma(product(d{i}_{m}, {word}), {scale}, {z});"

    def odd_numbers(self, row: int) -> Iterator[str]:
        """Add the products of what has no digits."""
        gain = "" if self.product.gain is None else " * gain_four(0u, {place})"
        yield f"for (var unit = t; unit < {self.weights.units}u; unit += {self.threads}u) {{"
        for j in range(self.vectors):
            place = f"{self.vectors}u * unit + {j}u"
            yield f"let x{j} = x_four({row}u, {place}){gain.format(place=place)};"
        most = "max(magnitude(x0), magnitude(x1))" if self.vectors == 2 else "magnitude(x0)"
        yield f"if (!odd_unit({most})) {{ continue; }}"
        yield f"for (var j = 0u; j < {self.weights.steps}u; j++) {{"
        yield "var four = x0;" + (" if (j >= 4u) { four = x1; }" if self.vectors == 2 else "")
        yield "let x = four[j & 3u];"
        yield "if (odd_number(x)) {"
        for n, name in enumerate(self.names):
            for c in range(self.columns):
                column = f"{QUAD}u * quad{c // QUAD} + {c % QUAD}u"
                yield f"{self.sum(n, row, c)} += x * {name}_at({column}, {self.weights.steps}u * unit + j);"
        yield "} } }"


def build_integers(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return build(IntegerGemv, problem, config, device, subgroups=False)


def build_integers_subgroups(problem: Problem, config: Config, device: DeviceInfo) -> GpuKernel:
    return build(IntegerGemv, problem, config, device, subgroups=True)
