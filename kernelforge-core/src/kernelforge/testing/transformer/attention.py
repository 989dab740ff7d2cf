"""Attention, RoPE, and both with caches."""

from __future__ import annotations

from kernelforge.dialects.transformer import rope_cache
from kernelforge.op import OpDef
from kernelforge.problem import Attr, Problem, TensorType
from kernelforge.testing import edges
from kernelforge.testing.families import SIZES, Choice, Family
from kernelforge.testing.transformer.common import FLOATS, WEIGHTED, made, types_of


def _attention(op: OpDef, c: Choice) -> Problem:
    dtype, kv = types_of(c)
    groups, size, tokens, keys = c["groups"], c["head_dim"], c["tokens"], c["keys"]
    q = (tokens, groups * c["ratio"], size)
    attrs = {name: c[name] for name in ("causal", "scale", "window", "softcap")}
    positions = slots = lengths = None
    if c["form"] == "cache":
        memory = TensorType((c["slots"], keys, groups, size), kv)
        positions = slots = TensorType((tokens,), "i32")
        lengths = None if c["causal"] else TensorType((c["slots"],), "i32")
    else:
        batch = (c["slots"],) if c["form"] == "batched" else ()
        q = (*batch, *q)
        keys = keys if isinstance(tokens, str) else keys + tokens
        memory = TensorType((*batch, keys, groups, size), kv)
        lengths = TensorType(batch or (1,), "i32") if c["lengths"] else None
    return op.problem([TensorType(q, dtype), memory, memory, positions, slots, lengths], attrs)


ATTENTION = Family(
    {
        "dtype": (*WEIGHTED, "f32*q8"),
        "form": ("cache", "dense", "batched"),
        "causal": (True, False),
        "window": (0, 1, 9),
        "softcap": (0.0, 5.0),
        "scale": (0.0, 0.3),
        "lengths": (False, True),
        "ratio": (4, 1, 2, 3, 7, 8),
        "head_dim": (64, 32, 80, 96, 128, 256, 5),
    },
    _attention,
    {"tokens": SIZES, "keys": (40, 1, 2, 31, 32, 33, 130), "groups": (2, 1), "slots": (2, 1, 3)},
    tiled=("keys",),
    dynamic="tokens",
    zero=("tokens",),
    extremes={"long": {"tokens": 2, "keys": 2048, "ratio": 1, "groups": 1, "head_dim": 32}},
    values={"hidden": edges.hidden, "masked": edges.masked, "ends": edges.ends},
)


_SCALINGS: dict[str, dict[str, Attr]] = {
    "none": {},
    "linear": {"scaling": "linear", "factor": 4.0},
    "llama3": {"scaling": "llama3", "factor": 8.0, "original_max_position": 256},
}


def _rope(op: OpDef, c: Choice) -> Problem:
    size = c["head_dim"]
    rotary: int = {"all": 0, "part": size // 4 * 2}[c["rotary"]]
    attrs: dict[str, Attr] = {"theta": c["theta"], "interleaved": c["interleaved"], "rotary_dim": rotary}
    attrs.update(_SCALINGS[c["scaling"]])
    t = TensorType((c["tokens"], c["heads"], size), c["dtype"])
    return made(op, [t, TensorType((c["tokens"],), "i32")], max_position=c["max_position"], **attrs)


ROPE = Family(
    {
        "dtype": FLOATS,
        "interleaved": (False, True),
        "rotary": ("all", "part"),
        "scaling": ("none", "linear", "llama3"),
        "theta": (10000.0, 500000.0),
        "max_position": (1024, 131072),
        "head_dim": (64, 4, 6, 32, 80, 96, 128, 256),
    },
    _rope,
    {"tokens": SIZES, "heads": (3, 1, 8)},
    dynamic="tokens",
    zero=("tokens",),
    values={"ends": edges.first_and_last_positions, "spoilt-padding": edges.spoilt_padding},
)


def _rope_cache_update(op: OpDef, c: Choice) -> Problem:
    x, cache = types_of(c)
    size, places = c["head_dim"], TensorType((c["tokens"],), "i32")
    rotary: int = {"all": 0, "part": size // 4 * 2}[c["rotary"]]
    new = TensorType((c["tokens"], c["groups"], size), x)
    memory = TensorType((c["slots"], c["capacity"], c["groups"], size), cache)
    q = TensorType((c["tokens"], c["groups"] * c["queries"], size), x)
    attrs = {"rotary_dim": rotary, "interleaved": c["interleaved"], "theta": 500.0, "max_position": 1024}
    return op.problem([q, new, new, memory, memory, places, places], {**attrs, **_SCALINGS[c["scaling"]]})


ROPE_CACHE_UPDATE = Family(
    {
        "dtype": (*WEIGHTED, "bf16*f32", "f32*q8", "f16*q8"),
        "interleaved": (False, True),
        "rotary": ("all", "part"),
        "scaling": ("none", "linear", "llama3"),
        "head_dim": (64, 32, 4, 6, 80, 96, 128),
    },
    _rope_cache_update,
    {"tokens": SIZES, "groups": (2, 1, 3), "queries": (3, 1, 2), "slots": (3, 1, 2), "capacity": (40, 1, 7)},
    dynamic="tokens",
    zero=("tokens",),
    values={"spoilt-padding": edges.spoilt_padding},
)


def _rope_attention(op: OpDef, c: Choice) -> Problem:
    plain = _rope_cache_update(rope_cache.ROPE_CACHE_UPDATE, c)
    attrs = {**dict(plain.attrs), **{name: c[name] for name in ("scale", "window", "softcap")}}
    return op.problem(plain.operands, attrs)


ROPE_ATTENTION = Family(
    {
        **ROPE_CACHE_UPDATE.factors,
        "dtype": (*WEIGHTED, "f32*q8"),
        "window": (0, 1, 9),
        "softcap": (0.0, 5.0),
        "scale": (0.0, 0.3),
    },
    _rope_attention,
    {**ROPE_CACHE_UPDATE.sizes, "tokens": (1, 2, 7), "capacity": (40, 1, 7, 130, 300), "queries": (4, 1, 2, 3, 8)},
    dynamic="tokens",
    zero=("tokens",),
    values={"hidden": edges.hidden_caches, "last": edges.last_position, "padding": edges.padding},
)
"""One token is what kernels for the whole take."""
