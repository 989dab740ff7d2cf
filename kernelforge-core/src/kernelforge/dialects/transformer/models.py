"""Shapes of real decoders, from which the ops draw their sample problems."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kernelforge.dtype import ACTIVATION_FORMAT
from kernelforge.op import OpDef, OperandTypes
from kernelforge.problem import Attr, Problem, TensorType


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder-only transformer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    """Width between the two halves of the MLP."""
    vocabulary: int


TINY = DecoderShape(256, 8, 4, 32, 704, 4096)
SMALL = DecoderShape(576, 9, 3, 64, 1536, 49152)
"""SmolLM2-135M."""
LARGE = DecoderShape(2048, 32, 8, 64, 8192, 32768)
"""A Llama of about 1B parameters."""
MODELS = (TINY, SMALL, LARGE)

TOKENS = (1, 7, 16, 64, 256)
"""Decoding alone, in a ragged batch, in a full batch; prompts."""

ACTIVATIONS = ("f32", "bf16", "f16")


def f32(*shape: int) -> TensorType:
    return TensorType(shape, "f32")


def activations(*shape: int) -> TensorType:
    """In 8 bits."""
    return TensorType(shape, ACTIVATION_FORMAT)


def i32(*shape: int) -> TensorType:
    return TensorType(shape, "i32")


def weight(dtype: str, *shape: int) -> TensorType:
    return TensorType(shape, dtype, constant=True)


def ragged(rng: random.Random, low: int, high: int) -> int:
    """A size that is no multiple of anything a kernel would like."""
    return rng.randrange(low, high) | 1


def make(op: OpDef, *operands: TensorType | None, **attrs: Attr) -> Problem:
    types: OperandTypes = operands
    return op.problem(types, attrs)
