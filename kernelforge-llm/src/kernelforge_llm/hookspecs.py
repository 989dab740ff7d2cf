"""The hook that this package adds for other plugins: model architectures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kernelforge.hookspecs import hookspec

if TYPE_CHECKING:
    from kernelforge_llm.architecture import ArchitectureSpec


@hookspec
def kernelforge_architectures() -> Iterable[ArchitectureSpec]:
    """Model architectures. Called once; each name (the class name in a checkpoint's config.json) is unique over all plugins."""
    raise AssertionError("a hook specification is never called")
