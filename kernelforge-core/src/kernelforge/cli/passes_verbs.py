"""`kernelforge passes list`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from kernelforge.cli import output
from kernelforge.lazy import resolve


def list_passes() -> dict[str, Any]:
    """List the passes with their options, as they are written in a pipeline: `fuse-epilogue{residual=false},cse`."""
    out = output.current()
    passes: list[dict[str, Any]] = []
    for spec in out.registry.passes.values():
        try:
            options = {f.name: None if f.default is MISSING else f.default for f in fields(resolve(spec.load))}
        except Exception as error:
            out.warn(f"pass '{spec.name}' of {spec.provenance} cannot be loaded: {type(error).__name__}: {error}")
            continue
        passes.append(
            {"name": spec.name, "options": options, "summary": spec.summary, "plugin": spec.provenance.plugin}
        )
    out.table(
        ["pass", "options", "plugin", "summary"],
        [[p["name"], _options(p["options"]), p["plugin"], p["summary"]] for p in passes],
    )
    return {"passes": passes}


def _options(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={_text(value)}" for name, value in options.items()) or "-"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "(required)" if value is None else str(value)
