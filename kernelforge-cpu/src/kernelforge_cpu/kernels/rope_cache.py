"""rope_cache_update: a token's queries are rotated, and its keys, rotated, and its values go straight into the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernelforge.variant import Reject
from kernelforge_cpu.kernel import NativeKernel, Phase
from kernelforge_cpu.kernels.axes import emit_inside, emit_size, shared, size_of
from kernelforge_cpu.kernels.cache import as_plain, emit_quantised, takes_cache
from kernelforge_cpu.kernels.common import new_kernel
from kernelforge_cpu.kernels.rope import GRAIN, Heads, emit_angles, emit_copied, emit_turned, rotations, takes_rope
from kernelforge_cpu.kernels.strided import tensor

if TYPE_CHECKING:
    from kernelforge.problem import Problem
    from kernelforge.variant import Config, DeviceInfo, Verdict
    from kernelforge_cpu.emit import Pointer, Value

QUERIES, KEYS, VALUES, KEY_CACHE, VALUE_CACHE, POSITIONS, SLOTS, ROTATED = range(8)
TABLE, SCRATCH = 10, 11
"""Buffers: operands and results, which for the caches are the operands, then what the kernel brings."""


def takes_rope_cache_update(problem: Problem, device: DeviceInfo) -> Verdict:
    verdict = takes_cache(problem.operand(KEY_CACHE))
    return verdict if isinstance(verdict, Reject) else takes_rope(as_plain(problem), device)


def build_rope_cache_update(problem: Problem, config: Config, device: DeviceInfo) -> NativeKernel:
    k = new_kernel(problem, config, device)
    (tokens, heads, size), (_, groups, _) = problem.operand(QUERIES).shape, problem.operand(KEYS).shape
    cache = problem.operand(KEY_CACHE)
    assert isinstance(size, int)
    table, interleaved = rotations(size, problem.attrs), bool(problem.attr("interleaved"))

    def text() -> str:
        pairs = table.shape[2]
        tensors = [tensor(k, problem, i) for i in range(ROTATED + 1)]
        steps = [[emit_size(k, problem, s) for s in t.strides] for t in tensors]
        query_count, count, slot_count, capacity = (
            emit_size(k, problem, size_of(n)) for n in (heads, groups, *cache.shape[:2])
        )
        row = cache.bytes_of(int(groups) * size) if cache.quantised else 0
        turned = k.buffer(SCRATCH, "f32").at(k.part * (int(groups) * size)) if cache.quantised else None

        def of(index: int, token: Value) -> Pointer:
            return tensors[index].pointer.at(token * steps[index][0])

        def place(index: int, slot: Value, position: Value) -> Pointer:
            if cache.quantised:
                return k.buffer(index, "i8").at((slot * capacity + position) * row)
            return tensors[index].pointer.at(slot * steps[index][0] + position * steps[index][1])

        with k.for_(*k.share(emit_size(k, problem, size_of(tokens)))) as token:
            position, slot = (k.convert(of(i, token.i).load(), "i64") for i in (POSITIONS, SLOTS))
            queries = Heads(
                of(QUERIES, token.i), of(ROTATED, token.i), query_count, (steps[QUERIES][1], steps[ROTATED][1])
            )
            inside = emit_inside(position, k.min(capacity, table.shape[0])) & emit_inside(slot, slot_count)
            angles = emit_angles(k, k.buffer(TABLE, "f32"), position, table)
            emit_turned(k, queries, angles, size, pairs, interleaved=interleaved)
            with k.if_(inside):
                key, value = (of(i, token.i) for i in (KEYS, VALUES))
                key_row, value_row = (place(i, slot, position) for i in (KEY_CACHE, VALUE_CACHE))
                if turned is None:
                    keys = Heads(key, key_row, count, (steps[KEYS][1], steps[KEY_CACHE][2]))
                    emit_turned(k, keys, angles, size, pairs, interleaved=interleaved)
                    emit_copied(k, Heads(value, value_row, count, (steps[VALUES][1], steps[VALUE_CACHE][2])), 0, size)
                else:
                    keys = Heads(key, turned, count, (steps[KEYS][1], k.i64(size)))
                    emit_turned(k, keys, angles, size, pairs, interleaved=interleaved)
                    emit_quantised(k, turned, key_row, int(groups), k.i64(size), size)
                    emit_quantised(k, value, value_row, int(groups), steps[VALUES][1], size)
        return k.text()

    def scratch(dims: Sequence[int], threads: int) -> int:
        return threads * int(groups) * size * 4 if cache.quantised else 0

    work = size_of(tokens, heads, size)
    return NativeKernel((Phase(k.name, shared(problem, work, GRAIN)),), text, tables=(table,), scratch=scratch)
