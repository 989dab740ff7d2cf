"""A model ready to be compiled, and the graph of its step.

One module serves a prompt, a decode step, a padded batch and continuous batching: tokens of all sequences are laid end
to end, each with its position (negative: padding) and its cache slot; `rows` names the tokens whose logits are wanted.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from kernelforge.dtype import GROUP, QUANTISED, WEIGHT_FORMATS, from_numpy, to_numpy
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.importer import Program
from kernelforge.plan_cache import cached_text, code_stamp, keep_text, plan_key
from kernelforge.variant import INT8_ACTIVATIONS
from kernelforge_llm.architecture import Architecture, find_architecture
from kernelforge_llm.cache import CacheFormat, cache_dtype
from kernelforge_llm.checkpoint import save_checkpoint
from kernelforge_llm.config import ModelConfig
from kernelforge_llm.convert import converted, converted_config
from kernelforge_llm.weights import ActivationFormat, WeightFormat, WeightTable, check_layers

if TYPE_CHECKING:
    from kernelforge.dialects.transformer.rope import RopeAttributes
    from kernelforge.graph import Tensor
    from kernelforge.registry import Registry
    from kernelforge.variant import DeviceInfo
    from kernelforge_llm.source import Source

DEFAULT_CONTEXT = 4096
"""Positions of a cache when nothing else is asked for, if the model was made for as many."""

PREFILL_TOKENS = 512
"""Most tokens of one prefill step; a longer prompt takes several."""


CHOICE = ("temperature", "top_k", "top_p", "min_p", "uniform")
"""What a token is drawn by, in the order of the operands of `transformer.sample`."""


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
    """Per layer: [sequences, context, num_kv_heads, head_dim], updated in place."""
    values: tuple[Tensor, ...]
    context: int
    """Capacity of the cache in positions."""


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
    kv_dtype: CacheFormat = "auto"
    """What the cache keeps keys and values in."""
    activations: Literal["f32", "q8"] = "f32"
    """What activations are in when they are multiplied by quantised weights."""
    code: str | None = None
    """Stands for the code that writes the module's text, which is then kept on disk (`kernelforge.plan_cache`)."""

    @classmethod
    def make(
        cls,
        source: Source,
        registry: Registry,
        *,
        weights: WeightFormat = "native",
        context: int | None = None,
        sequences: int = 1,
        kv_dtype: CacheFormat = "auto",
        activations: ActivationFormat = "auto",
        device: DeviceInfo | None = None,
    ) -> Model:
        """Find the architecture and read the config. `device` answers for the formats that are left to it.

        Raises AssetError for what is broken or unknown, UsageError for a format, context or number of sequences that
        cannot be.
        """
        if weights not in get_args(WeightFormat):
            raise UsageError(f"unknown weight format '{weights}'", hint=f"one of: {', '.join(get_args(WeightFormat))}")
        if kv_dtype not in get_args(CacheFormat):
            raise UsageError(f"unknown cache format '{kv_dtype}'", hint=f"one of: {', '.join(get_args(CacheFormat))}")
        if activations not in get_args(ActivationFormat):
            known = ", ".join(get_args(ActivationFormat))
            raise UsageError(f"unknown format of activations '{activations}'", hint=f"one of: {known}")
        asked = activations
        if activations == "auto":
            activations = "q8" if device is not None and INT8_ACTIVATIONS in device.features else "f32"
        architecture = find_architecture(source.config, registry, source=source.config_file)
        config = architecture.config(source.config, source.generation, source=source.config_file)
        check_layers(source.tensors, config.num_layers, source.config_file)
        if context is not None and not 1 <= context <= config.max_position:
            raise UsageError(
                f"a context of {context} positions is not possible: the model was made for up to {config.max_position}",
                hint=f"from 1 to {config.max_position}",
            )
        if sequences < 1:
            raise UsageError(f"cannot hold {sequences} sequences", hint="at least 1")
        if kv_dtype == "q8" and config.head_dim % GROUP:
            raise UsageError(
                f"a q8 cache holds heads of a multiple of {GROUP} elements, this model's have {config.head_dim}",
                hint="choose f16 (--kv-dtype f16)",
            )
        context = context or min(config.max_position, DEFAULT_CONTEXT)
        code = code_stamp(registry)
        model = cls(source, architecture, config, weights, context, sequences, kv_dtype, activations, code)
        if asked == "q8" and model.activation_dtype != "q8":
            told = "activations stay in f32: only beside q8 and q4 weights can they be in q8 (--weights q8)"
            warnings.warn(KernelForgeWarning(told), stacklevel=2)
        return model

    @property
    def cache_dtype(self) -> str:
        """The dtype of the cache's buffers."""
        return cache_dtype(self.kv_dtype, "f16" if self.weights == "native" and self._stored_small else self.weights)

    @property
    def _stored_small(self) -> bool:
        """Whether the source has all its matrices in f16 or quantised."""
        tensors, small = self.source.tensors, [to_numpy(name) for name in ("f16", *QUANTISED)]
        return all(tensors.dtype(name) in small for name in tensors.names() if len(tensors.shape(name)) > 1)

    @property
    def activation_dtype(self) -> str:
        """What quantised weights are multiplied by; f32 where there are none."""
        tensors, quantised = self.source.tensors, [to_numpy(name) for name in WEIGHT_FORMATS]
        made = self.weights in WEIGHT_FORMATS
        stored = self.weights == "native" and any(tensors.dtype(name) in quantised for name in tensors.names())
        return self.activations if made or stored else "f32"

    @property
    def programs(self) -> tuple[Program, Program]:
        """The step for one token of one sequence, and for any number of tokens and rows."""
        bounds = {"tokens": min(PREFILL_TOKENS, self.context), "rows": 1}
        one = Program("decode", self.module, dims={"tokens": 1, "rows": 1})
        return one, Program("prefill", self.module, max_dims=bounds)

    @property
    def sampled(self) -> Program:
        """As the first of `programs`, with the token that is drawn from the logits in place of the largest."""
        return Program("decode-sampled", self.sampled_module, dims={"tokens": 1, "rows": 1})

    @cached_property
    def module(self) -> str:
        """MLIR text of a step, before any pass.

        Inputs: tokens, positions, slots [tokens] i32, rows [rows] i32, and the caches `key.N` and `value.N`. Outputs:
        the updated caches, `logits` [rows, vocab] f32, `token` [rows] i32 (their argmax). Raises AssetError for a
        missing or misshapen tensor.
        """
        return self._module(sampled=False)

    @cached_property
    def sampled_module(self) -> str:
        """As `module`, with more inputs, all [rows]: `temperature`, `top_k` (i32), `top_p`, `min_p`, `uniform`. `token` is what
        they draw from the logits (`transformer.sample`)."""
        return self._module(sampled=True)

    def _module(self, *, sampled: bool) -> str:
        key = self._module_key(sampled=sampled)
        if key is not None and (kept := cached_text(key, "mlir")) is not None:
            return kept
        text, as_asked = self._write_module(sampled=sampled)
        if key is not None and as_asked:
            keep_text(key, "mlir", text)
        return text

    def _module_key(self, *, sampled: bool) -> str | None:
        """The hash of all that decides the text."""
        if self.code is None:
            return None
        tensors = self.source.tensors
        table = [(name, tensors.shape(name), tensors.dtype(name).str) for name in tensors.names()]
        choices = (self.weights, self.context, self.sequences, self.cache_dtype, self.activations, sampled)
        return plan_key("llm", self.code, type(self.architecture), self.config, *choices, table)

    def _write_module(self, *, sampled: bool) -> tuple[str, bool]:
        """The text, and whether no warning had to be given on the way."""
        from kernelforge.graph import Graph

        config = self.config
        g = Graph("main")
        where = str(self.source.path or self.source.name)
        table = WeightTable(g, self.source.tensors, self.weights, where, self.activations)
        cache_shape = (self.sequences, self.context, config.num_kv_heads, config.head_dim)
        tokens, positions, slots = (g.input(name, ("tokens",), "i32") for name in ("tokens", "positions", "slots"))
        rows = g.input("rows", ("rows",), "i32")
        keys, values = (
            tuple(g.input(f"{kind}.{i}", cache_shape, self.cache_dtype, donated=True) for i in range(config.num_layers))
            for kind in ("key", "value")
        )
        step = StepInputs(tokens, positions, slots, keys, values, self.context)
        states = self.architecture.hidden_states(g, config, table, step)
        with g.scope("lm_head"):
            tied = config.tie_word_embeddings
            name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            head = table.matrix(name, (config.vocab_size, config.hidden_size))
            scores = table.product(g.embedding(states, rows), head)  # [rows, vocab]
            g.output(scores, "logits")
            if sampled:
                choice = (g.input(n, ("rows",), "i32" if n == "top_k" else "f32") for n in CHOICE)
                g.output(g.sample(scores, *choice), "token")
            else:
                g.output(g.argmax(scores), "token")
        left = table.warn_not_quantised()
        unused = table.warn_unused(
            known=("lm_head.weight",) if tied else ()
        )  # some tied checkpoints hold the table twice
        return g.text(), not (left or unused)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a standard safetensors folder, in this weight format.

        Raises UsageError for a quantised format, and as `save_checkpoint`.
        """
        tensors = self.source.tensors
        kept = {from_numpy(tensors.dtype(name)) for name in tensors.names()} if self.weights == "native" else set()
        if quantised := ({self.weights} | kept).intersection(QUANTISED):
            raise UsageError(
                f"a safetensors folder cannot hold {min(quantised)} weights", hint="choose --weights f32, bf16 or f16"
            )
        save_checkpoint(
            Path(folder),
            converted_config(self.source.config, self.weights),
            converted(self.source.tensors, self.weights),
            generation=self.source.generation,
            tokenizer_from=self.source.folder or self.source.tokenizer,
        )


def rope_attributes(config: ModelConfig, context: int) -> RopeAttributes:
    """Attributes of the `rope` op for this model."""
    rope = config.rope
    attributes: RopeAttributes = {"theta": rope.theta, "max_position": context}
    if rope.kind != "default":
        attributes |= {"scaling": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        attributes |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position": rope.original_max_position,
        }
    return attributes
