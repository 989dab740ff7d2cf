from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from kernelforge.dialect import context_for, create, dialect_class, operand_types, operand_values, read_attrs
from kernelforge.dialects.transformer import OPS
from kernelforge.errors import PluginError, UsageError
from kernelforge.mlir import ir, parse_module, run_pipeline
from kernelforge.module import Module
from kernelforge.op import UNKNOWN, Attribute, Cost, OpDef, Operand, OperandTypes, OpError
from kernelforge.problem import Problem, TensorType


@dataclass(frozen=True)
class Catalog:
    ops: Mapping[str, OpDef]


TRANSFORMER = Catalog({op.full_name: op for op in OPS})


def same_type(operands: OperandTypes, attrs: object) -> tuple[TensorType, ...]:
    assert operands[0] is not None
    return (TensorType(operands[0].shape, operands[0].dtype),)


def no_samples(rng: random.Random) -> Iterator[Problem]:
    return iter(())


def custom(name: str = "twice", operands: tuple[Operand, ...] = (Operand("x"),), **fields: object) -> OpDef:
    """An op as a plugin may bring it."""
    return replace(
        OpDef(
            name=name,
            summary="x + x",
            operands=operands,
            results=("out",),
            infer=same_type,
            reference=lambda arrays, attrs: (arrays[0] * 2,),
            sample=no_samples,
            cost=lambda problem: Cost(1, 1),
            dialect="third",
        ),
        **fields,  # type: ignore[arg-type]  # fields of OpDef
    )


TEXT = """module {
  func.func @main(%arg0: tensor<?x8xf32>, %arg1: tensor<8x6xbf16>, %arg2: tensor<6xf32>) -> tensor<?x9xf32> {
    %0 = "transformer.matmul"(%arg0, %arg1, %arg2) {epilogue = "silu", operandSegmentSizes = array<i32: 1, 1, 1, 0>} \
: (tensor<?x8xf32>, tensor<8x6xbf16>, tensor<6xf32>) -> tensor<?x6xf32>
    %1:3 = "transformer.split"(%0) {axis = -1 : i64, resultSegmentSizes = array<i32: 2, 1, 0, 0, 0, 0, 0, 0>, \
sizes = array<i64: 1, 1, 4>} : (tensor<?x6xf32>) -> (tensor<?x1xf32>, tensor<?x1xf32>, tensor<?x4xf32>)
    %2 = "transformer.concat"(%1#0, %1#2, %1#2) {axis = 1 : i64, \
operandSegmentSizes = array<i32: 1, 2, 0, 0, 0, 0, 0, 0>} \
: (tensor<?x1xf32>, tensor<?x4xf32>, tensor<?x4xf32>) -> tensor<?x9xf32>
    return %2 : tensor<?x9xf32>
  }
}
"""


def operations(module: Module) -> list[ir.OpView]:
    return list(module.main.regions[0].blocks[0].operations)[:-1]


def test_printed_text_parses_back_to_the_same_text() -> None:
    module = Module.parse(TEXT, TRANSFORMER)
    assert str(module) == TEXT
    assert str(Module.parse(str(module), TRANSFORMER)) == TEXT


def test_ops_are_python_classes_with_their_operands_by_name() -> None:
    module = Module.parse(TEXT, TRANSFORMER)
    matmul, split, concat = operations(module)
    assert type(matmul).__name__ == "matmul"
    assert matmul.residual is None
    assert matmul.bias.type == ir.RankedTensorType(matmul.operands[2].type)
    assert matmul.lhs == matmul.operands[0]
    assert matmul.out == matmul.operation.results[0]
    assert split.out == list(split.operation.results)
    assert concat.xs == [split.out[0], split.out[2], split.out[2]]


def test_operands_types_and_attributes_are_read_as_python_values() -> None:
    module = Module.parse(TEXT, TRANSFORMER)
    matmul, split, concat = (view.operation for view in operations(module))
    op = TRANSFORMER.ops["transformer.matmul"]
    values = operand_values(op, matmul)
    assert [v is None for v in values] == [False, False, False, True]
    types = operand_types(op, values)
    assert types == [TensorType((UNKNOWN, 8), "f32"), TensorType((8, 6), "bf16"), TensorType((6,), "f32"), None]
    assert read_attrs(op, matmul) == {"epilogue": "silu"}
    assert read_attrs(TRANSFORMER.ops["transformer.split"], split) == {"axis": -1, "sizes": (1, 1, 4)}
    assert len(operand_values(TRANSFORMER.ops["transformer.concat"], concat)) == 3


def test_attributes_of_other_dialects_are_let_be() -> None:
    text = TEXT.replace('{epilogue = "silu",', '{epilogue = "silu", kernelforge.variant = "vectorized",')
    module = Module.parse(text, TRANSFORMER)
    matmul = operations(module)[0].operation
    assert read_attrs(TRANSFORMER.ops["transformer.matmul"], matmul) == {"epilogue": "silu"}


def single(op: str, attrs: str) -> str:
    return f"""func.func @f(%x: tensor<4x6xf32>, %w: tensor<6xf32>, %i: tensor<4xi32>) {{
  %0 = "transformer.{op}"(%x, %w) {{{attrs}}} : (tensor<4x6xf32>, tensor<6xf32>) -> tensor<4x6xf32>
  return }}"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.0e-6 : f64", 1e-6),
        ("1.0e-6 : f32", pytest.approx(1e-6)),
        ("0x3EB0C6F7A0B5ED8D : f64", 1e-6),
        ("1 : i64", 1.0),
    ],
)
def test_float_attributes_of_any_width(text: str, value: float) -> None:
    module = Module.parse(single("rms_norm", f"eps = {text}"), TRANSFORMER)
    assert module.function().nodes[0].problem.attr("eps") == value


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ("eps = dense<1.0> : tensor<f64>", "attribute 'eps' is dense<.*>, must be a bool, an integer, a float"),
        ("eps = unit", "attribute 'eps' is unit, must be a bool"),
        ("eps = true", "attribute 'eps' must be of kind float, got True"),
        ("epsilon = 1.0", r"attribute 'epsilon' is unknown to rms_norm \(it has: eps\)"),
    ],
)
def test_attributes_of_a_wrong_kind(attrs: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"error: \"-\":2:8: 'transformer.rms_norm' op {message}"):
        Module.parse(single("rms_norm", attrs), TRANSFORMER)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "1, 1, 1, 0",
            "1, 1, 0, 1, 0",
            r"'operandSegmentSizes' is \[1, 1, 0, 1, 0\], which does not fit 3 operands of matmul",
        ),
        ("1, 1, 1, 0", "1, 0, 1, 1", r"'operandSegmentSizes' is \[1, 0, 1, 1\], which does not fit 3 operands"),
        ("1, 1, 1, 0", "1, 2, 0, 0", r"'operandSegmentSizes' is \[1, 2, 0, 0\], which does not fit 3 operands"),
        ("1, 1, 1, 0", "1, 1, 1, 1", r"'operandSegmentSizes' is \[1, 1, 1, 1\], which does not fit 3 operands"),
        (
            "array<i32: 1, 1, 1, 0>",
            "array<i64: 1, 1, 1, 0>",
            "'operandSegmentSizes' is array<i64.*, must be an array<i32>",
        ),
        (", operandSegmentSizes = array<i32: 1, 1, 1, 0>", "", "attribute 'operandSegmentSizes' is required"),
        (
            "1, 2, 0, 0, 0, 0, 0, 0",
            "1, 2",
            r"'operandSegmentSizes' is \[1, 2\], which does not fit 3 operands of concat",
        ),
        ("1, 2, 0, 0, 0, 0, 0, 0", "1, 3, -1, 0, 0, 0, 0, 0", "which does not fit 3 operands of concat"),
        (
            ", operandSegmentSizes = array<i32: 1, 2, 0, 0, 0, 0, 0, 0>",
            "",
            "attribute 'operandSegmentSizes' is required",
        ),
        ("resultSegmentSizes = array<i32: 2, 1, 0, 0, 0, 0, 0, 0>,", "", "attribute 'resultSegmentSizes' is required"),
        (
            "2, 1, 0, 0, 0, 0, 0, 0",
            "2, 0, 0, 0, 0, 0, 0, 0",
            r"'resultSegmentSizes' is \[2, 0.*, which does not fit 3 results",
        ),
        ("2, 1, 0, 0, 0, 0, 0, 0", "3, 0, 0, 0, 0, 0, 0, 0", "expected 'tensor<.x1xf32>' but got 'tensor<.x4xf32>'"),
    ],
)
def test_segment_sizes_that_do_not_fit(old: str, new: str, message: str) -> None:
    text = TEXT.replace(old, new)
    assert text != TEXT
    with pytest.raises(UsageError, match=message):
        Module.parse(text, TRANSFORMER)


@pytest.mark.parametrize(
    "kind", ["vector<4x6xf32>", "memref<4x6xf32>", "tensor<*xf32>", "f32", "tensor<4x6xi1>", "index"]
)
def test_what_is_no_tensor_of_a_known_type_is_refused(kind: str) -> None:
    text = f"""func.func @f(%x: {kind}) {{
  %0 = "transformer.silu"(%x) : ({kind}) -> tensor<4x6xf32>
  return }}"""
    message = rf"'transformer.silu' op operand 'x' has type {kind}, must be a tensor of f64, f32".replace("*", r"\*")
    with pytest.raises(UsageError, match=message):
        Module.parse(text, TRANSFORMER)
    with pytest.raises(UsageError, match="op result 'out' has type"):
        Module.parse(
            f"""func.func @f(%x: tensor<4x6xf32>) {{
  %0 = "transformer.silu"(%x) : (tensor<4x6xf32>) -> {kind}
  return }}""",
            TRANSFORMER,
        )


def test_a_static_size_agrees_with_a_dynamic_one() -> None:
    text = """func.func @f(%x: tensor<?x6xf32>, %y: tensor<4x6xf32>) -> tensor<?x6xf32> {
  %0 = "transformer.add"(%x, %y) : (tensor<?x6xf32>, tensor<4x6xf32>) -> tensor<?x6xf32>
  return %0 : tensor<?x6xf32> }"""
    Module.parse(text, TRANSFORMER)
    with pytest.raises(UsageError, match=r"result 'out' has type tensor<5x6xf32>, must be tensor<4x6xf32>"):
        Module.parse(
            text.replace("-> tensor<?x6xf32>", "-> tensor<5x6xf32>").replace("%0 : tensor<?", "%0 : tensor<5"),
            TRANSFORMER,
        )


def test_ops_are_pure_for_upstream_passes() -> None:
    text = """func.func @main(%x: tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>) {
  %0 = "transformer.silu"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %1 = "transformer.silu"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %2 = "transformer.gelu"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  return %0, %1 : tensor<4xf32>, tensor<4xf32> }"""
    module = Module.parse(text, TRANSFORMER)
    run_pipeline(module.mlir, "builtin.module(canonicalize,cse)")
    assert [node.op for node in module.function().nodes] == ["transformer.silu"]


def test_ops_are_created_with_inferred_types_and_without_defaults() -> None:
    module = Module.parse(TEXT, TRANSFORMER)
    matmul, split, concat = operations(module)
    op = TRANSFORMER.ops["transformer.matmul"]
    lhs, rhs = matmul.operands[0], matmul.operands[1]
    with module.context:
        here = ir.Location.name("here")
    (out,) = create(op, [lhs, rhs], {"epilogue": "none", "transpose_lhs": False}, before=split.operation, location=here)
    assert str(out.type) == "tensor<?x6xf32>"
    assert [name for name, _ in out.owner.attributes.items()] == ["operandSegmentSizes"]
    assert 'loc("here")' in str(out.owner.location)
    residual = create(op, [lhs, rhs, None, out], {}, before=split.operation)[0]
    assert residual.owner.location == split.location
    pieces = create(
        TRANSFORMER.ops["transformer.split"], [out], {"axis": 1, "sizes": (2, 3, 1)}, before=concat.operation
    )
    assert [str(p.type) for p in pieces] == ["tensor<?x2xf32>", "tensor<?x3xf32>", "tensor<?x1xf32>"]
    create(TRANSFORMER.ops["transformer.concat"], pieces, {"axis": 1}, before=concat.operation)
    module.verify()
    assert str(Module.parse(str(module), TRANSFORMER)) == str(module)
    with pytest.raises(OpError, match="operand 'rhs' has 8 rows but operand 'lhs' has 6 columns"):
        create(op, [out, rhs], {}, before=concat.operation)


def test_more_runs_of_types_than_mlir_is_told_of() -> None:
    sizes = tuple(range(1, 10))
    text = f"""func.func @f(%x: tensor<{sum(sizes)}xf32>) {{
  return }}"""
    module = Module.parse(text, TRANSFORMER)
    block = module.main.regions[0].blocks[0]
    with pytest.raises(OpError, match="has 9 runs of different types, can have 8: nest several"):
        create(
            TRANSFORMER.ops["transformer.split"],
            [block.arguments[0]],
            {"axis": 0, "sizes": sizes},
            before=block.operations[0].operation,
        )


def test_a_plugins_dialect_beside_ours() -> None:
    op = custom(attributes=(Attribute("times", "int", 2),))
    catalog = Catalog({**TRANSFORMER.ops, op.full_name: op})
    text = """func.func @f(%x: tensor<4xf32>) -> tensor<4xf32> {
  %0 = "transformer.silu"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  %1 = "third.twice"(%0) {times = 3 : i64} : (tensor<4xf32>) -> tensor<4xf32>
  return %1 : tensor<4xf32> }"""
    nodes = Module.parse(text, catalog).function().nodes
    assert [(n.op, dict(n.problem.attrs)) for n in nodes][1] == ("third.twice", {"times": 3})
    with pytest.raises(UsageError, match=r"'third.twice' op attribute 'times' must be of kind int, got 'x'"):
        Module.parse(text.replace("3 : i64", '"x"'), catalog)
    with pytest.raises(UsageError, match="unregistered dialect") as refused:
        Module.parse(text, TRANSFORMER)
    assert refused.value.hint == "the registered dialects are: transformer"


def test_an_error_in_a_plugins_inference_is_a_diagnostic() -> None:
    def broken(operands: OperandTypes, attrs: object) -> tuple[TensorType, ...]:
        raise ZeroDivisionError("division by zero")

    op = custom(infer=broken)
    text = """func.func @f(%x: tensor<4xf32>) {
  %0 = "third.twice"(%x) : (tensor<4xf32>) -> tensor<4xf32>
  return }"""
    with pytest.raises(UsageError, match=r"'third.twice' op division by zero"):
        Module.parse(text, Catalog({op.full_name: op}))


@pytest.mark.parametrize("name", ["out", "operands", "class", "location"])
def test_names_that_mlir_cannot_have_are_the_plugins_error(name: str) -> None:
    op = custom(operands=(Operand(name),))
    with pytest.raises(PluginError, match=rf"op 'third.twice': '{name}' cannot name an operand or result of it"):
        dialect_class("third", [op])


def test_a_dialect_is_made_once_and_loaded_into_many_contexts() -> None:
    assert dialect_class("transformer", OPS) is dialect_class("transformer", tuple(OPS))
    first, second = context_for(TRANSFORMER.ops), context_for(TRANSFORMER.ops)
    for context in (first, second, first):
        parse_module(TEXT, context)
        with pytest.raises(UsageError, match="operand 'rhs' has 9 rows"):
            parse_module(TEXT.replace("8x6xbf16", "9x6xbf16"), context)


def test_threads_with_a_context_each() -> None:
    def work(_: int) -> bool:
        for _ in range(3):
            module = Module.parse(TEXT, TRANSFORMER)
            run_pipeline(module.mlir, "builtin.module(canonicalize,cse)")
            with pytest.raises(UsageError, match="operand 'rhs' has 9 rows"):
                Module.parse(TEXT.replace("8x6xbf16", "9x6xbf16"), TRANSFORMER)
        return str(module) == TEXT

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
