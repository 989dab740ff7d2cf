"""What the loaded plugins bring, as one immutable object; the rest of the program asks it and never a plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, ImporterSpec, PassSpec, TunerSpec
from kernelforge.errors import DeviceError, KernelForgeError, PluginError, UsageError
from kernelforge.faults import leave_out
from kernelforge.lazy import resolve
from kernelforge.locks import Once
from kernelforge.variant import KernelVariant

if TYPE_CHECKING:
    from kernelforge.backend import Backend
    from kernelforge.op import OpDef

T = TypeVar("T")

State = Literal["loaded", "failed", "disabled", "incompatible", "quarantined"]

FIRST_PARTY_TARGETS = {"cpu": "kernelforge-cpu", "gpu": "kernelforge-metal"}
"""Targets that a user may know from the documentation, and the distribution each comes with."""


@dataclass(frozen=True)
class PluginStatus:
    """What became of a plugin."""

    name: str
    """Entry-point name."""
    distribution: str
    version: str
    state: State
    error: str = ""
    """Why it is not loaded."""
    remedy: str = ""
    """What the user can do about that."""
    requires: str = ""
    """The range of kernelforge-core that its distribution declares."""
    seconds: float = 0.0
    """How long importing it and calling its hooks took."""
    contributions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What it registers: hook name to the names of its descriptors."""

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({f'{self.distribution} {self.version}'.rstrip()})"

    @property
    def report(self) -> str:
        """Who is not loaded and why, as a sentence."""
        return f"{self} {'failed' if self.state == 'failed' else f'is {self.state}'}: {self.error}"

    @property
    def broken(self) -> bool:
        """Whether it should be there and is not."""
        return self.state not in ("loaded", "disabled")


@dataclass(frozen=True)
class Registry:
    """Descriptors by hook name, in the order of the plugins; the fate of each plugin. Made by `kernelforge.plugins`."""

    hooks: Mapping[str, tuple[Any, ...]]
    plugins: Mapping[str, PluginStatus]
    """By entry-point name, in loading order."""
    unheeded: tuple[str, ...] = ()
    """Messages about plugins that were to be left out and are not there, or cannot be."""

    @cached_property
    def dialects(self) -> Mapping[str, DialectSpec]:
        return self._by_name("kernelforge_dialects")

    @cached_property
    def passes(self) -> Mapping[str, PassSpec]:
        return self._by_name("kernelforge_passes")

    @cached_property
    def tuners(self) -> Mapping[str, TunerSpec]:
        return self._by_name("kernelforge_tuners")

    @cached_property
    def backends(self) -> Mapping[str, BackendSpec]:
        return self._by_name("kernelforge_backends")

    @cached_property
    def importers(self) -> Mapping[str, ImporterSpec]:
        return self._by_name("kernelforge_importers")

    @cached_property
    def commands(self) -> Mapping[str, CommandSpec]:
        """By what is typed: "tune", or "plugins list"."""
        return MappingProxyType({command_key(spec): spec for spec in self.hooks.get("kernelforge_commands", ())})

    @cached_property
    def ops(self) -> Mapping[str, OpDef]:
        """The ops of every dialect by full name, `dialect.op`. Importing their module happens here; a dialect that fails
        is left out, with a warning."""
        found: dict[str, OpDef] = {}
        for spec in self.dialects.values():
            try:
                found |= _ops_of(spec)
            except Exception as error:
                leave_out(f"dialect '{spec.name}'", spec.provenance, error)
        return MappingProxyType(found)

    def extra(self, hook_name: str) -> tuple[Any, ...]:
        """The descriptors of a hook that a plugin brought (`kernelforge_architectures`); empty when nobody has any."""
        return self.hooks.get(hook_name, ())

    def variants(self, op: str, target: str) -> tuple[KernelVariant, ...]:
        """The variants for an op on a target: highest priority first, then by name, the backend's fallback last."""
        return (*self._variants.get((target, op), ()), *self._fallback(op, target))

    def variant(self, target: str, op: str, name: str) -> KernelVariant:
        """Raises UsageError, naming those there are, when there is none of that name."""
        there = {variant.name: variant for variant in self.variants(op, target)}
        return lookup("variant", there, name, where=f" of {op} on target '{target}'")

    def backend_spec(self, target: str) -> BackendSpec:
        """The descriptor of `target`. Raises as `backend` does for one that is not there."""
        if target not in self.backends:
            raise self._no_target(target)
        return self.backends[target]

    def is_fallback(self, variant: KernelVariant) -> bool:
        """Whether it is what its target runs every op with that has no kernel of its own."""
        return variant in self._fallback(variant.op, variant.target)

    def backend(self, target: str) -> Backend:
        """The backend of `target`, made once.

        Raises UsageError for an unknown target, DeviceError when the package it comes with is not installed,
        PluginError when the plugin it comes with is not loaded or its backend cannot be.
        """
        if target not in self._made_backends:
            self._made_backends[target] = self._make_backend(target)
        return self._made_backends[target]

    def _make_backend(self, target: str) -> Backend:
        spec = self.backend_spec(target)
        try:
            loaded = resolve(spec.load)
            backend: Backend = loaded() if isinstance(loaded, type) else loaded
        except KernelForgeError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(f"target '{target}' of plugin {spec.provenance} cannot be loaded: {reason}") from error
        return backend

    def _no_target(self, target: str) -> KernelForgeError:
        distribution = FIRST_PARTY_TARGETS.get(target)
        if distribution is not None:
            for status in self.plugins.values():
                if status.distribution == distribution:
                    return PluginError(f"target '{target}' is not there: {status.report}", hint=status.remedy or None)
            others = f", or use --target {next(iter(self.backends))}" if self.backends else ""
            return DeviceError(
                f"target '{target}' comes with {distribution}, which is not installed",
                hint=f"pip install {distribution}{others}",
            )
        known = ", ".join(sorted({*self.backends, *FIRST_PARTY_TARGETS}))
        return UsageError(f"unknown target '{target}'", hint=f"one of: {known}{self.perhaps_theirs}")

    @property
    def perhaps_theirs(self) -> str:
        """What to add to "there is none of that name": who would have it, were it loaded."""
        broken = [status.name for status in self.plugins.values() if status.broken]
        return f" (plugins that are not loaded may have it: {', '.join(broken)})" if broken else ""

    @cached_property
    def _made_backends(self) -> dict[str, Backend]:
        return {}

    @cached_property
    def _variants(self) -> Mapping[tuple[str, str], tuple[KernelVariant, ...]]:
        table: dict[tuple[str, str], list[KernelVariant]] = {}
        for variant in self.hooks.get("kernelforge_kernels", ()):
            table.setdefault((variant.target, variant.op), []).append(variant)
        return {key: tuple(sorted(found, key=lambda v: (-v.priority, v.name))) for key, found in table.items()}

    def _fallback(self, op: str, target: str) -> tuple[KernelVariant, ...]:
        spec = self.backends.get(target)
        if spec is None or spec.fallback is None or op not in self.ops:
            return ()
        if (target, op) not in self._made_fallbacks:
            variant = resolve(spec.fallback)(self.ops[op])
            self._made_fallbacks[target, op] = replace(variant, provenance=spec.provenance)
        return (self._made_fallbacks[target, op],)

    @cached_property
    def _made_fallbacks(self) -> dict[tuple[str, str], KernelVariant]:
        return {}

    def _by_name(self, hook_name: str) -> Mapping[str, Any]:
        return MappingProxyType({descriptor.name: descriptor for descriptor in self.hooks.get(hook_name, ())})


def _ops_of(spec: DialectSpec) -> dict[str, OpDef]:
    """Raises PluginError for what are no ops, and whatever their module raises."""
    from kernelforge.op import OpDef

    found: dict[str, OpDef] = {}
    for op in resolve(spec.ops):
        if not isinstance(op, OpDef):
            raise PluginError(f"{op!r} among its ops is no OpDef")
        if op.name in found:
            raise PluginError(f"it has op '{op.name}' twice")
        found[op.name] = replace(op, dialect=spec.name)
    return {op.full_name: op for op in found.values()}


def command_key(spec: CommandSpec) -> str:
    return f"{spec.group} {spec.name}".strip()


def lookup(kind: str, there: Mapping[str, T], name: str, *, where: str = "") -> T:
    """`there[name]`, or a UsageError that says what there is (`where`) and what was probably meant."""
    if name in there:
        return there[name]
    names = f"one of: {', '.join(sorted(there))}" if there else "there is none; a plugin may bring one"
    raise UsageError(f"unknown {kind} '{name}'{where}", hint=did_you_mean(name, there) or names)


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The question after a name that is none of `names`, "" when none of them is near. Names are shown behind `prefix`."""
    from difflib import get_close_matches  # only errors need it

    near = [prefix + found for found in get_close_matches(name, list(names))]
    return f"did you mean {' or '.join(near)}?" if near else ""


@Once
def default_registry() -> Registry:
    """The registry of the installed plugins, loaded once per process."""
    from kernelforge.plugins import load_registry

    return load_registry()
