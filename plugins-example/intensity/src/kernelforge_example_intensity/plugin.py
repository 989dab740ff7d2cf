"""Registers the command `kernelforge intensity`."""

from __future__ import annotations

from kernelforge.descriptors import CommandSpec
from kernelforge.hookspecs import hookimpl


@hookimpl
def kernelforge_commands() -> list[CommandSpec]:
    summary = "Tell how many operations a problem does for each byte it moves."
    return [CommandSpec("intensity", "kernelforge_example_intensity.verb:intensity", summary)]
