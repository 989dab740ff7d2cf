"""Plans on disk: a second start of the same module needs neither MLIR nor selection.

A plan's key is the hash of everything that decides it: the module's text, the pipeline, the sizes, the device, the forced
variants, the records, and the code of every plugin (names, sizes and times of its source files). Files are checked when they
are read; one that does not parse is planned anew and replaced. The folder is safe to delete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kernelforge import STARTED, home
from kernelforge.constant import Constant, Folded, Named
from kernelforge.discovery import GIVEN
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.plan import Fusion, PartKernel, Plan, Step, Value
from kernelforge.problem import parse_problem, parse_tensor_type
from kernelforge.selection import ConfigSource

if TYPE_CHECKING:
    from kernelforge.registry import Registry

FORMAT = 3
MAX_FILES = 256
"""The oldest plans beyond this number are deleted; one is some hundred kilobytes."""
CLOCK_STEP_S = 0.05
"""How far the time of a change may be behind the clock."""


_tensor_type = lru_cache(maxsize=1024)(parse_tensor_type)  # a model's layers are alike
_REF = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def cached_plan(key: str) -> Plan | None:
    """The plan stored under `key`; None when there is none or the file is damaged."""
    try:
        return plan_from_json((_folder() / f"{key}.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, UsageError) as error:
        warnings.warn(
            f"the cached plan {key[:12]} is damaged ({error}) and is made anew", KernelForgeWarning, stacklevel=2
        )
        return None


def keep_plan(key: str, plan: Plan) -> None:
    """Store `plan`; a folder that cannot be written costs the reuse, nothing else, and the object cache says so."""
    _keep(f"{key}.json", plan_to_json(plan))


def cached_text(key: str, kind: str) -> str | None:
    """A text of some kind that took long to write, stored under `key`; None when there is none or the file is damaged."""
    try:
        content = (_folder() / f"{key}.{kind}").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    digest, _, text = content.partition("\n")
    return text if digest == _digest(text) else None


def keep_text(key: str, kind: str, text: str) -> None:
    """Store a text, as `keep_plan` does a plan."""
    _keep(f"{key}.{kind}", f"{_digest(text)}\n{text}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(name: str, content: str) -> None:
    if any(_fresh_stamp(packages) != stamp for packages, stamp in _stamps.items()):
        return  # code that changed meanwhile may have made it
    try:
        home.write_atomic(_folder() / name, content)
        files = sorted(_folder().glob(f"*{Path(name).suffix}"), key=lambda f: f.stat().st_mtime)
        for file in files[:-MAX_FILES]:
            file.unlink(missing_ok=True)
    except OSError:
        return


def plan_key(*parts: object) -> str:
    """The hash of `parts` by their text."""
    return hashlib.sha256("\0".join(map(str, (FORMAT, *parts))).encode()).hexdigest()


def code_stamp(registry: Registry) -> str | None:
    """Changes when the source of any plugin changes, or another one is installed; None when that cannot be told: a plugin was
    given as an object, whose code may be anywhere, or a file was changed after this process began, which may run what it
    held before."""
    packages = {"kernelforge"}
    for descriptor in (d for found in registry.hooks.values() for d in found):
        for value in vars(descriptor).values():
            if isinstance(value, str) and _REF.fullmatch(value):
                packages.add(value.partition(":")[0].partition(".")[0])
            elif callable(value):
                packages.add(value.__module__.partition(".")[0])
        if descriptor.provenance.distribution == GIVEN:
            return None
    return _stamp(tuple(sorted(packages)))


def _stamp(packages: tuple[str, ...]) -> str | None:
    """Looked at once: what is kept is checked against the files again."""
    if packages not in _stamps:
        _stamps[packages] = _fresh_stamp(packages)
    return _stamps[packages]


_stamps: dict[tuple[str, ...], str | None] = {}


def _fresh_stamp(packages: tuple[str, ...]) -> str | None:
    digest = hashlib.sha256()
    for package in packages:
        digest.update(f"{package}\n".encode())
        for file, status in sorted(_sources(package), key=lambda found: found[0]):
            # Setting a file's time back does not set back when that was done.
            changed = status.st_mtime if sys.platform == "win32" else status.st_ctime
            if changed > STARTED - CLOCK_STEP_S:
                return None
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _sources(package: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a package, imported or not; none of one that is not there."""
    module = sys.modules.get(package)
    spec = find_spec(package) if module is None else getattr(module, "__spec__", None)
    if spec is None:
        return
    for folder in spec.submodule_search_locations or ():
        yield from _python_files(folder)
    if spec.submodule_search_locations is None and spec.has_location and spec.origin:
        yield spec.origin, Path(spec.origin).stat()


def _python_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Below a folder. A third of the time that Path.rglob takes, at each start."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".py"):
            yield entry.path, entry.stat()
        elif entry.is_dir() and entry.name != "__pycache__":
            yield from _python_files(entry.path)


def _folder() -> Path:
    return home.cache_dir() / "plans"


# --- a plan as JSON ---


def plan_to_json(plan: Plan) -> str:
    constants: dict[str, int] = {}
    table: list[Any] = []
    document = {
        "format": FORMAT,
        "target": plan.target,
        "values": [_value_out(v, constants, table) for v in plan.values],
        "steps": [
            [
                str(s.problem),
                s.dims,
                s.operands,
                s.results,
                s.variant,
                dict(s.config),
                s.group,
                s.location,
                s.config_source,
            ]
            for s in plan.steps
        ],
        "inputs": plan.inputs,
        "outputs": plan.outputs,
        "max_dims": dict(plan.max_dims),
        "constants": table,
        "fusions": [
            [str(f.problem), f.dims, f.apart, f.reason, f.forced, [[p.problem, p.variant, p.plugin] for p in f.parts]]
            for f in plan.fusions
        ],
    }
    return json.dumps(document, separators=(",", ":"))


def plan_from_json(text: str) -> Plan:
    """Inverse of `plan_to_json`. Raises ValueError, KeyError, TypeError or UsageError for a text that is not a plan."""
    document = json.loads(text)
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}, wants {FORMAT}")
    table: list[Constant] = []
    for entry in document["constants"]:
        table.append(_constant_in(entry, table))
    values = tuple(_value_in(entry, table) for entry in document["values"])
    problem = cache(parse_problem)
    steps = tuple(
        Step(problem(p), tuple(dims), tuple(operands), tuple(results), variant, config, group, location, source)
        for p, dims, operands, results, variant, config, group, location, source in document["steps"]
    )
    if unknown := {s.config_source for s in steps}.difference(get_args(ConfigSource)):
        raise ValueError(f"a config comes from '{min(unknown)}'")
    numbers = [v for s in steps for v in (*s.operands, *s.results) if v is not None]
    inputs, outputs = tuple(document["inputs"]), tuple(document["outputs"])
    if any(not 0 <= v < len(values) for v in (*numbers, *inputs, *outputs)):
        raise ValueError("a value that does not exist is used")
    fusions = tuple(
        Fusion(problem(p), tuple(dims), apart, reason, forced, tuple(PartKernel(*part) for part in parts))
        for p, dims, apart, reason, forced, parts in document["fusions"]
    )
    return Plan(document["target"], values, steps, inputs, outputs, document["max_dims"], fusions)


def _value_out(value: Value, known: dict[str, int], table: list[Any]) -> list[Any]:
    constant = None if value.constant is None else _constant_out(value.constant, known, table)
    return [str(value.type), value.place, value.name, value.base, value.offset, constant, value.donated]


def _value_in(entry: list[Any], table: list[Constant]) -> Value:
    text, place, name, base, offset, constant, donated = entry
    if place not in ("input", "constant", "arena", "output", "view"):
        raise ValueError(f"unknown place {place!r}")
    t = _tensor_type(text)
    return Value(t, place, name, base, offset, None if constant is None else table[constant], donated)


def _constant_out(constant: Constant, known: dict[str, int], table: list[Any]) -> int:
    """Its place in `table`, where the constants it is made of come before it."""
    if constant.key not in known:
        if isinstance(constant, Named):
            entry: Mapping[str, Any] = {"name": constant.name, "type": str(constant.type)}
        else:
            operands = [None if c is None else _constant_out(c, known, table) for c in constant.operands]
            entry = {"problem": str(constant.problem), "operands": operands, "result": constant.result}
        known[constant.key] = len(table)
        table.append(entry)
    return known[constant.key]


def _constant_in(entry: Mapping[str, Any], table: list[Constant]) -> Constant:
    if "name" in entry:
        return Named(entry["name"], _tensor_type(entry["type"]))
    operands = tuple(None if i is None else table[i] for i in entry["operands"])
    return Folded(parse_problem(entry["problem"]), operands, entry["result"])
