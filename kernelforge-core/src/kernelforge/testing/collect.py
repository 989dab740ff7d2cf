"""All conformance cases of a plugin: of everything that it registers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from kernelforge.errors import DeviceError, PluginError, UsageError
from kernelforge.hookspecs import GROUP
from kernelforge.registry import PluginStatus, Registry, lookup
from kernelforge.testing.bench import Bench
from kernelforge.testing.case import DEFAULT_LEVEL, Case
from kernelforge.testing.expectations import Expectations, expectations_of
from kernelforge.variant import KernelVariant

FALLBACK_LEVELS = frozenset((1, 3))
"""Of what a backend runs all ops with alike: what one op computes is not its concern, but how tensors get there is."""


def plugin_status(registry: Registry, plugin: str) -> PluginStatus:
    """The status of a loaded plugin. Raises UsageError for an unknown name, PluginError for one that is not loaded."""
    status = lookup("plugin", registry.plugins, plugin)
    if status.state != "loaded":
        raise PluginError(status.report, hint=status.remedy or None)
    return status


@dataclass(frozen=True)
class Scope:
    """Which cases of a plugin are meant."""

    plugin: str
    level: int = DEFAULT_LEVEL
    """Up to this one; that of `case` when it has one."""
    target: str | None = None
    """Kernels of this target only."""
    op: str | None = None
    """Full or short name."""
    variant: str | None = None
    case: str | None = None
    """A case's name, or a pattern of them."""

    @property
    def narrowing(self) -> str:
        """The options that leave something out, but for the level; empty when none does."""
        options = {"target": self.target, "op": self.op, "variant": self.variant, "case": self.case}
        return " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)

    @property
    def upto(self) -> int:
        named = re.findall(r"/([1-6])/", self.case or "")
        return int(named[0]) if len(named) == 1 else self.level

    def beside(self, case: str) -> Scope:
        """The cases of the kernel, pass ... that a case is one of."""
        return replace(self, level=self.upto, case=f"{escape(re.split('/[1-6]/', case)[0])}/*")

    def wants(self, case: Case) -> bool:
        return (
            (self.op is None or self.op in (case.subject, case.subject.rpartition(".")[2]))
            and (self.variant is None or case.name == self.variant)
            and (self.case is None or case.id == self.case or fnmatchcase(case.id, self.case))
        )

    def wants_kernel(self, variant: KernelVariant) -> bool:
        """Whether any case of it may be meant."""
        start = f"{variant.key}/"
        known = re.split(r"[*?[]", self.case or "")[0]
        return (
            self.target in (None, variant.target)
            and self.op in (None, variant.op, variant.op.rpartition(".")[2])
            and self.variant in (None, variant.name)
            and (start.startswith(known) or known.startswith(start))
        )


def collect(bench: Bench, scope: Scope) -> list[Case]:
    """The cases that are meant, in an order that does not change. Kernels of a target without a device are not claimed.

    Raises UsageError for an unknown plugin or two cases of one name, PluginError for a plugin that is not loaded,
    DeviceError when the target that is asked for has no device.
    """
    from kernelforge.testing.backend_cases import backend_cases
    from kernelforge.testing.descriptor_cases import descriptor_cases
    from kernelforge.testing.dialect_cases import dialect_cases
    from kernelforge.testing.kernel_cases import kernel_cases
    from kernelforge.testing.pass_cases import pass_cases
    from kernelforge.testing.tuner_cases import tuner_cases

    registry = bench.registry
    plugin_status(registry, scope.plugin)
    cases: list[Case] = []
    for kind in (descriptor_cases, dialect_cases, pass_cases, tuner_cases, backend_cases):
        cases += kind(registry, scope.plugin)
    for variant in filter(scope.wants_kernel, variants_of(registry, scope.plugin)):
        try:
            info = bench.session(variant.target).device.info
        except (DeviceError, UsageError) as error:  # it has no device here, or is not installed
            if scope.target is not None:
                raise
            reason = str(error)
            cases.append(Case(f"{variant.key}/1/device", 1, variant.op, variant.name, _nothing, not_claimed=reason))
            continue
        levels = set(range(1, scope.upto + 1))
        if registry.is_fallback(variant):
            levels &= FALLBACK_LEVELS
        cases += kernel_cases(variant, registry.ops[variant.op], info, levels)
    kept = [case for case in cases if case.level <= scope.upto and scope.wants(case)]
    names = [case.id for case in kept]
    if len(set(names)) != len(names):
        raise UsageError(f"two cases are named '{next(n for n in names if names.count(n) > 1)}'")
    return kept


def variants_of(registry: Registry, plugin: str) -> list[KernelVariant]:
    """The kernel variants that a plugin registers, and those its backends run other ops with, by op."""
    found: list[KernelVariant] = []
    targets = {v.target for v in _own(registry.hooks.get("kernelforge_kernels", ()), plugin)}
    targets |= {b.name for b in _own(registry.backends.values(), plugin)}
    for target in sorted(targets):
        for op in registry.ops:
            found += _own(registry.variants(op, target), plugin)
    return found


def _nothing(bench: Bench) -> None:
    """Of a case that is not claimed."""


def expectations(plugin: str) -> Expectations:
    """What an installed plugin announces in its package; nothing for one that is not installed. Raises PluginError for a
    file that is wrong."""
    for entry in entry_points(group=GROUP, name=plugin):
        package = entry.module if _is_package(entry.module) else entry.module.rpartition(".")[0]
        return expectations_of(package) if package else Expectations()
    return Expectations()


def _is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _own(descriptors: Iterable[Any], plugin: str) -> list[Any]:
    return [d for d in descriptors if d.provenance.plugin == plugin]
