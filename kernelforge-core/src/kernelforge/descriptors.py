"""The cheap, frozen descriptors that hooks return (kernel variants have their own file, `variant`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kernelforge.errors import PluginError
from kernelforge.lazy import Ref
from kernelforge.provenance import BUILTIN, Provenance

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def _check_name(kind: str, name: str) -> None:
    if not _KEBAB.fullmatch(name):
        raise PluginError(f"{kind} name '{name}' must be kebab-case: lower-case words joined by hyphens")


@dataclass(frozen=True)
class DialectSpec:
    """A dialect."""

    name: str
    ops: Ref
    """Resolves to a sequence of `OpDef` (their `dialect` field is filled in when they are loaded)."""
    summary: str = ""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(f"dialect name '{self.name}' must be an identifier")


@dataclass(frozen=True)
class PassSpec:
    """A pass."""

    name: str
    load: Ref
    """Resolves to a frozen dataclass that implements `kernelforge.passes.Pass`; its fields are the pass's options."""
    summary: str = ""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        _check_name("pass", self.name)


@dataclass(frozen=True)
class TunerSpec:
    """A search strategy."""

    name: str
    load: Ref
    """Resolves to a class that implements `kernelforge.tune.tuner.Tuner`."""
    summary: str = ""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        _check_name("tuner", self.name)


@dataclass(frozen=True)
class BackendSpec:
    """A target."""

    name: str
    """What `--target` takes."""
    load: Ref
    """Resolves to a class without constructor arguments that implements `kernelforge.backend.Backend`."""
    summary: str = ""
    fallback: Ref | None = None
    """`(OpDef) -> KernelVariant`: the variant that runs an op by its numpy reference. Called for every op of every
    dialect, so that the target can run also what no kernel was written for; None: it runs only what has a kernel."""
    roofline: Ref | None = None
    """`(Device) -> kernelforge.roofline.Roofline`: measures the limits of an open device, in about a second; None: the
    target does not offer that, and its speeds are shown without them."""
    flushes_subnormals: bool = False
    """Whether its kernels may take subnormal operands of f32 and bf16 for zero, as WGSL and SPIR-V leave open to each device:
    conformance then accepts what follows from that."""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        _check_name("backend", self.name)


@dataclass(frozen=True)
class ImporterSpec:
    """A reader of models."""

    name: str
    load: Ref
    """Resolves to a class without constructor arguments that implements `kernelforge.importer.Importer`."""
    summary: str = ""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        _check_name("importer", self.name)


@dataclass(frozen=True)
class CommandSpec:
    """A verb of the command line."""

    name: str
    load: Ref
    """Resolves to a typer-style function: annotated parameters become options, the docstring its help."""
    summary: str = ""
    """The line shown by `kernelforge --help`, so that listing verbs imports none of them."""
    group: str = ""
    """For sub-verbs: the verb they belong to (`plugins`, `records`); created on demand."""
    provenance: Provenance = BUILTIN

    def __post_init__(self) -> None:
        _check_name("command", self.name)
