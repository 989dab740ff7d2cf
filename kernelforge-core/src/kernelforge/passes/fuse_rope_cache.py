"""`fuse-rope-cache`: the RoPE of an attention's queries and keys and the updates of its caches become one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.mlir import ir
from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.rewriting import Body, Op, available, tensor_type

ATTENTION = "transformer.attention"
KV_CACHE_UPDATE = "transformer.kv_cache_update"
ROPE = "transformer.rope"
ROPE_CACHE_UPDATE = "transformer.rope_cache_update"


@dataclass(frozen=True)
class FuseRopeCache(Pass):
    name: ClassVar[str] = "fuse-rope-cache"

    def run(self, module: Module) -> None:
        body = Body(module)
        for attention in body.walk(ATTENTION):
            q, keys, values = attention.operands[:3]
            queries = body.producer(q, ROPE)
            key_update = body.producer(keys, KV_CACHE_UPDATE)
            value_update = body.producer(values, KV_CACHE_UPDATE)
            if queries is not None and key_update is not None and value_update is not None:
                _fuse(body, queries, key_update, value_update)


def _fuse(body: Body, queries: Op, key_update: Op, value_update: Op) -> None:
    q, positions = queries.operands
    key_cache, rotated, *places = key_update.operands
    value_cache, v, *value_places = value_update.operands
    keys = body.feeder(rotated, ROPE)
    if keys is None or keys.attrs != queries.attrs or places != value_places:
        return
    k, key_positions = keys.operands
    if not positions == key_positions == places[0]:
        return
    operands = [value for value in (q, k, v, key_cache, value_cache, *places) if value is not None]
    if len({tensor_type(value).dtype for value in operands[:3]}) > 1:
        return
    # The new op stands where the last of them stood, before all users of what any of them gives.
    replaced = (queries, key_update, value_update)
    last = next(op for op in replaced if all(_before(other, op) for other in replaced))
    made_by = {op.operation for op in (*replaced, keys)}
    users = [use.owner.operation for op in replaced for use in op.result.uses]
    if any(not last.operation.is_before_in_block(user) for user in users if user not in made_by):
        return
    if not all(available(value, at=last) and not _made(value, made_by) for value in operands):
        return
    made = body.create(ROPE_CACHE_UPDATE, operands, queries.attrs, before=last, of=[queries, keys, *replaced[1:]])
    for op, value in zip(replaced, made, strict=True):
        body.replace(op, [value])
    body.erase(keys)


def _before(op: Op, other: Op) -> bool:
    return bool(op.operation == other.operation or op.operation.is_before_in_block(other.operation))


def _made(value: ir.Value, by: set[ir.Operation]) -> bool:
    return not isinstance(value, ir.BlockArgument) and value.owner.operation in by
