"""What the kernels of attention have in common: shapes, where queries, keys, values and results are, who sees what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.dtype import GROUP, QUANTISED
from kernelforge_cpu.kernels.axes import Size, emit_size, size_of, strides_of

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

BUNDLE_HEADS = 8
"""More heads of one kv head than this are shared out."""

FAR = 1 << 30
"""A window of this many positions hides nothing."""


class Access:
    """Emits the addresses and bounds of one attention kernel. `sequence` is a slot of the cache, or the number of a dense
    sequence."""

    def __init__(self, k: KernelBuilder, problem: Problem) -> None:
        self.k, self.problem = k, problem
        q, keys, values, out = (problem.operand(0), problem.operand(1), problem.operand(2), problem.results[0])
        self.tokens, heads, head_dim = q.shape[-3:]
        groups = keys.shape[-2]
        assert isinstance(heads, int)
        assert isinstance(head_dim, int)
        assert isinstance(groups, int)
        self.head_dim = head_dim
        per_group = heads // groups if groups else 1
        # A bundle is the heads of one kv head or, when they are many, a part of them that divides evenly.
        self.heads = max(n for n in range(1, BUNDLE_HEADS + 1) if per_group % n == 0)
        self.bundles = heads // self.heads
        self.bundles_per_group = per_group // self.heads
        self.quantised = keys.quantised
        self.row_bytes = keys.bytes_of(head_dim)
        """Of a key or value."""
        self.q, self.out = k.buffer(0, q.dtype), k.buffer(6, out.dtype)
        self.keys, self.values = (k.buffer(i, "i8" if self.quantised else keys.dtype) for i in (1, 2))
        self.q_steps, self.key_steps, self.value_steps, self.out_steps = (
            self._steps(t) for t in (q, keys, values, out)
        )
        self.slots = self.size(keys.shape[-4] if len(keys.shape) > 3 else 1)
        self.capacity = self.size(keys.shape[-3])

    @property
    def softcap(self) -> float:
        softcap = self.problem.attr("softcap")
        assert isinstance(softcap, float)
        return softcap

    @property
    def factor(self) -> float:
        """Of the queries, so that their products with keys are scores, or what tanh is taken of."""
        scale = self.problem.attr("scale")
        assert isinstance(scale, float)
        return (scale or 1.0 / math.sqrt(self.head_dim)) / (self.softcap or 1.0)

    @property
    def registers(self) -> int:
        """Vector registers that a tile may fill with partial results."""
        few = self.k.target.arch == "x86_64" and self.k.lanes < 16
        return 12 if few else 24

    def size(self, dim: Dim) -> Value:
        return emit_size(self.k, self.problem, size_of(dim))

    def _steps(self, t: TensorType) -> list[Value]:
        """Steps of (slot or sequence, token or key, head), in elements, in bytes of a quantised tensor; one of rank 3 has
        one sequence."""
        strides = strides_of(t)
        if t.quantised:
            strides = tuple(Size(t.bytes_of(s.number), s.names) for s in strides)  # but for the last: whole groups
        padded = (*(Size(0),) * (4 - len(strides)), *strides)
        return [emit_size(self.k, self.problem, s) for s in padded[:3]]

    def visible(self, position: Value, limit: Value) -> tuple[Value, Value]:
        """First and end of the keys that a token at `position` sees."""
        k, window = self.k, self.problem.attr("window")
        assert isinstance(window, int)
        end = k.min(position + 1, limit) if self.problem.attr("causal") else k.value(limit, position.type)
        first = k.max(position - (window - 1), 0) if 0 < window < FAR else k.const(0, position.type)
        return first, end

    def limit(self, sequence: Value) -> Value:
        """The end of the keys that exist, lengths counted."""
        k = self.k
        if self.problem.operands[5] is None:
            return self.capacity
        step = emit_size(k, self.problem, strides_of(self.problem.operand(5))[0])
        return k.min(k.convert(k.buffer(5, "i32").load(sequence * step), "i64"), self.capacity)

    def group_of(self, bundle: Value) -> Value:
        return self.k.binary("divu", bundle, self.k.i64(self.bundles_per_group))

    def key_row(self, sequence: Value, key: Value, group: Value) -> Pointer:
        steps = self.key_steps
        return self.keys.at(sequence * steps[0] + key * steps[1] + group * steps[2])

    def value_row(self, sequence: Value, key: Value, group: Value) -> Pointer:
        steps = self.value_steps
        return self.values.at(sequence * steps[0] + key * steps[1] + group * steps[2])

    def load_row(self, row: Pointer, d: int, width: int) -> Value:
        """Elements d..d + width of a key or value, as f32; zeros after the head."""
        if not self.quantised:
            valid = self.k.i64(self.head_dim - d) if d + width > self.head_dim else None
            return row.load_f32(d, width, valid=valid)
        group = row.at(d // GROUP * QUANTISED["q8"])
        scale = self.k.convert(group.of("f16").load(align=1), "f32")
        return group.load_f32(2 + d % GROUP, width) * self.k.broadcast(scale, width)

    def load_query(self, sequence: Value, token: Value, head: Value, to: Pointer, width: int) -> None:
        """A query to scratch: f32, scaled, zeros to whole vectors of `width`."""
        steps = self.q_steps
        source = self.q.at(sequence * steps[0] + token * steps[1] + head * steps[2])
        for d in range(0, self.head_dim, width):
            valid = self.k.i64(self.head_dim - d) if d + width > self.head_dim else None
            to.store(source.load_f32(d, width, valid=valid) * self.factor, d)

    def store_result(
        self, source: Pointer, total: Value, sequence: Value, token: Value, head: Value, width: int
    ) -> None:
        """A row of the result: sums of weighted values over the sum of weights; 0 for a row that saw no key."""
        k, steps = self.k, self.out_steps
        divisor = k.select(total.eq(0.0), 1.0, total)
        to = self.out.at(sequence * steps[0] + token * steps[1] + head * steps[2])

        def store(d: Value, valid: Value | None) -> None:
            to.store(source.load(d, width) / divisor, d, valid=valid)

        k.vectorize(0, self.head_dim, store, lanes=width)

    def store_zeros(self, bundles: Sequence[Value], token: Value) -> None:
        """Results of a token that is padding."""
        k, steps = self.k, self.out_steps
        with k.for_(bundles[0] * self.heads, bundles[1] * self.heads) as head:
            to = self.out.at(token * steps[1] + head.i * steps[2])
            k.vectorize(0, self.head_dim, lambda d, valid: to.store(k.f32(0.0, k.lanes), d, valid=valid))
