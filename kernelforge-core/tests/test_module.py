from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from kernelforge.dialects.transformer import OPS
from kernelforge.errors import UsageError
from kernelforge.mlir import ir
from kernelforge.module import Argument, Module, Node, OpCatalog, location_text
from kernelforge.op import OpDef
from kernelforge.problem import TensorType


@dataclass(frozen=True)
class Catalog:
    ops: Mapping[str, OpDef]


CATALOG: OpCatalog = Catalog({op.full_name: op for op in OPS})

TEXT = """func.func @decode(
    %x: tensor<?x8xf32> {kernelforge.name = "x"},
    %rows: tensor<?xi32> {kernelforge.dims = ["rows"], kernelforge.name = "rows"},
    %w: tensor<16x8xbf16> {kernelforge.constant, kernelforge.name = "w"},
    %cache: tensor<2x?x?x4xf32> {kernelforge.dims = ["context", ""], kernelforge.donated},
    %plain: tensor<3xf32>
  ) -> (tensor<?x16xf32> {kernelforge.name = "y"}, tensor<3xf32>, tensor<2x?x?x4xf32>) {
  %wide = "transformer.cast"(%w) {dtype = "f32"} : (tensor<16x8xbf16>) -> tensor<16x8xf32>
  %picked = "transformer.embedding"(%x, %rows) : (tensor<?x8xf32>, tensor<?xi32>) -> tensor<?x8xf32> loc("pick")
  %y = "transformer.matmul"(%picked, %wide) {transpose_rhs = true, operandSegmentSizes = array<i32: 1, 1, 0, 0>}
    : (tensor<?x8xf32>, tensor<16x8xf32>) -> tensor<?x16xf32> loc(fused["head", "other"])
  return %y, %plain, %cache : tensor<?x16xf32>, tensor<3xf32>, tensor<2x?x?x4xf32>
}"""


def read(text: str = TEXT) -> Module:
    return Module.parse(text, CATALOG)


def test_arguments_and_results() -> None:
    function = read().function()
    assert function.name == "decode"
    assert function.args == (
        Argument("x", TensorType(("tokens", 8), "f32")),
        Argument("rows", TensorType(("rows",), "i32")),
        Argument("w", TensorType((16, 8), "bf16"), constant=True),
        Argument("arg3", TensorType((2, "context", "tokens", 4), "f32"), donated=True),
        Argument("arg4", TensorType((3,), "f32")),
    )
    assert function.dims == ("tokens", "rows", "context")
    assert function.output_names == ("y", "out1", "out2")
    assert function.outputs == (7, 4, 3)


def test_nodes_number_values_and_carry_named_dimensions_and_constants() -> None:
    cast, pick, matmul = read().function().nodes
    assert (cast.operands, cast.results) == ((2,), (5,))
    assert pick == Node("transformer.embedding", (0, 1), (6,), pick.problem, "pick")
    assert (matmul.operands, matmul.results) == ((6, 5, None, None), (7,))
    assert pick.problem.results == (TensorType(("rows", 8), "f32"),)
    assert dict(pick.problem.attrs) == {"dtype": ""}
    assert cast.problem.operand(0).constant
    assert matmul.problem.operand(1) == TensorType((16, 8), "f32", constant=True)
    assert matmul.problem.operand(0) == TensorType(("rows", 8), "f32")
    assert matmul.problem.dims == ("rows",)
    assert str(matmul.problem.canonical()) == (
        "transformer.matmul(f32[?0,8], f32[16,8]@const, _, _) -> (f32[?0,16]) "
        '{epilogue="none", transpose_lhs=false, transpose_rhs=true}'
    )


def test_locations() -> None:
    cast, pick, matmul = read().function().nodes
    assert cast.location == "-:8:11"
    assert pick.location == "pick"
    assert matmul.location == "head"
    with read().context:
        where = ir.Location.callsite(ir.Location.name("callee"), [ir.Location.name("caller")])
        assert location_text(where) == "callee"
        assert location_text(ir.Location.unknown()) == ""
        assert location_text(ir.Location.name("outer", ir.Location.unknown())) == "outer"


def test_text_parses_back_with_and_without_locations() -> None:
    module = read()
    again = read(module.text())
    assert again.text() == module.text() == str(module)
    located = read(module.text(locations=True))
    assert located.text(locations=True) == module.text(locations=True)
    assert [n.location for n in located.function().nodes] == [n.location for n in module.function().nodes]
    assert "pick" not in module.text()


def test_a_clone_is_independent_and_keeps_locations() -> None:
    module = read()
    copy = module.clone()
    assert copy.function() == module.function()
    copy.main.attributes["sym_name"] = ir.StringAttr.get("other", copy.context)
    assert copy.function().name == "other"
    assert module.function().name == "decode"


def test_verify_names_op_and_reason() -> None:
    module = read()
    module.verify()
    matmul = module.main.regions[0].blocks[0].operations[2]
    del matmul.attributes["transpose_rhs"]
    with pytest.raises(
        UsageError, match=r"'transformer\.matmul' op operand 'rhs' has 16 rows but operand 'lhs' has 8 columns"
    ):
        module.verify()


def test_two_dimensions_where_one_is_needed() -> None:
    text = """func.func @f(%a: tensor<?x8xf32>, %b: tensor<?x8xf32> {kernelforge.dims = ["rows"]}) -> tensor<?x8xf32> {
  %0 = "transformer.add"(%a, %b) : (tensor<?x8xf32>, tensor<?x8xf32>) -> tensor<?x8xf32> loc("layers.0")
  return %0 : tensor<?x8xf32> }"""
    message = r"'transformer.add' at layers.0: operand 'b' has shape \[rows,8\], .* broadcast with 'a' \[tokens,8\]"
    with pytest.raises(UsageError, match=message):
        read(text).function()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tensor<16x8xbf16> {kernelforge.constant,", "tensor<?x8xbf16> {kernelforge.constant,", "dynamic dimensions"),
        (
            '["rows"], kernelforge.name = "rows"',
            '["rows", "more"]',
            "'arg1' names 2 dynamic dimensions, its type .* has 1",
        ),
        ('["rows"]', '["two words"]', "argument 'rows': 'two words' cannot name a dimension"),
        ('kernelforge.name = "rows"', 'kernelforge.name = "x"', "two arguments of the function are named 'x'"),
        ('kernelforge.name = "y"', 'kernelforge.name = "out1"', "two results of the function are named 'out1'"),
        (
            "kernelforge.constant,",
            "kernelforge.constant, kernelforge.donated,",
            "'w' is constant and cannot be donated",
        ),
        ("%plain: tensor<3xf32>\n", "%plain: index\n", "argument 'arg4' has type index, must be a tensor of f64"),
    ],
)
def test_arguments_that_cannot_be(old: str, new: str, message: str) -> None:
    text = TEXT.replace(old, new)
    assert text != TEXT
    if "?x8xbf16" in new:
        text = text.replace("(tensor<16x8xbf16>) -> tensor<16x8xf32>", "(tensor<?x8xbf16>) -> tensor<?x8xf32>").replace(
            "tensor<16x8xf32>) -> tensor<?x16xf32>", "tensor<?x8xf32>) -> tensor<?x16xf32>"
        )
    if "index" in new:
        text = text.replace("tensor<3xf32>", "index")
    with pytest.raises(UsageError, match=message):
        read(text).function()


def test_a_bool_may_stand_for_a_unit_attribute() -> None:
    text = TEXT.replace("kernelforge.donated", "kernelforge.donated = false")
    assert not read(text).function().args[3].donated
    assert read(TEXT.replace("kernelforge.constant", "kernelforge.constant = true")).function().args[2].constant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module {}", "the module has 0 public functions, must have one"),
        ("func.func @a() { return }\nfunc.func @b() { return }", "the module has 2 public functions, must have one"),
        ("func.func private @a()", "the module has 0 public functions"),
    ],
)
def test_a_module_has_one_public_function(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(text).function()


def test_a_private_function_is_no_second_one() -> None:
    module = read("func.func private @helper() { return }\n" + TEXT)
    assert module.function().name == "decode"


def test_control_flow_and_foreign_ops_are_refused() -> None:
    branch = "func.func @f() {\n  cf.br ^next\n^next:\n  return\n}"
    with pytest.raises(UsageError, match="must have a body of one block"):
        read(branch).function()
    foreign = """func.func @f(%x: tensor<3xf32>) -> tensor<3xf32> {
  %0 = arith.addf %x, %x : tensor<3xf32>
  return %0 : tensor<3xf32> }"""
    with pytest.raises(UsageError, match=r"'arith\.addf' at -:2:8 is no op of a registered dialect"):
        read(foreign).function()


@pytest.mark.parametrize("text", ["func.func @f(", "not mlir at all", "func.func @f() -> tensor<3xf32> { return }"])
def test_text_that_is_no_module(text: str) -> None:
    with pytest.raises(UsageError, match="MLIR does not accept the module"):
        read(text)
