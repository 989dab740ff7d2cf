"""Models for core's verbs (`tune --model`, `why --model`, `emit-mlir --model`): a decode and a prefill program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from kernelforge.importer import ImportedModel
from kernelforge.variant import ASYNCHRONOUS
from kernelforge_llm.checkpoint import REPO_ID
from kernelforge_llm.config import CONFIG_FILE
from kernelforge_llm.gguf import is_gguf
from kernelforge_llm.shapes import NAMED_SHAPES

if TYPE_CHECKING:
    from kernelforge.variant import DeviceInfo
    from kernelforge_llm.cache import CacheFormat
    from kernelforge_llm.weights import ActivationFormat, WeightFormat


class LlmImporter:
    """Reads Hugging Face folders, `org/name` on the Hub, GGUF files, and named shapes (with random weights; `tinypy` is
    real)."""

    def claims(self, source: str) -> bool:
        path = Path(source).expanduser()
        if is_gguf(path):
            return True
        if path.exists():
            folder = path if path.is_dir() else path.parent
            return (folder / CONFIG_FILE).is_file()
        return source in NAMED_SHAPES or REPO_ID.fullmatch(source) is not None

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
        """The step for one token (`decode`) and for many (`prefill`) of one sequence; for a device that draws tokens itself, also
        the one that does (`decode-sampled`). Raises as `Model.make`."""
        from kernelforge.registry import default_registry
        from kernelforge_llm.model import Model
        from kernelforge_llm.source import any_source

        opened = any_source(source)
        model = Model.make(
            opened,
            default_registry(),
            weights=cast("WeightFormat", weights),  # checked by make
            activations=cast("ActivationFormat", activations),
            kv_dtype=cast("CacheFormat", kv_dtype),
            context=context,
            device=device,
        )
        draws = device is not None and ASYNCHRONOUS in device.features  # elsewhere the host does
        programs = (*model.programs, model.sampled) if draws else model.programs
        return ImportedModel(opened.name, programs, opened.tensors)
