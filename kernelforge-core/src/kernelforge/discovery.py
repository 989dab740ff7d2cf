"""Finding plugins and importing them safely: version range first, then quarantine, then their code."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernelforge import __version__, distributions
from kernelforge.distributions import UNKNOWN
from kernelforge.errors import KernelForgeWarning, PluginError
from kernelforge.hookspecs import GROUP
from kernelforge.interruption import own_interruptions
from kernelforge.provenance import Provenance
from kernelforge.quarantine import Quarantine
from kernelforge.registry import State

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

CORE = "core"
"""Entry-point name of the plugin with core's own descriptors: loaded first, and never left out."""

GIVEN = "given as an object"
"""Instead of a distribution, of a plugin that was not installed."""

QUICK_S = 2.0
"""An import that is interrupted sooner than this is not taken for one that does not end."""

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
    module: str = ""
    """Of an entry point: the module that it names."""
    installed: bool = True
    """Whether it is an entry point; otherwise it was handed over as an object."""
    seconds: float = 0.0
    """Spent on it so far."""
    _tested: bool = False
    """Whether its code is known to end."""

    @property
    def provenance(self) -> Provenance:
        return Provenance(self.name, self.distribution, self.version)

    @property
    def core_range(self) -> str:
        """The requirement on kernelforge-core as the distribution spells it, "" when it has none."""
        mine = (r for r in self.requirements if _CORE_REQUIREMENT.match(r) and "extra ==" not in r)
        return next(mine, "")

    @property
    def quarantine(self) -> Quarantine:
        return Quarantine(self.name, self.version, self.core_range)

    def import_plugin(self, *, retest: bool) -> object:
        """Run its code. Raises Refused before any of it runs, or whatever the code raises.

        `retest` imports a quarantined plugin again.
        """
        # Core cannot do without itself: a start that was killed must not lock the next one out.
        self._tested = not self.installed or self.name == CORE or self.quarantine.passed()
        if not self._tested:
            _check_core_range(self.core_range)
            if (reason := self.quarantine.left_over()) and not retest:
                raise Refused("quarantined", reason)
        with self.watched():
            return self.load()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Leave a trace if its code does not end meanwhile, unless it is known to.

        An interruption counts as no end where somebody may have waited for it, and the plugin is named.
        """
        if self._tested:
            with own_interruptions():
                yield
            return
        self.quarantine.begin()
        start = time.monotonic()
        try:
            with own_interruptions():
                yield
        except KeyboardInterrupt:
            if time.monotonic() - start < QUICK_S:
                self.quarantine.end()
            else:
                message = (
                    f"interrupted while importing plugin {self.provenance}: it is left out from the next start on; "
                    f"`kernelforge plugins retry {self.name}` imports it again"
                )
                warnings.warn(KernelForgeWarning(message), stacklevel=2)
            raise
        except BaseException:
            self.quarantine.end()
            raise
        self.quarantine.end()

    def passed(self) -> None:
        """All of its code ended: from now on it need not be watched."""
        if not self._tested:
            self.quarantine.keep(getattr(sys.modules.get(self.module), "__file__", None) or "")


def installed_plugins(given: Iterable[EntryPoint] | None) -> list[Candidate]:
    """The entry points given, or those of the environment: core first, then in name order."""
    found = distributions.entry_points(GROUP) if given is None else map(_with_header, given)
    return sorted(map(_candidate, found), key=lambda c: (c.name != CORE, c.name, c.distribution))


def plugin_object(plugin: object) -> Candidate:
    """A module or object with hooks as a plugin that is there already."""
    name = str(getattr(plugin, "__name__", type(plugin).__name__))
    return Candidate(name, GIVEN, "", load=lambda: plugin, installed=False)


def _with_header(given: EntryPoint) -> distributions.EntryPoint:
    told = {} if given.dist is None else distributions.header(given.dist)
    return distributions.EntryPoint(given.name, given.value, told)


def _candidate(entry_point: distributions.EntryPoint) -> Candidate:
    told = entry_point.header
    name, version = told.get("Name", [UNKNOWN])[0], told.get("Version", [""])[0]
    required = told.get("Requires-Dist", ())
    return Candidate(entry_point.name, name, version, entry_point.load, required, entry_point.module)


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
