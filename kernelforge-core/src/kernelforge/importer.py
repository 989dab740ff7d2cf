"""From what `--model` names to modules: core verbs work on models without knowing any model format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kernelforge.backend import TensorSource
from kernelforge.variant import DeviceInfo


@dataclass(frozen=True)
class Program:
    """One module to be compiled: its text and what is known of its dynamic dimensions."""

    name: str
    """What it is for: "prefill", "decode"."""
    module: str
    """MLIR text of the `transformer` stage: before any pass."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dynamic dimensions that are fixed in this program (`{"tokens": 1}` for a decode step)."""
    max_dims: Mapping[str, int] = field(default_factory=dict)
    """Upper bounds of the others, for which memory is reserved at once; larger ones still run."""


@dataclass(frozen=True)
class ImportedModel:
    """What an importer makes of a model."""

    name: str
    programs: tuple[Program, ...]
    constants: TensorSource


class Importer(Protocol):
    """A reader of models: what `ImporterSpec.load` resolves to."""

    def claims(self, source: str) -> bool:
        """Whether this importer reads `source` (a path, a repository name, a named shape); cheap, reads no weights."""
        ...

    def load(
        self,
        source: str,
        *,
        weights: str = "native",
        activations: str = "auto",
        kv_dtype: str = "auto",
        context: int | None = None,
        device: DeviceInfo | None = None,
    ) -> ImportedModel:
        """Read it, as it would be compiled for a device. `weights`: "native" or the dtype to convert weights to.
        `activations`: what they are in beside quantised weights; "auto" leaves it to the device. `kv_dtype`: what a
        cache of keys and values is in. `context`: positions that it holds. What the user did not ask for is not passed.
        Raises AssetError for what is broken, UsageError for a dtype that it does not know or a context that cannot be."""
        ...
