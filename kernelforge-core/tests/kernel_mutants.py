"""Kernels that are honest, and kernels that each have one plausible flaw, with the kind of failure that must name it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mutant_target import TILES, Array, Call, Kernel, Plugin, honest, variant
from numpy.lib.stride_tricks import as_strided

from kernelforge.testing.case import Kind
from kernelforge.variant import KernelVariant

F32 = np.float32


def f32(call: Call, index: int) -> Array:
    return call.operand(index).astype(F32)


# --- honest kernels, in f32 arithmetic ---


def matmul(call: Call) -> None:
    if call.problem.attr("epilogue") != "none" or call.problem.operand(1).quantised:
        return honest(call)
    lhs, rhs = f32(call, 0), f32(call, 1)
    lhs = lhs.swapaxes(-1, -2) if call.problem.attr("transpose_lhs") else lhs
    rhs = rhs.swapaxes(-1, -2) if call.problem.attr("transpose_rhs") else rhs
    out = lhs @ rhs
    for extra in call.operands[2:]:
        out = out if extra is None else out + extra.astype(F32)
    return call.write([out])


def softmax(call: Call) -> None:
    x, axis = f32(call, 0), call.problem.attr("axis")
    assert isinstance(axis, int)
    if x.size:
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        call.write([e / e.sum(axis=axis, keepdims=True)])


def rms_norm(call: Call) -> None:
    x, eps = f32(call, 0), F32(str(call.problem.attr("eps")))
    call.write([x / np.sqrt((x * x).mean(axis=-1, keepdims=True, dtype=F32) + eps) * f32(call, 1)])


def silu(call: Call) -> None:
    x = f32(call, 0)
    call.write([x * (F32(0.5) + F32(0.5) * np.tanh(F32(0.5) * x))])


def gelu(call: Call) -> None:
    if call.problem.attr("approximate") == "tanh":
        return honest(call)
    x = f32(call, 0)
    erf = np.array([math.erf(v) for v in (x / F32(math.sqrt(2))).ravel()], F32).reshape(x.shape)
    return call.write([F32(0.5) * x * (F32(1) + erf)])


def rope(call: Call) -> None:
    if call.problem.attr("scaling") != "none" or call.problem.attr("interleaved"):
        return honest(call)
    x, positions = f32(call, 0), call.operand(1)
    rotary = int(str(call.problem.attr("rotary_dim"))) or x.shape[-1]
    frequencies = float(str(call.problem.attr("theta"))) ** (-np.arange(0, rotary, 2) / rotary)
    # float64: f32 loses what is left of the turns at far positions
    angles = np.maximum(positions, 0)[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None].astype(F32), np.sin(angles)[:, None].astype(F32)
    out, half = x.copy(), rotary // 2
    out[..., :half] = x[..., :half] * cos - x[..., half:rotary] * sin
    out[..., half:rotary] = x[..., half:rotary] * cos + x[..., :half] * sin
    return call.write([out])


HONEST: dict[str, Kernel] = {
    "matmul": matmul,
    "glu_matmul": honest,
    "attention": honest,
    "softmax": softmax,
    "rms_norm": rms_norm,
    "layer_norm": honest,
    "rope": rope,
    "silu": silu,
    "gelu": gelu,
    "kv_cache_update": honest,
    "embedding": honest,
    "argmax": honest,
    "cast": honest,
    "concat": honest,
}


# --- mutants ---


def changed(**attrs: Any) -> Kernel:
    """Other attributes than those asked for."""
    return lambda call: call.write(call.evaluate(**attrs))


def operand(index: int, change: Callable[[Call, Array], Array]) -> Kernel:
    """Another operand than the one given, where there is one."""

    def kernel(call: Call) -> None:
        given = call.operands[index] if index < len(call.operands) else None
        call.write(call.evaluate({} if given is None else {index: change(call, given)}))

    return kernel


def after(change: Callable[[Call], None]) -> Kernel:
    """Right results, and then something done to them."""

    def kernel(call: Call) -> None:
        honest(call)
        change(call)

    return kernel


def uniform_attention(call: Call) -> None:
    call.write(call.evaluate({0: np.zeros_like(call.operand(0))}))


def wrong_groups(call: Call) -> None:
    """Head h uses kv head h % G, not h // (H / G)."""
    q = call.operand(0)
    heads, groups = q.shape[-2], call.operand(1).shape[-2]
    order = [h * groups % heads + h * groups // heads for h in range(heads)] if heads else []
    (out,) = call.evaluate({0: q[..., order, :]})
    call.results[0][..., order, :] = out


def sees_hidden(call: Call) -> None:
    """0 times a value that was never written."""
    honest(call)
    if call.operand(2).size and np.isnan(call.operand(2).astype(F32)).any():
        call.results[0][...] += np.asarray(0.0 * call.operand(2).astype(F32).sum(), call.results[0].dtype)


def padding_computed(call: Call) -> None:
    positions = call.operands[3]
    call.write(call.evaluate({} if positions is None else {3: np.maximum(positions, 0)}))


def no_max(call: Call) -> None:
    x, axis = f32(call, 0), call.problem.attr("axis")
    assert isinstance(axis, int)
    e = np.exp(x)
    call.write([e / e.sum(axis=axis, keepdims=True)])


def sample_variance(call: Call) -> None:
    """Divides by N - 1."""
    x, n = f32(call, 0), call.operand(0).shape[-1]
    scale = np.sqrt(F32(n / max(n - 1, 1)))
    bias = None if call.operands[2] is None else f32(call, 2)
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + F32(str(call.problem.attr("eps"))))
    out = centred / (spread * scale) * f32(call, 1)
    call.write([out if bias is None else out + bias])


def centred_rms(call: Call) -> None:
    x = f32(call, 0)
    call.write(call.evaluate({0: (x - x.mean(axis=-1, keepdims=True)).astype(call.operand(0).dtype)}))


def row_above(call: Call) -> None:
    """Rows from the second on are those above them."""
    (out,) = call.evaluate()
    call.write([np.concatenate([out[:1], out[:-1]])])


def last_column_unwritten(call: Call) -> None:
    (out,) = call.evaluate()
    call.results[0][..., :-1] = out[..., :-1]


def beyond_the_end(call: Call) -> None:
    honest(call)
    out = call.results[0]
    if out.size:
        as_strided(out.reshape(-1)[-1:], (2,), out.strides[-1:])[1] = 0


def before_the_start(call: Call) -> None:
    honest(call)
    out = call.results[0]
    if out.size:
        as_strided(out.reshape(-1)[:1], (2,), (-out.itemsize,))[1] = 0


def as_if_contiguous(call: Call) -> None:
    """Reads its first operand row after row, whatever its strides."""
    x = call.operand(0)
    call.write(call.evaluate({0: as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)}))


def f16_sums(call: Call) -> None:
    if call.problem.operand(1).quantised or call.problem.attr("epilogue") != "none":
        return honest(call)
    lhs, rhs = call.operand(0), call.operand(1)
    lhs = lhs.swapaxes(-1, -2) if call.problem.attr("transpose_lhs") else lhs
    rhs = rhs.swapaxes(-1, -2) if call.problem.attr("transpose_rhs") else rhs
    total = np.zeros(call.results[0].shape, np.float16)
    for k in range(lhs.shape[-1]):
        total += (lhs[..., k, None].astype(F32) * rhs[..., None, k, :].astype(F32)).astype(np.float16)
    out = total.astype(F32)
    for extra in call.operands[2:]:
        out = out if extra is None else out + extra.astype(F32)
    return call.write([out])


def bf16_products(call: Call) -> None:
    """Operands rounded to 8 bits."""
    import ml_dtypes

    lhs = call.operand(0)
    call.write(call.evaluate({0: lhs.astype(ml_dtypes.bfloat16).astype(lhs.dtype)}))


def wrong_for_one_row(call: Call) -> None:
    honest(call)
    if call.results[0].ndim > 1 and call.results[0].shape[-2] == 1 and call.results[0].shape[-1]:
        call.results[0][..., -1] = 0


def one_matrix_for_all(call: Call) -> None:
    """Of a batch of right matrices, the first is taken for all."""
    rhs = call.operand(1)
    batched = rhs.ndim == 3 and not call.problem.operand(1).quantised
    call.write(call.evaluate({1: np.broadcast_to(rhs[:1], rhs.shape)} if batched else {}))


def lost_tail(call: Call) -> None:
    """Sums over whole vectors of 8 only."""
    axis = -2 if call.problem.attr("transpose_lhs") else -1
    lhs = call.operand(0).copy()
    whole = lhs.shape[axis] // 8 * 8
    if axis == -1:
        lhs[..., whole:] = 0
    else:
        lhs[..., whole:, :] = 0
    call.write(call.evaluate({0: lhs}))


def mutates(call: Call) -> None:
    """Scales its operand in place and does not undo it."""
    honest(call)
    if call.operand(0).flags.writeable:
        call.operand(0)[...] = 0


def by_pointer(call: Call) -> None:
    """Keeps what it computed for an address."""
    key = (call.operand(0).ctypes.data, call.operand(0).shape)
    if key not in call.state:
        call.state[key] = call.evaluate()
    call.write(call.state[key])


def stale(call: Call) -> None:
    """Answers with the results before these."""
    found = call.evaluate()
    last = call.state.get("last")
    call.state["last"] = found
    call.write(last if last and [a.shape for a in last] == [a.shape for a in found] else found)


def adds_to_result(call: Call) -> None:
    """Takes for granted that the result starts as zeros."""
    with np.errstate(all="ignore"):
        call.results[0][...] += call.evaluate()[0]


def random_order(call: Call) -> None:
    """Another last bit at every call."""
    call.state["calls"] = call.state.get("calls", 0) + 1
    (out,) = call.evaluate()
    if call.state["calls"] % 2:
        out = np.nextafter(out, np.inf, dtype=out.dtype) if out.dtype == F32 else out
    call.write([out])


def bias_after_activation(call: Call) -> None:
    bias = call.operands[2]
    (out,) = call.evaluate({2: None})
    call.write([out if bias is None else out.astype(F32) + bias.astype(F32)])


def residual_before_activation(call: Call) -> None:
    """act(x + residual) for act(x) + residual."""
    from kernelforge.dialects.transformer.activation import activate

    residual = call.operands[3]
    (plain,) = call.evaluate({3: None}, epilogue="none")
    total = plain.astype(np.float64) + (0.0 if residual is None else residual.astype(np.float64))
    call.write([activate(call.problem.attr("epilogue"), total)])


def no_nan(call: Call) -> None:
    honest(call)
    call.results[0][...] = np.nan_to_num(call.results[0].astype(F32)).astype(call.results[0].dtype)


def last_of_ties(call: Call) -> None:
    x = call.operand(0).astype(np.float64)
    call.write([x.shape[-1] - 1 - np.argmax(x[..., ::-1], axis=-1)])


def nan_is_small(call: Call) -> None:
    x = call.operand(0).astype(np.float64)
    call.write([np.argmax(np.where(np.isnan(x), -np.inf, x), axis=-1)])


def truncates(call: Call) -> None:
    """Cuts the lower half of an f32 off where it must be rounded."""
    if call.operand(0).dtype == F32 and call.problem.results[0].dtype == "bf16":
        bits = call.operand(0).view(np.uint32) & np.uint32(0xFFFF0000)
        return call.write([bits.view(F32)])
    return honest(call)


def writes_padding(call: Call) -> None:
    """Position -1 is the last one."""
    capacity = call.operand(0).shape[1]
    places = call.operand(2)
    call.write(call.evaluate({2: np.where(places < 0, capacity - 1, places).astype(np.int32)}))


def forgets_cache(call: Call) -> None:
    (out,) = call.evaluate()
    kept = out == call.operand(0)
    call.results[0][...] = np.where(kept, np.zeros_like(out), out)


def by_threads(call: Call) -> None:
    """The rows that a seventh thread would do are not done well."""
    honest(call)
    if call.info.threads == 7 and call.results[0].size:
        call.results[0].reshape(-1)[-1] = 0.5


def by_config(call: Call) -> None:
    honest(call)
    if call.config.get("tile") == 8 and call.results[0].size:
        call.results[0].reshape(-1)[-1] = 0.5


def first_size(call: Call) -> None:
    """Does as many rows as it was first called with."""
    rows = call.state.setdefault("rows", call.results[0].shape[0])
    (out,) = call.evaluate()
    call.results[0][:rows] = out[:rows]


def one_too_many(call: Call) -> None:
    call.instead = [np.concatenate([out, out[:1]]) for out in call.evaluate()]


def wide(call: Call) -> None:
    call.instead = [out.astype(np.float64) for out in call.evaluate()]


def elsewhere(call: Call) -> None:
    call.instead = [out.copy() for out in call.evaluate()]


def raises(call: Call) -> None:
    if call.operand(0).shape[0] > 1:
        raise ZeroDivisionError("no rows left")
    honest(call)


def crashes(call: Call) -> None:
    os.abort()


def hangs(call: Call) -> None:
    time.sleep(600)


def dense_causal_shift(by: int) -> Kernel:
    """A mask that is off by one: shift the positions of cached queries."""

    def shifted(call: Call, positions: Array) -> Array:
        capacity = call.operand(1).shape[1]
        moved = np.clip(positions + by, 0, capacity - 1).astype(np.int32)
        return np.where(positions < 0, positions, moved)

    return operand(3, shifted)


MUTANTS: list[tuple[str, str, Kernel, Kind]] = [
    ("no-scale", "attention", changed(scale=1.0), "wrong-values"),
    ("uniform-weights", "attention", uniform_attention, "wrong-values"),
    ("sees-one-more", "attention", dense_causal_shift(1), "wrong-values"),
    ("misses-itself", "attention", dense_causal_shift(-1), "wrong-values"),
    (
        "never-causal",
        "attention",
        operand(3, lambda c, p: np.where(p < 0, p, c.operand(1).shape[1] - 1)),
        "wrong-values",
    ),
    ("heads-by-remainder", "attention", wrong_groups, "wrong-values"),
    ("no-window", "attention", changed(window=0), "wrong-values"),
    ("no-softcap", "attention", changed(softcap=0.0), "wrong-values"),
    ("one-slot", "attention", operand(4, lambda c, s: np.zeros_like(s)), "wrong-values"),
    ("whole-lengths", "attention", operand(5, lambda c, n: np.full_like(n, c.operand(1).shape[-3])), "wrong-values"),
    ("reads-hidden", "attention", sees_hidden, "wrong-values"),
    ("padding-computed", "attention", padding_computed, "wrong-values"),
    ("no-max", "softmax", no_max, "wrong-values"),
    ("always-last-axis", "softmax", changed(axis=-1), "wrong-values"),
    ("sample-variance", "layer_norm", sample_variance, "wrong-values"),
    ("no-bias", "layer_norm", operand(2, lambda c, b: np.zeros_like(b)), "wrong-values"),
    ("no-eps", "rms_norm", changed(eps=0.0), "wrong-values"),
    ("centred", "rms_norm", centred_rms, "wrong-values"),
    ("row-above", "rms_norm", row_above, "wrong-values"),
    ("other-direction", "rope", operand(1, lambda c, p: np.where(p < 0, p, -p)), "wrong-values"),
    ("neighbours", "rope", changed(interleaved=True), "wrong-values"),
    ("whole-head", "rope", changed(rotary_dim=0), "wrong-values"),
    ("padding-rotated", "rope", operand(1, lambda c, p: np.abs(p).astype(np.int32)), "wrong-values"),
    ("no-scaling", "rope", changed(scaling="none"), "wrong-values"),
    ("last-column-unwritten", "matmul", last_column_unwritten, "not-written"),
    ("beyond-the-end", "matmul", beyond_the_end, "out-of-bounds"),
    ("before-the-start", "silu", before_the_start, "out-of-bounds"),
    ("as-if-contiguous", "silu", as_if_contiguous, "wrong-values"),
    ("f16-sums", "matmul", f16_sums, "wrong-values"),
    ("bf16-operands", "matmul", bf16_products, "wrong-values"),
    ("wrong-for-one-row", "matmul", wrong_for_one_row, "wrong-values"),
    ("one-matrix-for-all", "matmul", one_matrix_for_all, "wrong-values"),
    ("lost-tail", "matmul", lost_tail, "wrong-values"),
    ("mutates-input", "matmul", mutates, "input-mutated"),
    ("by-pointer", "silu", by_pointer, "wrong-values"),
    ("stale-output", "silu", stale, "wrong-values"),
    ("adds-to-result", "silu", adds_to_result, "wrong-values"),
    ("random-order", "silu", random_order, "not-deterministic"),
    ("bias-after-activation", "matmul", bias_after_activation, "wrong-values"),
    ("residual-before-activation", "matmul", residual_before_activation, "wrong-values"),
    ("no-epilogue", "matmul", changed(epilogue="none"), "wrong-values"),
    ("always-silu", "glu_matmul", changed(activation="silu"), "wrong-values"),
    ("nan-to-zero", "silu", no_nan, "wrong-values"),
    ("always-tanh", "gelu", changed(approximate="tanh"), "wrong-values"),
    ("last-of-ties", "argmax", last_of_ties, "wrong-values"),
    ("nan-is-small", "argmax", nan_is_small, "wrong-values"),
    ("truncates", "cast", truncates, "wrong-values"),
    ("writes-padding", "kv_cache_update", writes_padding, "wrong-values"),
    ("forgets-cache", "kv_cache_update", forgets_cache, "wrong-values"),
    ("next-id", "embedding", operand(1, lambda c, i: np.maximum(i - 1, 0)), "wrong-values"),
    ("always-last", "concat", lambda c: c.write([c.evaluate()[0][..., ::-1]]), "wrong-values"),
    ("seventh-thread", "silu", by_threads, "wrong-values"),
    ("one-config", "silu", by_config, "wrong-values"),
    ("first-size", "silu", first_size, "wrong-values"),
    ("one-row-too-many", "silu", one_too_many, "wrong-shape"),
    ("float64-result", "silu", wide, "wrong-dtype"),
    ("result-elsewhere", "silu", elsewhere, "error"),
    ("raises", "silu", raises, "error"),
]
"""Name, op, kernel, and the kind of its first failure."""


def mutant_variant(name: str) -> KernelVariant:
    _, op, kernel, _ = next(m for m in MUTANTS if m[0] == name)
    more: dict[str, Any] = {"space": lambda problem, device: TILES} if name == "one-config" else {}
    return variant(name, f"transformer.{op}", kernel, **more)


CRASHING = Plugin([variant("crashes", "transformer.silu", crashes)])
HANGING = Plugin([variant("hangs", "transformer.silu", hangs)])
"""For workers, which import them by name."""
