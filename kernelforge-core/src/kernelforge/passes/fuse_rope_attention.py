"""`fuse-rope-attention`: causal attention over caches takes in the RoPE and the updates of those caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernelforge.module import Module
from kernelforge.passes import Pass
from kernelforge.passes.fuse_rope_cache import ATTENTION, ROPE_CACHE_UPDATE
from kernelforge.passes.rewriting import Body, uses

ROPE_ATTENTION = "transformer.rope_attention"


@dataclass(frozen=True)
class FuseRopeAttention(Pass):
    """After `fuse-rope-cache`. Targets without a kernel for the whole, or for as many tokens, run both one after the other."""

    name: ClassVar[str] = "fuse-rope-attention"

    def run(self, module: Module) -> None:
        body = Body(module)
        for attention in body.walk(ATTENTION):
            q, keys, values, *places = attention.operands
            update = body.producer(q, ROPE_CACHE_UPDATE)
            if update is None or q is None or uses(q) > 1:
                continue
            attrs = dict(attention.attrs)
            made = [q, keys, values, *places[:2]]
            if made != [*update.operation.results, *update.operands[5:]] or not attrs.pop("causal"):
                continue
            # The new op stands where attention stood, before all who use the caches.
            users = [use.owner.operation for value in update.operation.results for use in value.uses]
            others = [user for user in users if user != attention.operation]
            if not all(attention.operation.is_before_in_block(user) for user in others):
                continue
            out, *caches = body.create(
                ROPE_ATTENTION, update.operands, {**update.attrs, **attrs}, before=attention, of=[update, attention]
            )
            body.replace(attention, [out])
            body.replace(update, [q, *caches])
