"""Installed distributions and their entry points, found without `importlib.metadata` wherever that is possible.

What it imports, and its look at the files of every distribution, took longer than loading the plugins. Nothing is kept from one
start to the next, so a plugin installed a moment ago is seen. The file format:
https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Protocol

from kernelforge.errors import KernelForgeWarning

UNKNOWN = "unknown distribution"


class Distribution(Protocol):
    """An installed distribution; those of `importlib.metadata` are of this kind."""

    def read_text(self, filename: str, /) -> str | None:
        """One of the files that describe it, None when it is not there."""


@dataclass(frozen=True)
class InfoFolder:
    """A distribution that an installer left as a folder."""

    path: str

    def read_text(self, filename: str, /) -> str | None:
        # Most distributions have no entry points: a Path for each costs more than all that is read.
        with (
            suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
            open(f"{self.path}{os.sep}{filename}", encoding="utf-8") as file,  # noqa: PTH123
        ):
            return file.read()
        return None


@dataclass(frozen=True)
class EntryPoint:
    name: str
    value: str
    """Such as "package.module" or "package.module:attr"."""
    header: dict[str, list[str]]
    """The fields of its distribution's METADATA; see `header`."""

    @property
    def module(self) -> str:
        return self.value.partition("[")[0].partition(":")[0].strip()

    def load(self) -> Any:
        """Import what it names. Raises whatever that raises."""
        target = import_module(self.module)
        attribute = self.value.partition("[")[0].partition(":")[2].strip()
        for part in attribute.split(".") if attribute else ():
            target = getattr(target, part)
        return target


def entry_points(group: str) -> Iterator[EntryPoint]:
    """Those of a group. A distribution that comes later on the path than another of its name is hidden by it; one whose file
    cannot be read is left out, with a KernelForgeWarning."""
    seen: set[str] = set()
    for name, dist in _distributions():
        if name in seen:
            continue
        seen.add(name)
        try:
            found = list(_of_group(dist.read_text("entry_points.txt") or "", group))
            told = header(dist) if found else {}
        except Exception as error:
            _tell(f"the entry points of {name} cannot be read", error)
            continue
        yield from (EntryPoint(entry, value, told) for entry, value in found)


def version(distribution: str) -> str:
    """Of an installed distribution, "" of one that is not there or does not tell; one whose METADATA is damaged does not, with
    a KernelForgeWarning."""
    for name, dist in _distributions():
        if name == _normalized(distribution):
            try:
                return header(dist).get("Version", [""])[0]
            except ValueError as error:
                _tell(f"the version of {name} cannot be read; install it again", error)
                return ""
    return ""


def header(dist: Distribution) -> dict[str, list[str]]:
    """The fields of METADATA, which a damaged distribution may lack. Raises ValueError when it is no text.

    `importlib.metadata` would parse the whole file as an e-mail, again for each field.
    """
    fields: dict[str, list[str]] = {}
    for line in (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "").splitlines():
        if not line:
            break
        name, _, value = line.partition(":")
        fields.setdefault(name, []).append(value.strip())
    return fields


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions() -> Iterator[tuple[str, Distribution]]:
    """What is installed, with normalized names, in the order of the path. What lies in archives, or comes from another
    import hook than the usual one, is left to `importlib.metadata`."""
    if any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path):
        yield from _others(sys.path)
        return
    for folder in [entry for entry in sys.path if isinstance(entry, str)]:  # imports pass over the others, too
        try:
            names = [entry.name for entry in os.scandir(folder or os.curdir)]
        except NotADirectoryError:
            yield from _others([folder])
        except OSError:
            continue
        else:
            yield from _in_folder(folder or os.curdir, names)


def _in_folder(folder: str, names: Iterable[str]) -> Iterator[tuple[str, Distribution]]:
    for name in names:
        lower = name.lower()
        if lower.endswith((".dist-info", ".egg-info")):
            yield _name_in(name), InfoFolder(f"{folder}{os.sep}{name}")
        elif lower == "egg-info" and folder.lower().endswith(".egg"):
            yield _name_in(Path(folder).name), InfoFolder(f"{folder}{os.sep}{name}")


def _name_in(file_name: str) -> str:
    return _normalized(file_name.rpartition(".")[0].partition("-")[0])


def _others(path: list[str]) -> Iterator[tuple[str, Distribution]]:
    import importlib.metadata

    for dist in importlib.metadata.distributions(path=path):
        try:
            name = header(dist).get("Name", [UNKNOWN])[0]
        except ValueError as error:
            _tell("a distribution is left out, whose METADATA cannot be read", error)
            continue
        yield _normalized(name), dist


def _tell(what: str, error: Exception) -> None:
    message = f"{what}: {type(error).__name__}: {error}"
    warnings.warn(KernelForgeWarning(message), stacklevel=3)


def _of_group(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Name and value of each entry in the section of `group`. Raises ValueError for a line that is none."""
    section = ""
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == group:
            name, separator, value = line.partition("=")
            if not separator:
                raise ValueError(f"'{line}' is no entry point")
            yield name.strip(), value.strip()
