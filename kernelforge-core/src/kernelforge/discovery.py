"""Finding plugins and importing them safely: version range first, then quarantine, then their code."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kernelforge import __version__
from kernelforge.errors import PluginError
from kernelforge.hookspecs import GROUP
from kernelforge.provenance import Provenance
from kernelforge.quarantine import Quarantine
from kernelforge.registry import State

CORE = "core"
"""Entry-point name of the plugin with core's own descriptors: loaded first, and never left out."""

_CORE_REQUIREMENT = re.compile(r"kernelforge[-_.]+core(?![\w.-])", re.IGNORECASE)


class Refused(PluginError):
    """A plugin that is not loaded although its code did not fail: none of it ran."""

    def __init__(self, state: State, message: str) -> None:
        super().__init__(message)
        self.state: State = state


@dataclass
class Candidate:
    """A plugin on its way in."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]
    requirements: Sequence[str] = ()
    """What its distribution requires."""
    installed: bool = True
    """Whether it is an entry point; otherwise it was handed over as an object."""
    seconds: float = 0.0
    """Spent on it so far."""

    @property
    def provenance(self) -> Provenance:
        return Provenance(self.name, self.distribution, self.version)

    @property
    def core_range(self) -> str:
        """The requirement on kernelforge-core as the distribution spells it, "" when it has none."""
        mine = (r for r in self.requirements if _CORE_REQUIREMENT.match(r) and "extra ==" not in r)
        return next(mine, "")

    def import_plugin(self, *, retest: bool) -> object:
        """Run its code. Raises Refused before any of it runs, or whatever the code raises.

        `retest` imports a quarantined plugin again.
        """
        if not self.installed:
            return self.load()
        trace = Quarantine(self.name, self.version, self.core_range)
        if trace.passed():
            return self.load()
        _check_core_range(self.core_range)
        if (reason := trace.left_over()) and not retest:
            raise Refused("quarantined", f"{reason}; `kernelforge plugins check {self.name}` tests it again")
        trace.begin()
        try:
            plugin = self.load()
        except (Exception, SystemExit):
            trace.end(imported=False)
            raise
        trace.end(imported=True)
        return plugin


def installed_plugins(entry_points: Iterable[importlib.metadata.EntryPoint] | None) -> list[Candidate]:
    """The entry points given, or those of the environment: core first, then in name order."""
    found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    return sorted(map(_candidate, found), key=lambda c: (c.name != CORE, c.name, c.distribution))


def plugin_object(plugin: object) -> Candidate:
    """A module or object with hooks as a plugin that is there already."""
    name = str(getattr(plugin, "__name__", type(plugin).__name__))
    return Candidate(name, "given as an object", "", load=lambda: plugin, installed=False)


def _candidate(entry_point: importlib.metadata.EntryPoint) -> Candidate:
    dist = entry_point.dist
    if dist is None:
        return Candidate(entry_point.name, "unknown distribution", "", entry_point.load)
    return Candidate(entry_point.name, dist.name, dist.version, entry_point.load, dist.requires or ())


def _check_core_range(requirement: str) -> None:
    """Raises Refused when this version of core is outside of the range; no requirement allows all."""
    if not requirement:
        return
    # Imported for versions that were not loaded here before: the import takes longer than the rest of the loader.
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(requirement).specifier
    except InvalidRequirement as error:
        raise Refused("incompatible", f"its requirement '{requirement}' cannot be read: {error}") from None
    if not wanted.contains(__version__, prereleases=True):
        raise Refused("incompatible", f"it wants kernelforge-core{wanted}, this is {__version__}")
