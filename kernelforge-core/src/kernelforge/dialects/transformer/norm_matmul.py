"""Matrix products of rows that are RMS-normalised first, quantised to 8 bits, or both: `rms_norm_matmul`, `quantize_matmul`,
`rms_norm_quantize_matmul`, and the same of the gated pair.

A kernel that normalises and quantises what it multiplies saves a step, and the memory between the two. Weights that 8-bit
activations multiply are always quantised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kernelforge.dialects.transformer.activation import EPILOGUES, GATES, activate
from kernelforge.dialects.transformer.checks import DIALECT, Attrs, required, traffic, want_float
from kernelforge.dialects.transformer.matmul import GLU_MATMUL, MATMUL
from kernelforge.dialects.transformer.models import ACTIVATIONS, MODELS, f32, make, ragged, weight
from kernelforge.dialects.transformer.norms import RMS_NORM, RMS_NORM_QUANTIZE, check_norm
from kernelforge.dialects.transformer.quantisation import QUANTIZE, want_groups
from kernelforge.dtype import ACTIVATION_FORMAT, GROUP, WEIGHT_FORMATS, epsilon
from kernelforge.lazy import Ref, resolve
from kernelforge.op import Attribute, Cost, OpDef, Operand, OperandTypes, OpError, Part
from kernelforge.problem import Attr, Problem, TensorType

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.checks import Array, Arrays

EARLY = (1, 7)
"""Tokens of the samples: with more, a norm of its own costs nothing beside the product."""
FIXED: Attrs = {"transpose_lhs": False, "format": ACTIVATION_FORMAT}
"""Attributes of parts that the whole does not have."""


def _attrs_of(op: OpDef, attrs: Attrs) -> dict[str, Attr]:
    """Those of a part."""
    known = {**FIXED, **attrs}
    return {a.name: known[a.name] for a in op.attributes}


@dataclass(frozen=True)
class _Fed:
    """What an op is that multiplies, as `product` does, what `feeder` makes of the first operand."""

    feeder: OpDef
    product: OpDef

    @property
    def quantises(self) -> bool:
        return self.feeder is not RMS_NORM

    @property
    def own(self) -> int:
        """How many operands are the feeder's."""
        return len(self.feeder.operands)

    @property
    def operands(self) -> tuple[Operand, ...]:
        lhs, *others = self.product.operands
        return (lhs, *(Operand("gain"),) * (self.own - 1), *others)

    @property
    def attributes(self) -> Iterator[Attribute]:
        for a in (*self.feeder.attributes, *self.product.attributes):
            if a.name == "transpose_rhs" and self.quantises:
                yield replace(a, default=True)  # as quantised weights are stored
            elif a.name not in FIXED:
                yield a

    def infer(self, operands: OperandTypes, attrs: Attrs) -> tuple[TensorType, ...]:
        name, lhs, rhs = self.product.operands[0].name, required(operands, 0), required(operands, self.own)
        if self.feeder is QUANTIZE:
            want_float(name, lhs)
        else:
            check_norm(name, lhs, "gain", required(operands, 1), attrs)
        if self.quantises:
            want_groups(name, lhs)
            if rhs.dtype not in WEIGHT_FORMATS:
                known = " or ".join(WEIGHT_FORMATS)
                raise OpError(f"operand '{self.product.operands[1].name}' must be of type {known}, got {rhs.dtype}")
            lhs = TensorType(lhs.shape, ACTIVATION_FORMAT)
        return self.product.infer_types((lhs, *operands[self.own :]), _attrs_of(self.product, attrs))

    def reference(self, arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
        """The formula. Of what is quantised, the numbers that its groups stand for are multiplied, not rounded again."""
        return self._multiplied(self.product.reference, self._first(arrays, attrs), arrays, attrs)

    def magnitude(self, arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
        """As of the product."""
        assert self.product.magnitude is not None
        return self._multiplied(self.product.magnitude, self._first(arrays, attrs), arrays, attrs)

    def undecided(self, arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
        """Norms and divisions that round otherwise, in f32, move numbers between two steps of 8 bits to the other one."""
        import numpy as np

        first = self._first(arrays, attrs)
        floats = first if self.own > 1 else np.asarray(arrays[0], np.float64)
        return self._multiplied(partial(_EFFECT[self.product.name], moved=_steps(floats)), first, arrays, attrs)

    def _first(self, arrays: Arrays, attrs: Attrs) -> Array:
        """What the feeder gives, in float64; a norm is not quantised yet."""
        made: tuple[Array, ...] = resolve(self.feeder.reference)(arrays[: self.own], _attrs_of(self.feeder, attrs))
        return made[0]

    def _multiplied(self, function: Ref, lhs: Array, arrays: Arrays, attrs: Attrs) -> tuple[Array, ...]:
        """What a function of the product gives for this left-hand side."""
        from kernelforge.quant import quantize, widened

        if self.quantises:
            lhs = widened(lhs if self.feeder.exact else quantize(lhs, ACTIVATION_FORMAT))
        made: tuple[Array, ...] = resolve(function)([lhs, *arrays[self.own :]], _attrs_of(self.product, attrs))
        return made

    def parts(self, problem: Problem) -> tuple[Part, ...]:
        names, attrs = tuple(o.name for o in self.operands), dict(problem.attrs)
        first, others, product = names[: self.own], names[self.own :], self.product
        return (
            Part(self.feeder.full_name, first, ("fed",), _attrs_of(self.feeder, attrs)),
            Part(product.full_name, ("fed", *others), product.results, _attrs_of(product, attrs)),
        )

    def cost(self, problem: Problem) -> Cost:
        """The operations of both parts; what is between them never reaches memory."""
        attrs = dict(problem.attrs)
        feeder = self.feeder.problem(problem.operands[: self.own], _attrs_of(self.feeder, attrs))
        operands = (*feeder.results, *problem.operands[self.own :])
        product = self.product.problem(operands, _attrs_of(self.product, attrs))
        flops = self.feeder.problem_cost(feeder).flops + self.product.problem_cost(product).flops
        return Cost(flops, traffic(problem))


def _op(feeder: OpDef, product: OpDef, summary: str, sample: Callable[[random.Random], Iterator[Problem]]) -> OpDef:
    fed = _Fed(feeder, product)
    return OpDef(
        name=f"{feeder.name}_{product.name}",
        summary=summary,
        operands=fed.operands,
        results=product.results,
        attributes=tuple(fed.attributes),
        infer=fed.infer,
        reference=fed.reference,
        sample=sample,
        cost=fed.cost,
        magnitude=fed.magnitude,
        undecided=fed.undecided if fed.quantises else None,
        parts=fed.parts,
        dialect=DIALECT,
    )


def _steps(norm: Array) -> Array:
    """How far each number of a norm moves if f32 rounds it to the other of two steps between which it lies, 0 for most."""
    import numpy as np

    groups = norm.reshape(*norm.shape[:-1], -1, GROUP)
    size = np.abs(groups)
    step = size.max(axis=-1, keepdims=True) / 127
    code = size / step
    # The mean square is in the number and in the step, and cancels. Left are the products of both with its root and the gain, the
    # step, its inverse and the product with that: 8 roundings, of which a GPU's divisions count several times.
    near = np.abs(code - np.floor(code) - 0.5) <= 16 * epsilon("f32") * code
    moved = np.where(near, step, 0.0)
    # Near the smallest step, a group is its numbers or 0.
    moved = np.where(step < 2 * float(np.finfo(np.float32).tiny), size, moved)
    return np.where(np.isfinite(moved), moved, 0.0).reshape(norm.shape)


_SLOPE = 1.2
"""Above the slope of every activation (1.13 of gelu)."""


def _matmul_effect(arrays: Arrays, attrs: Attrs, moved: Array) -> tuple[Array, ...]:
    import numpy as np

    return (_SLOPE * (moved @ np.abs(arrays[1].swapaxes(-1, -2))),)


def _glu_effect(arrays: Arrays, attrs: Attrs, moved: Array) -> tuple[Array, ...]:
    import numpy as np

    x, gate, up = arrays
    by_gate, by_up = (moved @ np.abs(w.T) for w in (gate, up))
    of_gate = _SLOPE * by_gate * (np.abs(x @ up.T) + by_up)
    return (of_gate + np.abs(activate(attrs["activation"], x @ gate.T)) * by_up,)


_EFFECT = {MATMUL.name: _matmul_effect, GLU_MATMUL.name: _glu_effect}
"""By product: how far its results move, at most, when the left-hand side's numbers do by so much."""


def _matmul_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM_MATMUL, f32(1, 1), f32(1), f32(1, 1))
    yield make(RMS_NORM_MATMUL, f32(3, 5), f32(5), f32(5, 2))
    yield make(RMS_NORM_MATMUL, f32(2, 3, 5), weight("bf16", 5), weight("f32", 5, 2), eps=1e-6)
    for epilogue in EPILOGUES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        operands = (f32(m, k), weight("f32", k), weight("f32", n, k), weight("f32", n), f32(m, n))
        yield make(RMS_NORM_MATMUL, *operands, transpose_rhs=True, epilogue=epilogue)
    for dtype in ("bf16", "f16"):
        m, n, k = (ragged(rng, 2, 70) for _ in range(3))
        yield make(RMS_NORM_MATMUL, f32(m, k), weight(dtype, k), weight(dtype, n, k), transpose_rhs=True)
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        operands = (f32(m, k), weight("f32", k), weight(name, n, k), weight("f32", n), f32(m, n))
        yield make(RMS_NORM_MATMUL, *operands, transpose_rhs=True)
    for model in MODELS:
        n = (model.heads + 2 * model.kv_heads) * model.head_dim
        for tokens in EARLY:
            for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                x, gain = f32(tokens, model.width), weight("f32", model.width)
                yield make(RMS_NORM_MATMUL, x, gain, weight(dtype, n, model.width), transpose_rhs=True)


def _glu_samples(rng: random.Random) -> Iterator[Problem]:
    yield make(RMS_NORM_GLU_MATMUL, f32(1, 1), f32(1), f32(1, 1), f32(1, 1))
    yield make(RMS_NORM_GLU_MATMUL, f32(2, 3, 5), f32(5), f32(5, 2), f32(5, 2))
    for activation in GATES:
        m, n, k = (ragged(rng, 2, 40) for _ in range(3))
        w = weight("f32", k, n)
        yield make(RMS_NORM_GLU_MATMUL, f32(m, k), weight("f32", k), w, w, activation=activation, eps=1e-6)
    w = weight("f16", 5, 8)
    yield make(RMS_NORM_GLU_MATMUL, f32(2, 3, 8), weight("f32", 8), w, w, transpose_rhs=True)
    for name in WEIGHT_FORMATS:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        w = weight(name, n, k)
        yield make(RMS_NORM_GLU_MATMUL, f32(m, k), weight("f32", k), w, w, transpose_rhs=True)
    for model in MODELS:
        for tokens in EARLY:
            for dtype in ("f32", "bf16", *WEIGHT_FORMATS):
                x, gain, w = (
                    f32(tokens, model.width),
                    weight("f32", model.width),
                    weight(dtype, model.hidden, model.width),
                )
                yield make(RMS_NORM_GLU_MATMUL, x, gain, w, w, transpose_rhs=True)


def _quantised_samples(rng: random.Random, feeder: OpDef, product: OpDef) -> Iterator[Problem]:
    op, gated = QUANTISING[feeder.name, product.name], product is GLU_MATMUL

    def problem(x: TensorType, n: int, dtype: str, *others: TensorType, **attrs: Attr) -> Problem:
        k = x.static_shape()[-1]
        gain = (weight("f32", k),) * (len(feeder.operands) - 1)
        weights = (weight(dtype, n, k),) * (2 if gated else 1)
        return make(op, x, *gain, *weights, *others, transpose_rhs=True, **attrs)

    yield problem(f32(1, 32), 1, "q8")
    yield problem(f32(2, 3, 64), 5, "q4")
    for activation in GATES if gated else EPILOGUES:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        others = () if gated else (weight("f32", n), f32(m, n))
        yield problem(f32(m, k), n, "q4", *others, **{"activation" if gated else "epilogue": activation})
    for dtype in ACTIVATIONS:
        m, n, k = ragged(rng, 2, 8), ragged(rng, 2, 70), 32 * rng.randrange(1, 9)
        yield problem(TensorType((m, k), dtype), n, "q8")
    for model in MODELS:
        for tokens in EARLY:
            for name in WEIGHT_FORMATS:
                yield problem(f32(tokens, model.width), model.hidden, name)


RMS_NORM_MATMUL = _op(RMS_NORM, MATMUL, "act(rms_norm(lhs, gain) @ rhs + bias) + residual", _matmul_samples)
RMS_NORM_GLU_MATMUL = _op(RMS_NORM, GLU_MATMUL, "act(y @ gate) * (y @ up) of y = rms_norm(x, gain)", _glu_samples)
QUANTISING = {
    (feeder.name, product.name): _op(
        feeder, product, summary, partial(_quantised_samples, feeder=feeder, product=product)
    )
    for feeder, product, summary in (
        (QUANTIZE, MATMUL, "act(quantize(lhs) @ rhs + bias) + residual: lhs in 8-bit groups (q8a), rhs in q8 or q4"),
        (QUANTIZE, GLU_MATMUL, "act(y @ gate) * (y @ up) of y = quantize(x): 8-bit groups (q8a), weights in q8 or q4"),
        (
            RMS_NORM_QUANTIZE,
            MATMUL,
            "act(rms_norm_quantize(lhs, gain) @ rhs + bias) + residual: rhs in q8 or q4",
        ),
        (
            RMS_NORM_QUANTIZE,
            GLU_MATMUL,
            "act(y @ gate) * (y @ up) of y = rms_norm_quantize(x, gain): weights in q8 or q4",
        ),
    )
}
"""By feeder and product."""
QUANTIZE_MATMUL, QUANTIZE_GLU_MATMUL, RMS_NORM_QUANTIZE_MATMUL, RMS_NORM_QUANTIZE_GLU_MATMUL = QUANTISING.values()
