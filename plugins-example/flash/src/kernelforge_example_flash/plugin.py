"""The pass `fuse-attention`: softmax(q @ k^T) @ v becomes `transformer.attention`, which never holds all scores at once."""

from __future__ import annotations

from kernelforge.descriptors import PassSpec
from kernelforge.hookspecs import hookimpl


@hookimpl
def kernelforge_passes() -> list[PassSpec]:
    summary = "Compute softmax(q @ k^T) @ v in one op."
    return [PassSpec("fuse-attention", "kernelforge_example_flash.fuse_attention:FuseAttention", summary)]
