from __future__ import annotations

import math
import struct

import pytest

from kernelforge.mlir import ir, new_context
from kernelforge.op import UNKNOWN, OpError
from kernelforge.problem import Attr, TensorType
from kernelforge.syntax import attr_text, float_text, read_tensor, run_lengths, string_text, tensor_text

CONTEXT = new_context()


def parsed(text: str) -> ir.Attribute:
    with CONTEXT:
        return ir.Attribute.parse(text)


@pytest.mark.parametrize(
    "value",
    [
        0.0,
        -0.0,
        1.0,
        -3.0,
        0.1,
        1e-5,
        1e-6,
        1e22,
        1.5e300,
        5e-324,
        1 / 3,
        500000.0,
        math.inf,
        -math.inf,
        math.nan,
        1e16,
    ],
)
def test_floats_read_back_as_the_same_bits(value: float) -> None:
    assert struct.pack("<d", parsed(float_text(value)).value) == struct.pack("<d", value)


@pytest.mark.parametrize("value", ["", "silu", 'a"b\\c', "line\nbreak", "tab\t", "ünïcode ✓", "\x00\x7f", "%s {}"])
def test_strings_read_back_and_are_printed_alike(value: str) -> None:
    found = parsed(string_text(value))
    assert found.value == value
    assert str(found) == string_text(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (-7, "-7 : i64"),
        (1 << 40, "1099511627776 : i64"),
        ((), "array<i64>"),
        ((3, -1), "array<i64: 3, -1>"),
        ("f32", '"f32"'),
    ],
)
def test_attributes_are_written_as_mlir_prints_them(value: Attr, text: str) -> None:
    assert attr_text(value) == text
    assert str(parsed(text)) == text


@pytest.mark.parametrize(
    "text", ["tensor<f32>", "tensor<?x8xf32>", "tensor<0x?x3xbf16>", "tensor<2xi8>", "tensor<1024x?xi64>"]
)
def test_tensor_types_round_trip(text: str) -> None:
    t = read_tensor(text)
    assert tensor_text(t.shape, t.dtype) == text
    with CONTEXT:
        assert str(ir.Type.parse(text)) == text


def test_named_dimensions_become_question_marks() -> None:
    assert tensor_text(("tokens", 8), "f32") == "tensor<?x8xf32>"
    assert read_tensor("tensor<?x8xf32>") == TensorType((UNKNOWN, 8), "f32")


@pytest.mark.parametrize(
    "text", ["tensor<*xf32>", "tensor<2xi1>", "tensor<2xf32, 1 : i32>", "f32", "tensor<2xindex>", "tensor<2xui8>"]
)
def test_other_types_are_refused(text: str) -> None:
    with pytest.raises(OpError, match="must be a tensor of f64, f32, bf16, f16, i64, i32, i8"):
        read_tensor(text)


def test_runs_of_equal_types() -> None:
    a, b = TensorType((2, "x"), "f32"), TensorType((3,), "f32")
    renamed = TensorType((2, "y"), "f32")
    assert run_lengths([a, a, b, renamed]) == [2, 1, 1, 0, 0, 0, 0, 0]
    assert run_lengths([a, renamed]) == [2, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(OpError, match="has 9 runs of different types, can have 8"):
        run_lengths([a, b] * 4 + [a])
