"""A record: one verified measurement of a kernel, as data that explains itself on any machine."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from kernelforge.variant import Config, KernelVariant, config_key

SCHEMA = 1
"""Version of a record's fields; it changes when one is removed or changes its meaning."""

Status = Literal["ok", "wrong-result", "error"]
"""How a trial ended. Failures are kept, so that they are not tried again."""


class RecordError(ValueError):
    """A line that is not a record, and why."""


@dataclass(frozen=True)
class Record:
    """One trial of one config of one variant on one problem and device."""

    problem: str
    """Key of the static, canonical problem."""
    op: str
    target: str
    variant: str
    config: Config
    device: str
    """Its name, for people."""
    fingerprint: str
    """Of the device: measurements of different fingerprints are not mixed."""
    threads: int
    plugin: str
    distribution: str
    variant_version: str
    kernel_hash: str
    status: Status
    message: str = ""
    """Of a failure: what happened."""
    samples_s: tuple[float, ...] = ()
    """Seconds of single runs, in the order they were taken; thinned out evenly when there were many."""
    median_s: float = 0.0
    """Of all samples."""
    error: float = 0.0
    """Largest difference from the float64 reference over the reference's largest magnitude."""
    timing_source: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what may change the kernel's speed: Python, numpy, the compilers."""
    unix_time: float = 0.0
    """When the trial ended."""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise RecordError(f"status '{self.status}' is not one of {', '.join(get_args(Status))}")
        if self.status == "ok":
            times = (*self.samples_s, self.median_s)
            if not self.samples_s or not all(math.isfinite(t) and t > 0 for t in times):
                raise RecordError("a successful trial needs positive, finite times")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def subject(self) -> tuple[str, ...]:
        """What was tried: equal subjects are measurements of the same thing, of which the latest counts."""
        kernel = (self.target, self.op, self.variant, self.variant_version, self.kernel_hash, config_key(self.config))
        return (*kernel, self.problem, self.fingerprint, str(self.threads))

    def line(self) -> str:
        """One line of JSON, without the newline."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "Status": str,
    "int": int,
    "float": (int, float),
    "Config": dict,
    "Mapping[str, str]": dict,
    "tuple[float, ...]": list,
}


def parse_record(line: str) -> Record:
    """Inverse of `Record.line`. Raises RecordError with what is wrong."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordError("not JSON (torn?)") from None
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise RecordError("not a tuning record")
    if data["schema"] != SCHEMA:
        raise RecordError(f"of schema {data['schema']}, this version reads {SCHEMA}")
    known = {f.name: f for f in fields(Record)}
    if missing := known.keys() - data.keys():
        raise RecordError(f"field '{min(missing)}' is missing")
    values: dict[str, Any] = {}
    for name, f in known.items():
        value = data[name]
        if not isinstance(value, _KINDS[str(f.type)]) or isinstance(value, bool):
            raise RecordError(f"field '{name}' must be of type {f.type}")
        if f.type == "float" and not _finite(value):
            raise RecordError(f"field '{name}' must be a finite number")
        values[name] = value
    if not all(_finite(s) for s in values["samples_s"]):
        raise RecordError("field 'samples_s' must hold finite numbers")
    if not all(isinstance(v, str) for v in values["versions"].values()):
        raise RecordError("field 'versions' must hold strings")
    if not all(isinstance(v, (int, str)) for v in values["config"].values()):
        raise RecordError("field 'config' must hold numbers and strings")
    values["samples_s"] = tuple(values["samples_s"])
    return Record(**values)


def _finite(value: object) -> bool:
    """Whether it is a number, and a finite one."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # JSON has integers that no float holds
        return False


LARGE = 1 << 20
"""Bytes of a file that is no source: its size stands for its contents."""


def kernel_hash(variant: KernelVariant) -> str:
    """Identifies the code behind a variant: all sources of the package that builds it, since kernels share what emits them,
    its version and its distribution's.

    The package is found, not imported.
    """
    build = variant.build
    module = build.partition(":")[0] if isinstance(build, str) else build.__module__
    parts = [variant.key, variant.version, variant.provenance.version, module, _source_digest(module)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _source_digest(module: str) -> str:
    """Digest of the outermost package that a module lies in, or of its only file; empty when nothing can be read."""
    name, _, inner = module.partition(".")
    while (file := _file_of(name)) is None and inner:  # a namespace, shared with other distributions
        part, _, inner = inner.partition(".")
        name = f"{name}.{part}"
    return "" if file is None else _files_digest(file)


@cache
def _files_digest(file: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(file.parent.rglob("*")) if file.name == "__init__.py" else [file]
    try:
        for each in files:
            if each.is_file() and "__pycache__" not in each.parts:
                size = each.stat().st_size
                digest.update(f"{each.relative_to(file.parent).as_posix()} {size}\n".encode())
                if size < LARGE:
                    digest.update(each.read_bytes())
    except OSError:
        return ""
    return digest.hexdigest()


def _file_of(module: str) -> Path | None:
    """The file of a module, which is not imported; None when it has none."""
    origin = getattr(sys.modules.get(module), "__file__", None)
    try:
        if origin is None:
            spec = find_spec(module)
            origin = spec.origin if spec is not None else None
    except (ImportError, ValueError):
        return None
    return Path(origin) if origin and Path(origin).is_file() else None
