"""Decoder language models on KernelForge: `load` a checkpoint, then ask its `Decoder` for logits or text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernelforge_llm.decoder import Decoder, load

__all__ = ["Decoder", "load"]


def __getattr__(name: str) -> object:
    # Importing this package must stay cheap: its plugin module is imported by every command.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kernelforge_llm import decoder

    return getattr(decoder, name)
