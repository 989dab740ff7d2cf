"""Quantised formats against the published quantisers written out number by number, and quantised tensors in modules."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import fake_target
import numpy as np
import pytest

from kernelforge.constant import ArraySource, Named, evaluate
from kernelforge.dialects.transformer import OPS
from kernelforge.dtype import from_numpy, to_numpy
from kernelforge.errors import AssetError, UsageError
from kernelforge.graph import Graph
from kernelforge.module import Module
from kernelforge.problem import TensorType, parse_tensor_type
from kernelforge.quant import Array, dequantize, quantize
from kernelforge.registry import Registry
from kernelforge.session import Session
from kernelforge.syntax import read_tensor, tensor_text

F32 = np.float32
FORMATS = ("q8", "q4")
each_format = pytest.mark.parametrize("dtype", FORMATS)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return fake_target.registry()


def q8_0(x: Array) -> bytes:
    """One block of Q8_0, as ggml's quantize_row_q8_0_ref makes it."""
    amax = F32(0)
    for v in x:
        amax = max(amax, abs(F32(v)))
    d = amax / F32(127)
    inverse = F32(1) / d if d else F32(0)
    values = []
    for v in x:
        scaled = float(F32(v) * inverse)
        values.append(int(math.copysign(math.floor(abs(scaled) + 0.5), scaled)))  # roundf: exact in double
    return struct.pack("<e32b", float(d), *values)


def q4_0(x: Array) -> bytes:
    """One block of Q4_0, as ggml's quantize_row_q4_0_ref makes it."""
    amax = largest = F32(0)
    for v in x:
        if amax < abs(F32(v)):
            amax, largest = abs(F32(v)), F32(v)
    d = largest / F32(-8)
    inverse = F32(1) / d if d else F32(0)
    nibbles = [min(15, int(F32(v) * inverse + F32(8.5))) for v in x]
    return struct.pack("<e16B", float(d), *(nibbles[i] | nibbles[i + 16] << 4 for i in range(16)))


SCALAR = {"q8": q8_0, "q4": q4_0}


def decoded(block: bytes, dtype: str) -> list[float]:
    scale, *values = struct.unpack("<e32b" if dtype == "q8" else "<e16B", block)
    if dtype == "q4":
        values = [v & 15 for v in values] + [v >> 4 for v in values]
        values = [v - 8 for v in values]
    return [scale * v for v in values]


def rows() -> Array:
    """Groups of every kind: normal, tiny, large, flat, one-sided, with ties of magnitude and of rounding."""
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1e-3, 1e4, 3e-6, 1e-30, 1e-2])
    normal = rng.standard_normal((40, 6, 32)) * scales[None, :, None]
    ties = rng.integers(-127, 128, (40, 32)) / 2.0
    ties[:, 0] = 127.0  # the scale is 1, so that halves stay halves
    special = [np.zeros(32), np.full(32, -0.0), np.ones(32), -np.ones(32), np.tile([8.0, -8.0], 16)]
    special += [np.abs(normal[0, 0]), -np.abs(normal[0, 0]), np.where(np.arange(32) == 31, 5.0, 0.0)]
    return np.concatenate([normal.reshape(-1, 32), ties, ties / 254, np.array(special)]).astype(np.float32)


@each_format
def test_groups_are_those_of_the_published_quantiser(dtype: str) -> None:
    x = rows()
    made = quantize(x, dtype)
    assert from_numpy(made.dtype) == dtype
    for group, found in zip(x, made.reshape(-1), strict=True):
        assert found.tobytes() == SCALAR[dtype](group), group


@each_format
def test_groups_are_those_that_the_gguf_package_makes(dtype: str) -> None:
    """Bit by bit, scales and values; `make_gguf_groups.py` tells how the file was made."""
    with np.load(Path(__file__).parent / "data" / "gguf_groups.npz") as golden:
        x, name = golden["x"], {"q8": "Q8_0", "q4": "Q4_0"}[dtype]
        made = quantize(x, dtype)
        np.testing.assert_array_equal(made.view(np.uint8).reshape(len(x), -1), golden[name])
        np.testing.assert_array_equal(dequantize(made), golden[f"{name}_numbers"])


@each_format
def test_numbers_are_those_of_the_published_format(dtype: str) -> None:
    rng = np.random.default_rng(1)
    blocks = [SCALAR[dtype](x) for x in rows()]
    blocks += [struct.pack("<e", s) + rng.bytes(to_numpy(dtype).itemsize - 2) for s in (-1.5, 6e-8, 65504.0, 0.0)]
    groups = np.frombuffer(b"".join(blocks), to_numpy(dtype))
    want = np.array([decoded(b, dtype) for b in blocks])  # in double
    np.testing.assert_array_equal(dequantize(groups.reshape(-1, 1)), want)  # float32 holds them exactly


@each_format
@pytest.mark.parametrize("source", ["f64", "f32", "bf16", "f16"])
def test_error_is_half_a_step_and_a_second_time_changes_nothing(dtype: str, source: str) -> None:
    x = np.random.default_rng(2).standard_normal((3, 5, 96)).astype(to_numpy(source))
    made = quantize(x, dtype)
    assert made.shape == (3, 5, 3)
    back = dequantize(made)
    assert back.shape == x.shape
    assert back.dtype == np.float32
    largest = np.abs(x.astype(np.float64)).reshape(3, 5, 3, 32).max(axis=-1, keepdims=True)
    error = np.abs(back - x.astype(np.float64)).reshape(3, 5, 3, 32)
    # A step is 1/127 of the largest, or 1/8: there the values end at 7 steps, a whole one from the largest's mirror.
    bound = largest / 254 if dtype == "q8" else largest / 8
    assert (error <= bound * 1.001 + largest * 2.0**-10).all()
    again = dequantize(quantize(back, dtype))
    np.testing.assert_allclose(again, back, rtol=2e-3)


@each_format
def test_layouts_that_are_not_contiguous_and_tensors_of_many_chunks(dtype: str) -> None:
    x = np.random.default_rng(3).standard_normal((96, 2600)).astype(np.float32)
    np.testing.assert_array_equal(quantize(x.T, dtype), quantize(np.ascontiguousarray(x.T), dtype))
    parts = [quantize(row[None], dtype) for row in x.T]
    np.testing.assert_array_equal(quantize(x.T, dtype), np.concatenate(parts))


@each_format
def test_what_cannot_be_quantised_is_refused(dtype: str) -> None:
    x = np.ones((2, 64), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 40] = bad
        with pytest.raises(UsageError, match=r"cannot quantise NaN or infinity \(group 3 of the tensor\)"):
            quantize(x, dtype)
    with pytest.raises(UsageError, match="numbers up to 1e\\+09: the scale does not fit float16"):
        quantize(np.full((1, 32), 1e9, np.float32), dtype)
    for shape in ((2, 33), ()):
        with pytest.raises(UsageError, match="rows must be a multiple of 32 elements"):
            quantize(np.ones(shape, np.float32), dtype)
    with pytest.raises(UsageError, match="'f16' is not a quantised format"):
        quantize(np.ones((1, 32)), "f16")
    with pytest.raises(UsageError, match="'f32' is not a quantised format"):
        dequantize(np.ones((1, 32), np.float32))


@each_format
def test_numbers_below_every_scale_become_zero(dtype: str) -> None:
    """Where 1 / d overflows, the published quantisers have no defined result."""
    x = np.full((1, 32), 1e-42, np.float32)
    np.testing.assert_array_equal(dequantize(quantize(x, dtype)), np.zeros((1, 32)))


def test_no_rows_and_no_columns() -> None:
    for shape in ((0, 32), (3, 0)):
        assert dequantize(quantize(np.ones(shape), "q4")).shape == shape


# types


def test_sizes_of_quantised_types() -> None:
    q4, q8 = TensorType((3, 64), "q4"), TensorType((3, 64), "q8", constant=True)
    assert (q4.nbytes(), q8.nbytes()) == (3 * 2 * 18, 3 * 2 * 34)
    assert (q4.quantised, TensorType((3, 64), "i8").quantised) == (True, False)
    assert q8.array_shape() == (3, 2)
    assert TensorType((3, 64), "f32").array_shape() == (3, 64)
    assert parse_tensor_type(str(q8)) == q8
    with pytest.raises(UsageError, match="an element of q8 has no size of its own"):
        _ = q8.itemsize


@pytest.mark.parametrize("text", ["q4[3,33]", "q4[]", "q4[3,n]", "q8[31]"])
def test_rows_of_quantised_types_are_whole_groups(text: str) -> None:
    with pytest.raises(UsageError, match="rows that are no multiple of 32 elements"):
        parse_tensor_type(text)


def test_quantised_types_have_no_strides() -> None:
    with pytest.raises(UsageError, match="cannot have strides"):
        parse_tensor_type("q4[2,32]:[64,1]")


def test_mlir_text_of_quantised_types() -> None:
    assert tensor_text((3, 64), "q4") == "tensor<3x64x!transformer.q4>"
    assert read_tensor("tensor<3x64x!transformer.q4>") == TensorType((3, 64), "q4")
    with pytest.raises(ValueError, match=r"has type tensor<3x64xq4>, must be a tensor of .*!transformer.q8"):
        read_tensor("tensor<3x64xq4>")
    for shape in ("3x33x", "3x?x", ""):
        with pytest.raises(ValueError, match="must have rows of a multiple of 32 elements"):
            read_tensor(f"tensor<{shape}!transformer.q8>")


# modules


def model(g: Graph, dtype: str) -> None:
    x, ids = g.input("x", ("tokens", 64), "f32"), g.input("ids", ("tokens",), "i32")
    w, v = (g.quantize(g.constant(name, (48, 64), "bf16"), dtype) for name in "wv")
    both = g.concat(w, v, axis=0)
    g.output(g.matmul(x, both, transpose_rhs=True), "product")
    g.output(g.glu_matmul(x, w, v, transpose_rhs=True), "gated")
    g.output(g.embedding(w, ids), "rows")
    g.output(g.embedding(w, ids, dtype="bf16"), "short")
    g.output(g.dequantize(v), "numbers")
    g.output(g.dequantize(v, "f16"), "halves")


@each_format
def test_a_module_prints_parses_back_and_computes_with_the_dequantised_numbers(dtype: str, registry: Registry) -> None:
    g = Graph()
    model(g, dtype)
    module = g.module(registry)
    text = str(module)
    assert f'{{format = "{dtype}"}} : (tensor<48x64xbf16>) -> tensor<48x64x!transformer.{dtype}>' in text
    assert f"tensor<96x64x!transformer.{dtype}>" in text
    assert str(Module.parse(text, registry)) == text
    rng = np.random.default_rng(4)
    weights = {name: rng.standard_normal((48, 64)).astype(to_numpy("bf16")) for name in "wv"}
    x, ids = rng.standard_normal((5, 64)).astype(np.float32), np.array([3, 0, 47, 3, 1], np.int32)
    with Session("reference", registry=registry) as session:
        executable = session.compile(text, constants=weights)
        found = [np.asarray(a) for a in executable.run({"x": x, "ids": ids})]
    w, v = (dequantize(quantize(a, dtype)).astype(np.float64) for a in weights.values())
    gate, up = x @ w.T, x @ v.T
    np.testing.assert_allclose(found[0], np.concatenate([gate, up], axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[2], w[ids])
    np.testing.assert_array_equal(found[3], w[ids].astype(to_numpy("bf16")))
    np.testing.assert_array_equal(found[4], v)
    np.testing.assert_array_equal(found[5], v.astype(np.float16))


def test_constants_may_be_quantised_already(registry: Registry) -> None:
    """As they come from a file that holds them so."""
    g = Graph()
    w = g.constant("w", (48, 64), "q8")
    g.output(g.matmul(g.input("x", (2, 64), "f32"), w, transpose_rhs=True), "y")
    groups = quantize(np.random.default_rng(0).standard_normal((48, 64)), "q8")
    x = np.ones((2, 64), np.float32)
    with Session("reference", registry=registry) as session:
        (y,) = session.compile(g.module(registry), constants={"w": groups}).run({"x": x})
    np.testing.assert_allclose(np.asarray(y), x @ dequantize(groups).T, rtol=1e-5, atol=1e-5)
    wanted = Named("w", TensorType((48, 64), "q4"))
    ops = {op.full_name: op for op in OPS}
    with pytest.raises(AssetError, match=r"constant 'w' is q8\[48,64\], the module wants q4\[48, 64\]"):
        evaluate(wanted, ArraySource({"w": groups}), ops)


def test_only_constants_are_quantised(registry: Registry) -> None:
    g = Graph()
    with pytest.raises(UsageError, match="input 'x' cannot be q4"):
        g.input("x", (2, 64), "q4")
    g.output(g.dequantize(g.quantize(g.input("x", (2, 64), "f32"), "q4")), "y")
    with pytest.raises(UsageError, match="a q4 result must be computed from constants"):
        g.module(registry).function()
    text = """func.func @main(%x: tensor<2x64x!transformer.q8> {kernelforge.name = "x"}) -> tensor<2x64xf32> {
      %y = "transformer.dequantize"(%x) : (tensor<2x64x!transformer.q8>) -> tensor<2x64xf32>
      return %y : tensor<2x64xf32>
    }"""
    with pytest.raises(UsageError, match="argument 'x' is q8 and must be constant"):
        Module.parse(text, registry).function()
