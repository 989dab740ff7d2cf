"""Registers the target `loopback`: `kernelforge llm-inference --target loopback`."""

from __future__ import annotations

from kernelforge.descriptors import BackendSpec
from kernelforge.hookspecs import hookimpl


@hookimpl
def kernelforge_backends() -> list[BackendSpec]:
    here = "kernelforge_example_loopback.backend"
    return [BackendSpec("loopback", f"{here}:Loopback", "Numpy, and an account of what it ran.", f"{here}:variant")]
