"""`kernelforge emit-mlir`: a module at each stage of the compiler."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.cli.options import Activations, Context, KvDtype, Weights, open_session
from kernelforge.cli.problems import Formats, load_model
from kernelforge.errors import UsageError
from kernelforge.importer import Program
from kernelforge.module import Function, Module
from kernelforge.passes import Pipeline
from kernelforge.plan import Plan, Step
from kernelforge.registry import lookup
from kernelforge.session import Session
from kernelforge.syntax import string_text

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor

KERNEL = "kernelforge.kernel"
"""Attribute of an op: how the target runs it."""


class Stage(StrEnum):
    TRANSFORMER = "transformer"
    FUSED = "fused"
    SELECTED = "selected"
    LLVM = "llvm"


def emit_mlir(
    model: Annotated[str | None, typer.Option(help="Of this model.")] = None,
    block: Annotated[bool, typer.Option("--block", help="Of one small decoder layer (the default).")] = False,
    program: Annotated[str | None, typer.Option(help="Which program of the model: decode, prefill.")] = None,
    stage: Annotated[
        Stage,
        typer.Option(help="As built, after the passes, with the chosen kernels, or the kernels' LLVM IR."),
    ] = Stage.TRANSFORMER,
    after: Annotated[str | None, typer.Option(help="Instead of a stage: after the first run of this pass.")] = None,
    passes: Annotated[str | None, typer.Option(help="Instead of the default pipeline: `canonicalize,cse`.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Fix the number of tokens; else it is dynamic.")] = None,
    weights: Weights = "native",
    activations: Activations = "auto",
    kv_dtype: KvDtype = "auto",
    context: Context = None,
) -> dict[str, Any]:
    """Print a module: as it was built, after the passes, with its kernels, or the LLVM IR of its kernels."""
    if model is not None and block:
        raise UsageError("--model and --block exclude each other")
    if after is not None and stage is not Stage.TRANSFORMER:
        raise UsageError("--after and --stage exclude each other")
    out = output.current()
    with closing(open_session(passes)) as session:
        chosen = _program(session, model, program, Formats(weights, activations, kv_dtype, context))
        if tokens is not None:
            chosen = _with_tokens(chosen, tokens)
        text = _after(session, chosen, after) if after is not None else _at(session, chosen, stage)
    out.stream(text if text.endswith("\n") else f"{text}\n")
    return {"program": chosen.name, "stage": None if after else stage.value, "after": after, "text": text}


def _program(session: Session, model: str | None, name: str | None, formats: Formats) -> Program:
    formats.check(model)
    if model is None:
        if name is not None:
            raise UsageError("--program needs --model")
        return decoder_block()
    programs = {p.name: p for p in load_model(session, model, formats).programs}
    if not programs:
        raise UsageError(f"the model '{model}' has no programs")
    return next(iter(programs.values())) if name is None else lookup("program", programs, name)


def _with_tokens(program: Program, tokens: int) -> Program:
    return replace(program, dims={**program.dims, "tokens": tokens})


def _after(session: Session, program: Program, name: str) -> str:
    passes = session.pipeline.passes
    at = next((i for i, step in enumerate(passes) if step.name == name), None)
    if at is None:
        raise UsageError(f"the pipeline has no pass '{name}'", hint=f"it is {session.pipeline}")
    return str(Pipeline(passes[: at + 1]).run(Module.parse(program.module, session.registry)))


def _at(session: Session, program: Program, stage: Stage) -> str:
    if stage is Stage.TRANSFORMER:
        return str(Module.parse(program.module, session.registry))
    module = session.lower(program.module)
    if stage is Stage.FUSED:
        return str(module)
    function = module.function()
    numbered = replace(function, nodes=tuple(replace(node, location=f"#{i}") for i, node in enumerate(function.nodes)))
    plan = session.plan_function(numbered, dims=program.dims, max_dims=program.max_dims)
    if stage is Stage.LLVM:
        return session.device.emit_llvm(plan, session.registry)
    annotate(module, function, plan)
    return str(module)


def annotate(module: Module, function: Function, plan: Plan) -> None:
    """Give each op of the module the attribute `kernelforge.kernel`: its variant and config, or those of its parts, by the
    steps whose location is the op's number, as `#3`; "constant" for one that is computed when compiling, "view" for one that
    only sees its operand's memory otherwise. The text still parses back."""
    from kernelforge.mlir import ir

    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.location, []).append(step)
    body = list(module.main.regions[0].blocks[0].operations)
    with module.context:
        for i, node in enumerate(function.nodes):
            # What comes before an op's own step are copies of operands that it must not overwrite.
            own = steps.get(f"#{i}", [])
            if own and own[-1].problem.op == node.op:
                text = _kernel_text(plan.target, own[-1])
            elif own:
                text = f"[{', '.join(_kernel_text(plan.target, step, named=True) for step in own)}]"
            else:
                folded = all(o is None or _constant(function, o) for o in node.operands)
                text = '"constant"' if folded else '"view"'
            body[i].operation.attributes[KERNEL] = ir.Attribute.parse(text)


def _constant(function: Function, value: int) -> bool:
    """Whether a value is known when compiling."""
    if value < len(function.args):
        return function.args[value].constant
    node = next(n for n in function.nodes if value in n.results)
    return all(o is None or _constant(function, o) for o in node.operands)


def _kernel_text(target: str, step: Step, *, named: bool = False) -> str:
    values = {name: json.dumps(v) if isinstance(v, int) else string_text(v) for name, v in step.config.items()}
    config = ", ".join(f"{string_text(name)} = {text}" for name, text in sorted(values.items()))
    op = f"op = {string_text(step.problem.op)}, " if named else ""
    return f"{{config = {{{config}}}, {op}target = {string_text(target)}, variant = {string_text(step.variant)}}}"


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a decoder layer that is small enough to be read."""

    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 192
    slots: int = 1
    capacity: int = 128


def decoder_block(shape: BlockShape = BlockShape()) -> Program:
    """One pre-norm decoder layer with grouped-query attention over a cache and a gated MLP, as the graph builder
    makes it."""
    from kernelforge.graph import Graph

    g = Graph("block")
    x = g.input("x", ("tokens", shape.width), "f32")
    positions, slots = (g.input(name, ("tokens",), "i32") for name in ("positions", "slots"))
    with g.scope("attention"):
        attended = _attention(
            g, shape, g.rms_norm(x, g.constant("attention.norm", (shape.width,), "f32")), positions, slots
        )
        x = x + attended
    with g.scope("mlp"):
        h = g.rms_norm(x, g.constant("mlp.norm", (shape.width,), "f32"))
        gate, up = (_linear(g, f"mlp.{name}", h, shape.hidden) for name in ("gate", "up"))
        x = x + _linear(g, "mlp.down", g.silu(gate) * up, shape.width)
    g.output(x, "x_out")
    return Program("block", g.text(), max_dims={"tokens": shape.capacity})


def _attention(g: Graph, shape: BlockShape, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    q = _linear(g, "attention.q", x, queries).reshape("tokens", shape.heads, shape.head_dim)
    k, v = (_linear(g, f"attention.{n}", x, keys).reshape("tokens", shape.kv_heads, shape.head_dim) for n in "kv")
    q, k = (g.rope(t, positions, max_position=shape.capacity) for t in (q, k))
    size = (shape.slots, shape.capacity, shape.kv_heads, shape.head_dim)
    k_cache, v_cache = (g.input(name, size, "f32", donated=True) for name in ("k_cache", "v_cache"))
    k_cache = g.kv_cache_update(k_cache, k, positions, slots)
    v_cache = g.kv_cache_update(v_cache, v, positions, slots)
    g.output(k_cache, "k_cache_out")
    g.output(v_cache, "v_cache_out")
    seen = g.attention(q, k_cache, v_cache, positions, slots)
    return _linear(g, "attention.o", seen.reshape("tokens", queries), shape.width)


def _linear(g: Graph, name: str, x: Tensor, features: int) -> Tensor:
    width = x.shape[-1]
    assert isinstance(width, int)
    return g.matmul(x, g.constant(name, (features, width), "f32"), transpose_rhs=True)
