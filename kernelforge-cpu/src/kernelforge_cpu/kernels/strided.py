"""Walks over strided tensors: elementwise maps of any rank and layout, and loops over rows whose last axis is contiguous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kernelforge.variant import Accept, Reject
from kernelforge_cpu.kernels.axes import (
    ONE,
    ZERO,
    Axis,
    Size,
    emit_offsets,
    emit_rows,
    emit_size,
    loop_nest,
    strides_of,
)

if TYPE_CHECKING:
    from kernelforge.problem import Dim, Problem, TensorType
    from kernelforge.variant import DeviceInfo, Verdict
    from kernelforge_cpu.emit import KernelBuilder, Pointer, Value

FLOATS = ("f32", "bf16", "f16")


class Tensor(NamedTuple):
    """Where a kernel finds a tensor."""

    pointer: Pointer
    strides: tuple[Size, ...]


def tensor(k: KernelBuilder, problem: Problem, index: int) -> Tensor:
    """Operand or result `index` (results follow the operands)."""
    t = (*problem.operands, *problem.results)[index]
    assert t is not None
    return Tensor(k.buffer(index, t.dtype), strides_of(t))


def takes_floats(problem: Problem, device: DeviceInfo) -> Verdict:
    """Every tensor is f32, bf16 or f16, but for i32 indices, positions and slots."""
    for t in (*problem.operands, *problem.results):
        if t is not None and t.dtype not in (*FLOATS, "i32"):
            return Reject(f"takes {', '.join(FLOATS)}, not {t.dtype}")
    return Accept()


def takes_rows(problem: Problem, device: DeviceInfo) -> Verdict:
    """As `takes_floats`, and the last axis of every float tensor is contiguous."""
    for t in (*problem.operands, *problem.results):
        if t is not None and t.dtype in FLOATS and not contiguous_rows(t):
            return Reject(f"takes tensors whose last axis has stride 1, not {t}")
    return takes_floats(problem, device)


def contiguous_rows(t: TensorType) -> bool:
    return not t.rank or t.shape[-1] == 1 or strides_of(t)[-1] == ONE


def emit_map(
    k: KernelBuilder,
    problem: Problem,
    shape: Sequence[Dim],
    sources: Sequence[Tensor],
    result: Tensor,
    body: Callable[..., Value],
    *,
    lanes: int = 0,
) -> None:
    """This part's share of `result[i] = body(*(source[i] for each source))` for every index of `shape`.

    `body` gets what is in memory, as vectors, or as scalars where a source is repeated along the innermost loop or the
    loop is strided.
    """
    tensors = (*sources, result)
    nest = loop_nest(shape, *(t.strides for t in tensors))
    inner = nest.pop() if nest else Axis(ONE, (ONE,) * len(tensors))
    extent = emit_size(k, problem, inner.extent)
    unit = inner.strides[-1] == ONE and all(s in (ZERO, ONE) for s in inner.strides)
    lanes = lanes or k.lanes

    def run(pointers: Sequence[Pointer], lo: Value, hi: Value) -> None:
        def step(i: Value, valid: Value | None) -> None:
            values = [
                p.load(i, lanes, valid=valid) if s == ONE else p.load()
                for p, s in zip(pointers[:-1], inner.strides[:-1], strict=True)
            ]
            made = body(*values)
            pointers[-1].store(made if made.type.lanes else k.broadcast(made, lanes), i, valid=valid)

        if unit:
            k.vectorize(lo, hi, step, lanes=lanes)
            return
        steps = [emit_size(k, problem, s) for s in inner.strides]
        with k.for_(lo, hi) as loop:
            values = [p.load(loop.i * s) for p, s in zip(pointers[:-1], steps[:-1], strict=True)]
            pointers[-1].store(body(*values), loop.i * steps[-1])

    if not nest:
        run([t.pointer for t in tensors], *k.share(extent, grain=64))
        return
    rows = emit_rows(k, problem, nest)
    with k.for_(*k.share(rows)) as loop:
        offsets = emit_offsets(k, problem, nest, loop.i, len(tensors))
        run([t.pointer.at(o) for t, o in zip(tensors, offsets, strict=True)], k.i64(0), extent)


def emit_each_row(
    k: KernelBuilder,
    problem: Problem,
    shape: Sequence[Dim],
    tensors: Sequence[Tensor],
    body: Callable[..., None],
) -> None:
    """Calls `body(row number, *addresses of the row in each tensor)` for this part's share of the rows of `shape`, the
    axes before the last one. The tensors' strides are those of these axes."""
    nest = loop_nest(shape, *(t.strides for t in tensors))
    with k.for_(*k.share(emit_rows(k, problem, nest))) as loop:
        offsets = emit_offsets(k, problem, nest, loop.i, len(tensors))
        body(loop.i, *(t.pointer.at(o) for t, o in zip(tensors, offsets, strict=True)))
