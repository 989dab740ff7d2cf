"""Models for core's verbs (`tune --model`, `why --model`, `emit-mlir --model`): a decode and a prefill program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kernelforge.importer import ImportedModel

from kernelforge_llm.shapes import NAMED_SHAPES

if TYPE_CHECKING:
    from kernelforge_llm.model import WeightFormat

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class LlmImporter:
    """Reads Hugging Face folders, `org/name` on the Hub, and the named shapes (with random weights; `tinypy` is real)."""

    def claims(self, source: str) -> bool:
        path = Path(source)
        if path.exists():
            return (path if path.is_dir() else path.parent).joinpath("config.json").is_file()
        return source in NAMED_SHAPES or _REPO_ID.fullmatch(source) is not None

    def load(self, source: str, *, weights: str = "native") -> ImportedModel:
        """The step for one token (`decode`) and for many (`prefill`) of one sequence."""
        from kernelforge.registry import default_registry

        from kernelforge_llm.model import Model
        from kernelforge_llm.source import any_source

        model = Model.make(any_source(source), default_registry(), weights=cast("WeightFormat", weights))
        return ImportedModel(source, model.programs, model.source.tensors)
