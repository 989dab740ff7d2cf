"""Registers the tuner `annealing`: `kernelforge tune --tuner annealing`."""

from __future__ import annotations

from kernelforge.descriptors import TunerSpec
from kernelforge.hookspecs import hookimpl


@hookimpl
def kernelforge_tuners() -> list[TunerSpec]:
    summary = "From config to neighbouring config, uphill less and less often."
    return [TunerSpec("annealing", "kernelforge_example_annealing.annealing:Annealing", summary)]
