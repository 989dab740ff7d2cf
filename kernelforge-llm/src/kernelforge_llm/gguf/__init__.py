"""GGUF files (llama.cpp's model format): tensors, configuration and tokenizer in one file, read as untrusted input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelforge_llm.source import Source

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do, or is named as one."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> Source:
    """The model in a GGUF file. Raises `AssetError` for a file that is broken, cut off or not supported."""
    from kernelforge_llm.gguf.config import model_config
    from kernelforge_llm.gguf.file import GgufFile
    from kernelforge_llm.gguf.tensors import GgufTensors
    from kernelforge_llm.gguf.vocabulary import read_tokenizer
    from kernelforge_llm.source import Source

    file = GgufFile.open(path)
    config, generation = model_config(file)
    tensors = GgufTensors.of(file, config)
    return Source(path.stem, config, generation, tensors, read_tokenizer(file), path)
