"""The hook that this package adds for other plugins: model architectures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kernelforge.hookspecs import hookspec

if TYPE_CHECKING:
    from kernelforge_llm.architecture import ArchitectureSpec


@hookspec
def kernelforge_architectures() -> Iterable[ArchitectureSpec]:
    """Model architectures. Called once; no two plugins may have one of the same name, the class name in config.json."""
    raise AssertionError("a hook specification is never called")
