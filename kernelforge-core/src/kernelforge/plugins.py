"""The plugin loader: from entry points to a `Registry`, one broken plugin at a time.

Two phases, core first and then in name order. One: import, and take in the hook specifications that a plugin brings.
Two: check its hooks against all specifications, call them, check and stamp their descriptors. A plugin that fails in
either is left out, with a warning; one that was asked for by name is an error.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from kernelforge import hookspecs
from kernelforge.descriptors import BackendSpec, CommandSpec, DialectSpec, ImporterSpec, PassSpec, TunerSpec
from kernelforge.disabled import disabled
from kernelforge.discovery import CORE, Candidate, Refused, installed_plugins, plugin_object
from kernelforge.errors import KernelForgeWarning, PluginError
from kernelforge.faults import STRICT, explain, without
from kernelforge.home import env_flag
from kernelforge.hookspecs import GROUP
from kernelforge.locks import Once
from kernelforge.provenance import Provenance
from kernelforge.registry import PluginStatus, Registry, State, command_key, did_you_mean
from kernelforge.variant import KernelVariant

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")

ONLY = "KERNELFORGE_PLUGINS"
"""Environment variable: the plugins to load, by name and separated by commas; all when it is empty."""

DISABLE = "KERNELFORGE_PLUGINS_DISABLE"
"""Environment variable: the plugins not to load."""

NOT_CORE = "core cannot be left out: it has the verbs"

DESCRIPTORS: dict[str, type[Any]] = {
    "kernelforge_dialects": DialectSpec,
    "kernelforge_passes": PassSpec,
    "kernelforge_kernels": KernelVariant,
    "kernelforge_tuners": TunerSpec,
    "kernelforge_backends": BackendSpec,
    "kernelforge_importers": ImporterSpec,
    "kernelforge_commands": CommandSpec,
}
"""What each of core's hooks returns. Hooks that a plugin brings return dataclasses with `name` and `provenance`."""

FIELDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int),
    "Ref": lambda value: isinstance(value, str) or callable(value),
    "Ref | None": lambda value: value is None or isinstance(value, str) or callable(value),
}
"""What the fields of descriptors hold, by the text of their types: a wrong one must fail here, not where it is used."""


def load_registry(
    allow: Iterable[str] | None = None,
    disable: Iterable[str] | None = None,
    extra_plugins: Iterable[object] = (),
    entry_points: Iterable[EntryPoint] | None = None,
) -> Registry:
    """Load plugins: the installed ones, or `entry_points`, and then `extra_plugins` (modules or objects with hooks).

    `allow` limits the entry points to these names (default: `KERNELFORGE_PLUGINS`, else all) and `disable` leaves some
    out (default: `KERNELFORGE_PLUGINS_DISABLE`, and those of `kernelforge plugins disable`); core is always loaded.

    Raises PluginError when a plugin named by `allow` is not there or fails, when one of `extra_plugins` fails, and in
    strict mode (`KERNELFORGE_PLUGINS_STRICT`) when any does. Other failures are KernelForgeWarnings and are kept in
    `Registry.plugins`, as are names to leave out that cannot be, in `Registry.unheeded`. What plugins print meanwhile goes
    to stderr.
    """
    allowed = names_in(ONLY) if allow is None else frozenset(allow)
    objects = [plugin_object(plugin) for plugin in extra_plugins]
    loader = _Loader(allowed, _switched_off() if disable is None else dict.fromkeys(disable, "by the caller"))
    loader.load([*installed_plugins(entry_points), *objects])
    _report(loader.statuses, [*sorted(allowed), *(candidate.name for candidate in objects)])
    unheeded = _unheeded(loader.statuses) if disable is None else ()
    for message in unheeded:
        warnings.warn(KernelForgeWarning(message), stacklevel=2)
    return Registry(
        hooks=MappingProxyType({hook: tuple(found) for hook, found in loader.descriptors.items()}),
        plugins=MappingProxyType(loader.statuses),
        unheeded=unheeded,
    )


def names_in(variable: str) -> frozenset[str]:
    """The names that an environment variable lists."""
    return frozenset(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


def _switched_off() -> dict[str, str]:
    """The plugins that the user does without, and by what."""
    by_variable = dict.fromkeys(names_in(DISABLE), f"by {DISABLE}")
    return dict.fromkeys(disabled(), "by `kernelforge plugins disable`") | by_variable


def _unheeded(statuses: dict[str, PluginStatus]) -> tuple[str, ...]:
    """What is wrong with names that the variable lists. No more than a warning: a plugin may be installed on other machines."""
    found = []
    for name in sorted(names_in(DISABLE)):
        if name == CORE:
            found.append(f"{DISABLE}: {NOT_CORE}")
        elif name not in statuses:
            error = _not_installed(name, statuses)
            found.append(f"{DISABLE}: {error}; {error.hint}")
    return tuple(found)


@Once
def core_registry() -> Registry:
    """Core's own descriptors: what is there without importing any other plugin."""
    return load_registry(allow=[CORE], disable=[])


def probe(name: str) -> PluginStatus:
    """Import one plugin, quarantined or not, and say what became of it. Raises PluginError when it is not installed."""
    loader = _Loader(frozenset({name}), {}, retest=True)
    loader.load(installed_plugins(None))
    if name not in loader.statuses:
        raise _not_installed(name, loader.statuses)
    return loader.statuses[name]


class _Loader:
    """What was loaded so far."""

    def __init__(self, allowed: frozenset[str], switched_off: Mapping[str, str], *, retest: bool = False) -> None:
        self._allowed, self._switched_off = allowed, switched_off
        self.statuses: dict[str, PluginStatus] = {}
        self.descriptors: dict[str, list[Any]] = {}
        self._retest = retest
        self._owners: dict[tuple[str, str], Provenance] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)

    def load(self, candidates: Iterable[Candidate]) -> None:
        with redirect_stdout(sys.stderr):
            imported = [
                (candidate, plugin) for candidate in candidates if (plugin := self._admit(candidate)) is not None
            ]
            for candidate, plugin in imported:
                fresh = self._attempt(candidate, partial(self._collect, candidate, plugin))
                if fresh is not None:
                    self._keep(candidate, fresh)
                elif self._manager.is_registered(plugin):
                    self._manager.unregister(plugin)

    def _admit(self, candidate: Candidate) -> object | None:
        """Phase one for a plugin that is wanted; what was imported."""
        name = candidate.name
        if name in self.statuses:
            key = f"{name} ({candidate.distribution})"
            remedy = f"`pip uninstall {candidate.distribution}` removes it"
            self._settle(candidate, "failed", f"the name '{name}' is taken by {self.statuses[name]}", remedy, key)
        elif name == CORE or not candidate.installed:
            return self._attempt(candidate, partial(self._import, candidate))
        elif name in self._switched_off:
            remedy = f"`kernelforge plugins enable {name}` brings it back" if name in disabled() else ""
            self._settle(candidate, "disabled", self._switched_off[name], remedy)
        elif self._allowed and name not in self._allowed:
            self._settle(candidate, "disabled", f"only others were asked for (--plugin, {ONLY})")
        else:
            return self._attempt(candidate, partial(self._import, candidate))
        return None

    def _attempt(self, candidate: Candidate, action: Callable[[], T]) -> T | None:
        """What `action` returns; None when it raised, which becomes the plugin's status. Only Ctrl-C passes."""
        start = time.perf_counter()
        result: T | None = None
        state: State = "loaded"
        reason = ""
        try:
            result = action()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            state = error.state if isinstance(error, Refused) else "failed"
            reason = explain(error)
        candidate.seconds += time.perf_counter() - start
        self._settle(candidate, state, reason, _remedy(candidate.name, state) if candidate.installed else "")
        return result

    def _settle(self, candidate: Candidate, state: State, error: str, remedy: str = "", key: str = "") -> None:
        self.statuses[key or candidate.name] = PluginStatus(
            candidate.name,
            candidate.distribution,
            candidate.version,
            state,
            error,
            remedy,
            candidate.core_range,
            candidate.seconds,
        )

    def _import(self, candidate: Candidate) -> object:
        """Phase one."""
        plugin = candidate.import_plugin(retest=self._retest)
        brought = getattr(plugin, "kernelforge_hookspecs", ())
        for specs in brought if isinstance(brought, (list, tuple)) else [brought]:
            self._manager.add_hookspecs(import_module(specs) if isinstance(specs, str) else specs)
        return plugin

    def _collect(self, candidate: Candidate, plugin: object) -> dict[str, list[Any]]:
        """Phase two: the plugin's descriptors by hook. Raises PluginError when one of its hooks is wrong."""
        with candidate.watched():
            self._manager.register(plugin, candidate.name)
            for name in vars(self._manager.hook):
                if callable(getattr(plugin, name, None)) and self._manager.parse_hookimpl_opts(plugin, name) is None:
                    raise PluginError(f"its function {name} lacks the decorator @hookimpl")
            return self._call_hooks(candidate, plugin)

    def _call_hooks(self, candidate: Candidate, plugin: object) -> dict[str, list[Any]]:
        fresh: dict[str, list[Any]] = {}
        for caller in self._manager.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is not plugin:
                    continue
                if caller.has_spec():
                    fresh[caller.name] = self._stamped(candidate.provenance, caller.name, impl.function())
                elif not impl.optionalhook:
                    raise self._unknown_hook(caller.name)
        return fresh

    def _stamped(self, owner: Provenance, hook: str, returned: Any) -> list[Any]:
        """The descriptors that a hook returned, checked and with their provenance."""
        if isinstance(returned, str) or not isinstance(returned, Iterable):
            raise PluginError(f"{hook} returned {returned!r}, wants an iterable of descriptors")
        stamped: dict[str, Any] = {}
        for descriptor in returned:
            _check_descriptor(hook, descriptor)
            key = key_of(descriptor)
            other = owner if key in stamped else self._owners.get((hook, key))
            if other is not None:
                raise PluginError(f"{hook}: '{key}' is already registered by {other}")
            if isinstance(descriptor, CommandSpec):
                self._check_verb(descriptor)
            stamped[key] = dataclasses.replace(descriptor, provenance=owner)
        return list(stamped.values())

    def _check_verb(self, spec: CommandSpec) -> None:
        """Raises PluginError for a group that is a verb already, and for a verb that is a group."""
        for other in self.descriptors.get("kernelforge_commands", ()):
            if spec.group == other.name and not other.group:
                raise PluginError(f"'{spec.group}' is a verb of {other.provenance}, so it cannot be a group of verbs")
            if spec.name == other.group and not spec.group:
                raise PluginError(f"'{spec.name}' is a group of verbs of {other.provenance}, so it cannot be a verb")

    def _keep(self, candidate: Candidate, fresh: dict[str, list[Any]]) -> None:
        candidate.passed()
        for hook, descriptors in fresh.items():
            self.descriptors.setdefault(hook, []).extend(descriptors)
            self._owners.update({(hook, key_of(d)): candidate.provenance for d in descriptors})
        self.statuses[candidate.name] = dataclasses.replace(
            self.statuses[candidate.name],
            contributions={hook: tuple(map(key_of, descriptors)) for hook, descriptors in sorted(fresh.items())},
        )

    def _unknown_hook(self, name: str) -> PluginError:
        prefix = "kernelforge_"  # it would make all names alike
        known = [hook.removeprefix(prefix) for hook, caller in vars(self._manager.hook).items() if caller.has_spec()]
        if guess := did_you_mean(name.removeprefix(prefix), known, prefix):
            return PluginError(f"there is no hook {name}: {guess}")
        return PluginError(
            f"there is no hook {name}: the plugin that defines it is not loaded",
            hint="@hookimpl(optionalhook=True) lets it be absent",
        )


def key_of(descriptor: Any) -> str:
    """What must be unique among the descriptors of a hook."""
    if isinstance(descriptor, KernelVariant):
        return descriptor.key
    return command_key(descriptor) if isinstance(descriptor, CommandSpec) else str(descriptor.name)


def _check_descriptor(hook: str, descriptor: Any) -> None:
    expected = DESCRIPTORS.get(hook)
    if expected is not None and not isinstance(descriptor, expected):
        raise PluginError(f"{hook} returned {descriptor!r} among its descriptors, wants {expected.__name__}")
    described = dataclasses.is_dataclass(descriptor) and not isinstance(descriptor, type)
    fields = {f.name: f for f in dataclasses.fields(descriptor)} if described else {}
    if not {"name", "provenance"} <= fields.keys():
        raise PluginError(f"{hook} returned {descriptor!r}, wants a dataclass with the fields name and provenance")
    for name, field in fields.items():
        kind = field.type if isinstance(field.type, str) else field.type.__name__
        if kind in FIELDS and not FIELDS[kind](value := getattr(descriptor, name)):
            raise PluginError(f"{hook}: {name} of {descriptor.name!r} is {value!r}, wants {kind}")


def _remedy(name: str, state: State) -> str:
    again = ""
    if state == "quarantined":
        again = (
            f"`kernelforge plugins check {name}` tests it in a process of its own, "
            f"`kernelforge plugins retry {name}` imports it at the next start, "
        )
    return "" if state == "loaded" else again + without(name)


def _report(statuses: dict[str, PluginStatus], wanted: Sequence[str]) -> None:
    """Raise for what was asked for by name, warn of the rest."""
    for name in wanted:
        if name not in statuses:
            raise _not_installed(name, statuses)
        status = statuses[name]
        if status.state != "loaded":
            raise PluginError(status.report, hint=status.remedy or None)
    broken = [status for status in statuses.values() if status.broken]
    if broken and env_flag(STRICT):
        raise PluginError(
            "; ".join(s.report for s in broken), hint="; ".join(s.remedy for s in broken if s.remedy) or None
        )
    for status in broken:
        warnings.warn(KernelForgeWarning(f"{status.report}; {status.remedy}".removesuffix("; ")), stacklevel=3)


def _not_installed(name: str, statuses: dict[str, PluginStatus]) -> PluginError:
    hint = did_you_mean(name, statuses) or f"there are: {', '.join(statuses)}"
    return PluginError(f"no plugin named '{name}' is installed", hint=hint)
