"""A model ready to be compiled, the graph of its step, and the table of weights that the graph draws from.

One module serves a prompt, a decode step, a padded batch and continuous batching: tokens of all sequences are laid end to
end, each with its position (negative: padding) and its cache slot; `rows` names the tokens whose logits are wanted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kernelforge.dtype import from_numpy
from kernelforge.errors import AssetError, KernelForgeWarning, UsageError
from kernelforge.importer import Program

from kernelforge_llm.architecture import Architecture, find_architecture
from kernelforge_llm.checkpoint import save_checkpoint
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.convert import converted, converted_config

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge.registry import Registry

    from kernelforge_llm.checkpoint import TensorSource
    from kernelforge_llm.source import Source

WeightFormat = Literal["native", "f32", "bf16", "f16"]

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Tensors that older checkpoints carry and that follow from the config."""


class WeightTable:
    """Declares weights as constants of a graph, after checking them against the checkpoint."""

    def __init__(self, g: Graph, source: TensorSource, weights: WeightFormat) -> None:
        self._g, self._source, self._format = g, source, weights
        self._names = frozenset(source.names())
        self._used: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._names

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A matrix or table, in the format that the user chose. Raises AssetError when it is missing or misshapen."""
        tensor = self._constant(name, shape)
        if self._format in ("native", tensor.dtype):
            return tensor
        return self._g.cast(tensor, self._format)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm's weight or a bias, in f32: they are small, and every kernel reads them so."""
        tensor = self._constant(name, shape)
        return tensor if tensor.dtype == "f32" else self._g.cast(tensor, "f32")

    def _constant(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._used:
            if name not in self._names:
                raise AssetError(f"the checkpoint has no tensor '{name}'", hint="is config.json of this checkpoint?")
            found = tuple(self._source.shape(name))
            if found != shape:
                raise AssetError(f"tensor '{name}' has shape {list(found)}, config.json asks for {list(shape)}")
            self._used[name] = self._g.constant(name, shape, from_numpy(self._source.dtype(name)))
        return self._used[name]

    def warn_unused(self) -> None:
        """Name the tensors that the model does not read: a sign that it is another model than config.json says."""
        unused = sorted(n for n in self._names - self._used.keys() if not n.endswith(_IGNORED_SUFFIXES))
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            warnings.warn(
                f"the checkpoint has tensors that are not used: {', '.join(unused[:3])}{more}", KernelForgeWarning, stacklevel=3
            )


@dataclass(frozen=True)
class StepInputs:
    """The inputs of one step."""

    tokens: Tensor
    """[tokens] i32."""
    positions: Tensor
    """[tokens] i32: place in its sequence; negative marks padding."""
    slots: Tensor
    """[tokens] i32: which sequence of the cache."""
    keys: tuple[Tensor, ...]
    """Per layer: [sequences, context, num_kv_heads, head_dim] f32, updated in place."""
    values: tuple[Tensor, ...]
    context: int
    """Capacity of the cache in positions."""


DEFAULT_CONTEXT = 4096
"""Positions of a cache when nothing else is asked for, if the model was made for as many."""

PREFILL_TOKENS = 512
"""Most tokens of one prefill step; a longer prompt takes several."""


@dataclass(frozen=True)
class Model:
    """A source with its architecture and the choices that shape the compiled step."""

    source: Source
    architecture: Architecture
    config: ModelConfig
    weights: WeightFormat
    context: int
    """Capacity of the cache, in positions."""
    sequences: int
    """How many sequences the cache holds side by side."""

    @classmethod
    def make(
        cls,
        source: Source,
        registry: Registry,
        *,
        weights: WeightFormat = "native",
        context: int | None = None,
        sequences: int = 1,
    ) -> Model:
        """Find the architecture and read the config. Raises AssetError for what is broken or unknown, UsageError for a
        weight format, context or number of sequences that cannot be."""
        if weights not in get_args(WeightFormat):
            raise UsageError(f"unknown weight format '{weights}'", hint=f"one of: {', '.join(get_args(WeightFormat))}")
        architecture = find_architecture(source.config, registry)
        config = architecture.config(source.config, source.generation)
        if context is not None and not 1 <= context <= config.max_position:
            raise UsageError(f"context {context} is not in 1..{config.max_position}, which the model was made for")
        if sequences < 1:
            raise UsageError(f"cannot hold {sequences} sequences", hint="at least 1")
        context = context or min(config.max_position, DEFAULT_CONTEXT)
        return cls(source, architecture, config, weights, context, sequences)

    @property
    def programs(self) -> tuple[Program, Program]:
        """The step for one token of one sequence, and for any number of tokens and rows."""
        module = self.module
        bounds = {"tokens": min(PREFILL_TOKENS, self.context), "rows": 1}
        return Program("decode", module, dims={"tokens": 1, "rows": 1}), Program("prefill", module, max_dims=bounds)

    @cached_property
    def module(self) -> str:
        """MLIR text of a step, before any pass.

        Inputs: tokens, positions, slots [tokens] i32, rows [rows] i32, and the caches `key.N` and `value.N`. Outputs: the
        updated caches, `logits` [rows, vocab] f32, `token` [rows] i32 (their argmax).
        """
        return _step_module(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a standard safetensors folder, in this weight format. Raises as `save_checkpoint`."""
        save_checkpoint(
            Path(folder),
            converted_config(self.source.config, self.weights),
            converted(self.source.tensors, self.weights),
            generation=self.source.generation,
            tokenizer_from=self.source.folder,
        )


def _step_module(model: Model) -> str:
    from kernelforge.graph import Graph

    config = model.config
    g = Graph("main")
    cache_shape = (model.sequences, model.context, config.num_kv_heads, config.head_dim)
    tokens = g.input("tokens", ("tokens",), "i32")
    positions = g.input("positions", ("tokens",), "i32")
    slots = g.input("slots", ("tokens",), "i32")
    rows = g.input("rows", ("rows",), "i32")
    layers = range(config.num_layers)
    keys = tuple(g.input(f"key.{i}", cache_shape, "f32", donated=True) for i in layers)
    values = tuple(g.input(f"value.{i}", cache_shape, "f32", donated=True) for i in layers)
    step = StepInputs(tokens, positions, slots, keys, values, model.context)
    table = WeightTable(g, model.source.tensors, model.weights)
    states = model.architecture.hidden_states(g, config, table, step)
    with g.scope("lm_head"):
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        chosen = g.embedding(states, rows)  # [rows, hidden]
        scores = g.matmul(chosen, table.matrix(head, (config.vocab_size, config.hidden_size)), transpose_rhs=True)
    g.output(scores, "logits")
    g.output(g.argmax(scores), "token")
    table.warn_unused()
    return g.text()


def rope_attributes(config: ModelConfig, context: int) -> Mapping[str, Any]:
    """Attributes of the `rope` op for this model."""
    rope = config.rope
    attributes: dict[str, Any] = {"theta": float(rope.theta), "max_position": context}
    if rope.kind != "default":
        attributes |= {"scaling": rope.kind, "factor": float(rope.factor)}
    if rope.kind == "llama3":
        attributes |= {
            "low_freq_factor": float(rope.low_freq_factor),
            "high_freq_factor": float(rope.high_freq_factor),
            "original_max_position": rope.original_max_position,
        }
    return attributes
