"""Everything known of a model before it is compiled: configs, tensors, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelforge.errors import UsageError
from kernelforge_llm.checkpoint import Checkpoint, TensorSource, resolve_model
from kernelforge_llm.config import CONFIG_FILE
from kernelforge_llm.config_file import read_config
from kernelforge_llm.gguf import is_gguf, open_gguf
from kernelforge_llm.quantised_folder import WEIGHTS, QuantisedFolder
from kernelforge_llm.shapes import NAMED_SHAPES, random_checkpoint
from kernelforge_llm.tokenizer import Tokenizer

TINYPY = Path(__file__).parent / "assets" / "tinypy"
"""The built-in checkpoint."""


@dataclass(frozen=True)
class Source:
    name: str
    """As people call it."""
    config: Mapping[str, Any]
    """Content of config.json."""
    generation: Mapping[str, Any]
    """Content of generation_config.json; may be empty."""
    tensors: TensorSource
    tokenizer: Tokenizer | None = None
    path: Path | None = None
    """The folder or the file."""

    @property
    def folder(self) -> Path | None:
        """The folder, of a model that is one."""
        return None if self.path is None or self.path.is_file() else self.path

    @property
    def config_file(self) -> str:
        """What to call the config in messages."""
        return str(self.folder / CONFIG_FILE) if self.folder else str(self.path or f"the config of {self.name}")


def open_source(path: str | os.PathLike[str] | None = None) -> Source:
    """The model at `path`: a Hugging Face folder, `org/name` on the Hub, a GGUF file; "tinypy" or None for the built-in one.

    Raises AssetError for a missing or broken one, UsageError for an empty name.
    """
    if path == "":  # as a path it would be the current folder
        raise UsageError(
            "the model's name is empty", hint="a folder, a GGUF file or org/name on the Hub; '.' is this folder"
        )
    if path is None or (str(path) == "tinypy" and not Path(path).exists()):
        folder, name = TINYPY, "tinypy"
    elif is_gguf(file := Path(path).expanduser()):
        return open_gguf(file)
    else:
        folder = resolve_model(path)
        name = folder.resolve().name if Path(path).expanduser().exists() else str(path)
    config, generation = read_config(folder)
    tensors = QuantisedFolder(folder) if (folder / WEIGHTS).is_file() else Checkpoint.open(folder)
    return Source(name, config, generation, tensors, Tokenizer.load(folder), folder)


def random_source(shape: str, seed: int = 0) -> Source:
    """Random weights at a named shape, for plumbing and benchmarks. Raises UsageError for an unknown shape."""
    tensors = random_checkpoint(shape, seed)
    return Source(f"random {shape}", NAMED_SHAPES[shape], {}, tensors)


def any_source(name: str) -> Source:
    """What core's `--model` takes: a path, a Hub name, "tinypy", or a named shape."""
    if name != "tinypy" and name in NAMED_SHAPES and not Path(name).exists():
        return random_source(name)
    return open_source(name)
