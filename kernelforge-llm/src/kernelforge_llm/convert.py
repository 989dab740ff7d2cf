"""A checkpoint's tensors in another dtype, for saving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernelforge.dtype import WEIGHT_FORMATS, from_numpy, to_numpy
from kernelforge.quant import dequantize
from kernelforge_llm.checkpoint import TensorSource

if TYPE_CHECKING:
    import numpy as np

    from kernelforge_llm.weights import WeightFormat

_HF_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True, eq=False)
class _Converted:
    source: TensorSource
    target: str

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return to_numpy(self.target) if len(self.shape(name)) > 1 else self.source.dtype(name)

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        array = self.source.tensor(name)
        if from_numpy(array.dtype) in WEIGHT_FORMATS:
            array = dequantize(array)
        return array.astype(self.dtype(name), copy=False)


def converted(source: TensorSource, weights: WeightFormat) -> TensorSource:
    """The same tensors with matrices in the dtype of `weights`, one converted at a time; themselves for "native".

    Norms and biases stay as they are: a model computes with them unconverted, whatever the format of its matrices.
    """
    return source if weights == "native" else _Converted(source, weights)


def converted_config(config: Mapping[str, Any], weights: WeightFormat) -> dict[str, Any]:
    """config.json with its dtype changed to fit, in the spelling it has."""
    changed = dict(config)
    if weights != "native":
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = _HF_NAMES[weights]
    return changed
