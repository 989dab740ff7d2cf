"""The problems of the transformer dialect's ops, with the sizes that occur and those that kernels get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from kernelforge.dialects.transformer import matmul as products
from kernelforge.dialects.transformer import rope_cache
from kernelforge.dtype import ACTIVATION_FORMAT, GROUP
from kernelforge.op import OpDef
from kernelforge.problem import Attr, Problem, TensorType
from kernelforge.testing import edges, values
from kernelforge.testing.families import SIZES, Choice, Family

Operands = Sequence[TensorType | None]

FLOATS = ("f32", "bf16", "f16")
WEIGHTED = ("f32*f32", "f32*bf16", "f32*f16", "bf16*bf16", "f16*f16")
"""Activations and weights."""
QUANTISED = ("f32*q8", "f32*q4", "bf16*q8", "f16*q4", "q8a*q8", "q8a*q4")
VOCABULARY = 32768 + 7
LONG = 8192 + 3


def _types(choice: Choice) -> list[str]:
    return str(choice["dtype"]).split("*")


def _made(op: OpDef, operands: Operands, **attrs: Attr) -> Problem:
    return op.problem(operands, attrs)


def _whole_groups(size: int, dtype: str) -> int:
    """A quantised row has whole groups."""
    return -(-size // GROUP) * GROUP if dtype in ("q8", "q4") else size


def _matmul(op: OpDef, c: Choice) -> Problem:
    x, w = _types(c)
    batch: tuple[int, ...] = {"none": (), "shared": (2,), "own": (3,), "nested": (2, 3)}[c["batch"]]
    m, n, k = c["m"], c["n"], _whole_groups(c["k"], w)
    constant = c["constant"] or w in ("q8", "q4")
    lhs = (*batch, k, m) if c["transpose_lhs"] else (*batch, m, k)
    rhs = (n, k) if c["transpose_rhs"] else (k, n)
    operands = [
        TensorType(lhs, x),
        TensorType(rhs if c["batch"] == "shared" else (*batch, *rhs), w, constant=constant),
        TensorType((n,), "f32" if w in ("q8", "q4") else w, constant=c["constant"]) if c["bias"] else None,
        TensorType((*batch, m, n), "f32" if x == "q8a" else x) if c["residual"] else None,
    ]
    attrs = {name: c[name] for name in ("transpose_lhs", "transpose_rhs", "epilogue")}
    return op.problem(operands, attrs)


MATMUL = Family(
    {
        "dtype": (*WEIGHTED, *QUANTISED),
        "constant": (True, False),
        "transpose_rhs": (True, False),
        "transpose_lhs": (False, True),
        "epilogue": ("none", "silu", "gelu", "gelu_tanh"),
        "bias": (False, True),
        "residual": (False, True),
        "batch": ("none", "shared", "own", "nested"),
    },
    _matmul,
    {"m": SIZES, "n": (17, 1, 2, 3, 7, 31, 33, 64, 129), "k": (33, 1, 2, 3, 7, 16, 31, 64, 127, 300)},
    tiled=("m", "n", "k"),
    dynamic="m",
    zero=("m", "n", "k"),
    extremes={
        "vocabulary": {"m": 1, "n": VOCABULARY, "k": 24, "dtype": "f32*bf16"},
        "long-k": {"m": 3, "n": 5, "k": LONG},
        "long-k-16-bit": {"m": 3, "n": 5, "k": 4096, "dtype": "f16*f16"},
        "long-k-4-bit": {"m": 3, "n": 5, "k": LONG, "dtype": "f32*q4"},
        "long-k-integer": {"m": 3, "n": 5, "k": LONG, "dtype": "q8a*q4"},
    },
)


def _glu(op: OpDef, c: Choice) -> Problem:
    x, w = _types(c)
    k = _whole_groups(c["k"], w)
    constant = c["constant"] or w in ("q8", "q4")
    rhs = TensorType((c["n"], k) if c["transpose_rhs"] else (k, c["n"]), w, constant=constant)
    shape = (2, c["m"], k) if c["batched"] else (c["m"], k)
    attrs = {name: c[name] for name in ("transpose_rhs", "activation")}
    return op.problem([TensorType(shape, x), rhs, rhs], attrs)


GLU_MATMUL = Family(
    {
        "dtype": (*WEIGHTED, *QUANTISED),
        "constant": (True, False),
        "transpose_rhs": (True, False),
        "activation": ("silu", "gelu", "gelu_tanh"),
        "batched": (False, True),
    },
    _glu,
    MATMUL.sizes,
    tiled=("m", "n", "k"),
    dynamic="m",
    zero=("m", "n", "k"),
    extremes={"long-k": {"m": 2, "n": 3, "k": LONG}},
)


def _attention(op: OpDef, c: Choice) -> Problem:
    dtype, kv = _types(c)
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
        "dtype": WEIGHTED,
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

NORM_VALUES = {"small-variance": edges.small_variance}


def _normed(family: Family, product: OpDef) -> Family:
    """Of the op that multiplies, as `product` does, rows that it normalises first."""

    def make(op: OpDef, c: Choice) -> Problem:
        plain = family.make(product, {**c, "transpose_lhs": False})
        lhs, *others = plain.operands
        gain = TensorType(plain.operand(0).shape[-1:], c["gain"], constant=c["constant"])
        attrs = {name: value for name, value in plain.attrs if name != "transpose_lhs"}
        return op.problem([lhs, gain, *others], {**attrs, "eps": c["eps"]})

    factors = {name: values for name, values in family.factors.items() if name != "transpose_lhs"}
    factors["dtype"] = [types for types in factors["dtype"] if not types.startswith(ACTIVATION_FORMAT)]
    return replace(
        family,
        factors={**factors, "gain": FLOATS, "eps": (1e-5, 1e-2)},
        make=make,
        zero=("m", "n"),
        extremes={
            "long-k": {"m": 3, "n": 5, "k": LONG},
            "long-k-4-bit": {"m": 3, "n": 5, "k": LONG, "dtype": "f32*q4"},
        },
        values=NORM_VALUES,
    )


def _rows(c: Choice) -> tuple[int, ...]:
    leading: tuple[int, ...] = {1: (), 2: (c["rows"],), 3: (c["rows"], 3)}[c["rank"]]
    return (*leading, c["n"])


def _norm(op: OpDef, c: Choice) -> Problem:
    x, w = _types(c)
    t, weight = TensorType(_rows(c), x), TensorType((c["n"],), w, constant=c["constant"])
    operands: Operands = [t, weight]
    if op.name == "add_rms_norm":
        operands = [t, t, weight]
    elif op.name == "layer_norm":
        operands = [t, weight, weight if c["bias"] else None]
    return _made(op, operands, eps=c["eps"])


ROWS = {"rows": SIZES, "n": (64, 1, 2, 7, 31, 33, 127, 257, 576)}

NORM = Family(
    {
        "dtype": WEIGHTED,
        "rank": (2, 1, 3),
        "constant": (True, False),
        "bias": (True, False),
        "eps": (1e-5, 1e-6),
    },
    _norm,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"long": {"rows": 2, "n": LONG}},
    values=NORM_VALUES,
)


def _norm_quantize(op: OpDef, c: Choice) -> Problem:
    return _norm(op, {**c, "n": _whole_groups(c["n"], "q8")})


NORM_QUANTIZE = replace(NORM, make=_norm_quantize, factors={k: v for k, v in NORM.factors.items() if k != "bias"})


def _softmax(op: OpDef, c: Choice) -> Problem:
    return _made(op, [TensorType(_rows(c), c["dtype"])], axis=c["axis"])


SOFTMAX = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3), "axis": (-1, 0, 1)},
    _softmax,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={"masked": edges.masked_logits},
)

ARGMAX = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3)},
    lambda op, c: _made(op, [TensorType(_rows(c), c["dtype"])]),
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={"masked": edges.masked_logits, "signed-zeros": edges.signed_zeros},
)


def _sample(op: OpDef, c: Choice) -> Problem:
    each = TensorType((c["rows"],), "f32")
    logits = TensorType((c["rows"], c["n"]), c["dtype"])
    return _made(op, [logits, each, TensorType((c["rows"],), "i32"), each, each, each])


SAMPLE = Family(
    {"dtype": FLOATS},
    _sample,
    ROWS,
    tiled=("n",),
    dynamic="rows",
    zero=("rows",),
    extremes={"vocabulary": {"rows": 2, "n": VOCABULARY}},
    values={name: edges.drawn(name) for name in (*values.ALL, *values.FIRST, "masked")},
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
    return _made(op, [t, TensorType((c["tokens"],), "i32")], max_position=c["max_position"], **attrs)


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
    values={"ends": edges.first_and_last_positions},
)


def _unary(op: OpDef, c: Choice) -> Problem:
    attrs = {"approximate": c["approximate"]} if op.name == "gelu" else {}
    return op.problem([TensorType(_rows(c), c["dtype"])], attrs)


UNARY = Family(
    {"dtype": FLOATS, "rank": (2, 1, 3), "approximate": ("none", "tanh")},
    _unary,
    {"rows": SIZES, "n": (33, 1, 2, 7, 31, 64, 127, 1000)},
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
    extremes={"long": {"rank": 1, "n": 100_003}},
)


def _binary(op: OpDef, c: Choice) -> Problem:
    m, n = c["rows"], c["n"]
    shapes = {
        "same": ((m, n), (m, n)),
        "row": ((m, n), (n,)),
        "column": ((m, n), (m, 1)),
        "scalar": ((m, n), ()),
        "both": ((m, 1, n), (3, 1)),
        "wider": ((n,), (m, n)),
    }
    types = _types(c)
    return _made(op, [TensorType(shape, dtype) for shape, dtype in zip(shapes[c["shapes"]], types, strict=True)])


BINARY = Family(
    {"dtype": (*WEIGHTED, "bf16*f32"), "shapes": ("same", "row", "column", "scalar", "both", "wider")},
    _binary,
    UNARY.sizes,
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
)

CAST = Family(
    {"dtype": (*FLOATS, "f64", "i32", "i64", "i8"), "to": (*FLOATS, "f64", "i32", "i64", "i8"), "rank": (2, 1, 3)},
    lambda op, c: _made(op, [TensorType(_rows(c), c["dtype"])], dtype=c["to"]),
    UNARY.sizes,
    tiled=("n",),
    dynamic="rows",
    zero=("rows", "n"),
    values={"halfway": edges.halfway},
)


def _embedding(op: OpDef, c: Choice) -> Problem:
    dtype = c["dtype"]
    table = TensorType(
        (c["vocabulary"], _whole_groups(c["n"], dtype)), dtype, constant=c["constant"] or dtype[0] == "q"
    )
    return _made(op, [table, TensorType((c["tokens"],), "i32")], dtype=c["to"])


EMBEDDING = Family(
    {"dtype": (*FLOATS, "q8", "q4"), "to": ("f32", "", "bf16", "f16"), "constant": (True, False)},
    _embedding,
    {"tokens": SIZES, "n": (33, 1, 7, 64, 127), "vocabulary": (50, 1, 300)},
    tiled=("n",),
    dynamic="tokens",
    zero=("tokens",),
    extremes={"vocabulary": {"tokens": 3, "n": 16, "vocabulary": VOCABULARY}},
    values={"ends": edges.first_and_last_ids},
)


def _kv_cache_update(op: OpDef, c: Choice) -> Problem:
    new, cache = _types(c)
    row = (c["groups"], c["head_dim"])
    places = TensorType((c["tokens"],), "i32")
    memory = TensorType((c["slots"], c["capacity"], *row), cache)
    return _made(op, [memory, TensorType((c["tokens"], *row), new), places, places])


KV_CACHE_UPDATE = Family(
    {"dtype": (*WEIGHTED, "bf16*f32", "f32*q8", "f16*q8"), "head_dim": (64, 32, 80, 128, 5)},
    _kv_cache_update,
    {"tokens": SIZES, "groups": (2, 1, 3), "slots": (3, 1, 2), "capacity": (40, 1, 7)},
    dynamic="tokens",
    zero=("tokens",),
)


def _rope_cache_update(op: OpDef, c: Choice) -> Problem:
    x, cache = _types(c)
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
)


def _rope_attention(op: OpDef, c: Choice) -> Problem:
    plain = _rope_cache_update(rope_cache.ROPE_CACHE_UPDATE, c)
    attrs = {**dict(plain.attrs), **{name: c[name] for name in ("scale", "window", "softcap")}}
    return op.problem(plain.operands, attrs)


ROPE_ATTENTION = Family(
    {
        **ROPE_CACHE_UPDATE.factors,
        "dtype": WEIGHTED,
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

ALL_TYPES = (*FLOATS, "i32", "f64", "i64", "i8")


def _box(c: Choice) -> TensorType:
    return TensorType((c["rows"], *{2: (c["n"],), 3: (2, c["n"]), 4: (2, 3, c["n"])}[c["rank"]]), c["dtype"])


def _reshape(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    inner = prod(t.static_shape({"tokens": 1})[1:])
    shape = {"rows": (-1, inner), "flat": (-1,), "split": (-1, 1, inner)}[c["shape"]]
    return _made(op, [t], shape=shape)


def _transpose(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axes = list(range(t.rank))
    perm = {"reversed": axes[::-1], "swapped": [1, 0, *axes[2:]], "last": [*axes[:-2], axes[-1], axes[-2]]}[c["perm"]]
    return _made(op, [t], perm=tuple(perm))


def _slice(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    start = min(1, c["n"] - 1)
    size = {"rest": -1, "one": 1}[c["size"]]
    whole = t.rank - 1
    return _made(op, [t], starts=(*[0] * whole, start), sizes=(*[-1] * whole, size))


def _split(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axis = -1 if c["axis"] == "last" else 1
    extent = t.static_shape({"tokens": 1})[axis]
    third = extent // 3
    return _made(op, [t], axis=axis, sizes=(third, extent - 2 * third, third) if c["pieces"] == 3 else (extent,))


def _concat(op: OpDef, c: Choice) -> Problem:
    t = _box(c)
    axis = t.rank - 1 if c["axis"] == "last" else 1
    others = [TensorType((*t.shape[:axis], n, *t.shape[axis + 1 :]), c["dtype"]) for n in (1, 5)]
    return _made(op, [t, *others[: c["pieces"] - 1]], axis=axis)


def _moving(make: str, **factors: Sequence[object]) -> Family:
    return Family(
        {"dtype": ALL_TYPES, "rank": (2, 3, 4), **factors},
        {"reshape": _reshape, "transpose": _transpose, "slice": _slice, "split": _split, "concat": _concat}[make],
        {"rows": SIZES, "n": (33, 1, 2, 7, 31, 64, 127)},
        dynamic="rows",
        zero=("rows",),
    )


FAMILIES = {
    f"transformer.{name}": family
    for name, family in {
        "matmul": MATMUL,
        "glu_matmul": GLU_MATMUL,
        "rms_norm_matmul": _normed(MATMUL, products.MATMUL),
        "rms_norm_glu_matmul": _normed(GLU_MATMUL, products.GLU_MATMUL),
        "attention": ATTENTION,
        "softmax": SOFTMAX,
        "rms_norm": NORM,
        "rms_norm_quantize": NORM_QUANTIZE,
        "layer_norm": NORM,
        "add_rms_norm": NORM,
        "rope": ROPE,
        "silu": UNARY,
        "gelu": UNARY,
        "add": BINARY,
        "mul": BINARY,
        "cast": CAST,
        "embedding": EMBEDDING,
        "kv_cache_update": KV_CACHE_UPDATE,
        "rope_cache_update": ROPE_CACHE_UPDATE,
        "rope_attention": ROPE_ATTENTION,
        "argmax": ARGMAX,
        "sample": SAMPLE,
        "reshape": _moving("reshape", shape=("rows", "flat", "split")),
        "transpose": _moving("transpose", perm=("reversed", "swapped", "last")),
        "slice": _moving("slice", size=("rest", "one")),
        "split": _moving("split", axis=("last", "second"), pieces=(3, 1)),
        "concat": _moving("concat", axis=("last", "second"), pieces=(3, 1, 2)),
    }.items()
}
"""By full name."""
