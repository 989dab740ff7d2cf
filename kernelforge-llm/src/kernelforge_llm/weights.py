"""The table of weights that an architecture draws its constants from, and the formats they can be converted to."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Literal

from kernelforge.dtype import ACTIVATION_FORMAT, FLOATS, GROUP, WEIGHT_FORMATS, from_numpy, to_numpy
from kernelforge.errors import AssetError, KernelForgeWarning, UsageError
from kernelforge_llm.checkpoint import missing_tensor

if TYPE_CHECKING:
    from kernelforge.graph import Graph, Tensor
    from kernelforge_llm.checkpoint import TensorSource

WeightFormat = Literal["native", "f32", "bf16", "f16", "q8", "q4"]
"""What matrices are converted to when a model is compiled; "native" leaves them as they are in the checkpoint."""

ActivationFormat = Literal["auto", "f32", "q8"]
"""What activations are converted to before they are multiplied by quantised weights; "auto" is q8 where the device says that
it is fastest so."""

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")

_DERIVED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of tensors that older checkpoints carry and that follow from the config."""


def check_layers(source: TensorSource, layers: int, where: str) -> None:
    """Raises AssetError when the names of tensors (`model.layers.7.mlp.up_proj.weight`) are of fewer layers than that."""
    found = [int(match[1]) for name in source.names() if (match := _LAYER.match(name))]
    if found and max(found) + 1 < layers:
        raise AssetError(
            f"{where}: num_hidden_layers is {layers}, but the weights have {max(found) + 1} layers",
            hint="is this the config.json that belongs to the weights?",
        )


class WeightTable:
    """Declares weights as constants of a graph, after checking them against the checkpoint."""

    def __init__(
        self,
        g: Graph,
        source: TensorSource,
        weights: WeightFormat,
        where: str,
        activations: ActivationFormat = "f32",
    ) -> None:
        """`where` names the checkpoint in messages."""
        self._g, self._source, self._format, self._where = g, source, weights, where
        self._activations = activations
        self._names = frozenset(source.names())
        self._made: dict[str, Tensor] = {}
        self._left: list[str] = []

    def matrix(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A matrix or table in the format that the user chose; float64 becomes f32.

        Raises AssetError when the checkpoint has no such tensor, or one of another shape, or one that is not of floats.
        """
        return self._tensor(name, shape, self._format)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm's weight or a bias, always f32: they are small. Raises as `matrix`."""
        return self._tensor(name, shape, "f32")

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x @ matrix.T, where `matrix` [N, K] is one of this table; x in 8 bits if that was chosen and the matrix is
        quantised."""
        if self._activations == "q8" and matrix.dtype in WEIGHT_FORMATS and x.dtype == "f32":
            x = self._g.quantize(x, ACTIVATION_FORMAT)
        return self._g.matmul(x, matrix, transpose_rhs=True)

    def _tensor(self, name: str, shape: tuple[int, ...], wanted: WeightFormat) -> Tensor:
        if name not in self._made:
            tensor = self._g.constant(name, shape, self._checked_dtype(name, shape))
            if wanted in WEIGHT_FORMATS and tensor.dtype != wanted and shape[-1] % GROUP:
                self._left.append(name)
                wanted = "native"
            self._made[name] = self._converted(tensor, wanted)
        return self._made[name]

    def _converted(self, tensor: Tensor, wanted: WeightFormat) -> Tensor:
        if wanted == "native":
            return self._g.cast(tensor, "f32") if tensor.dtype == "f64" else tensor
        if wanted == tensor.dtype:
            return tensor
        if tensor.dtype in WEIGHT_FORMATS:
            tensor = self._g.dequantize(tensor, "f32" if wanted in WEIGHT_FORMATS else wanted)
        if wanted in WEIGHT_FORMATS:
            return self._g.quantize(tensor, wanted)
        return tensor if tensor.dtype == wanted else self._g.cast(tensor, wanted)

    def _checked_dtype(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self._names:
            raise missing_tensor(name, tuple(sorted(self._names)), self._where)
        found, dtype = tuple(self._source.shape(name)), self._source.dtype(name)
        if found != shape:
            raise AssetError(
                f"{self._where}: tensor {name!r} has shape {list(found)}, its config.json asks for {list(shape)}",
                hint="is this the config.json that belongs to the weights?",
            )
        try:
            known = from_numpy(dtype)
        except UsageError:
            known = ""
        if known not in (*FLOATS, *WEIGHT_FORMATS):
            raise AssetError(
                f"{self._where}: tensor {name!r} holds {dtype.name} numbers, which is not supported",
                hint=f"supported: {', '.join(to_numpy(name).name for name in FLOATS)}",
            )
        return known

    def warn_not_quantised(self) -> bool:
        """Warn of matrices that stay as they are in the checkpoint although they were to be quantised, if there are any."""
        from kernelforge.quant import warn_not_quantised

        if self._left:
            warn_not_quantised(self._left)
        return bool(self._left)

    def warn_unused(self, known: tuple[str, ...] = ()) -> bool:
        """Warn of tensors that nobody asked for, less those in `known`: a sign that config.json is of another model."""
        left = self._names - self._made.keys() - frozenset(known)
        unused = sorted(name for name in left if not name.endswith(_DERIVED))
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            warnings.warn(
                f"{self._where} has tensors that are not used: {', '.join(unused[:3])}{more}",
                KernelForgeWarning,
                stacklevel=2,
            )
        return bool(unused)
