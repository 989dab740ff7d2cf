"""The user's measurements on disk: an append-only file of records, and the answers that selection wants from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from kernelforge import home
from kernelforge.errors import AssetError, KernelForgeError, KernelForgeWarning
from kernelforge.problem import Problem, TensorType, parse_problem
from kernelforge.selection import RecordMatch
from kernelforge.tune.record import Record, RecordError, kernel_hash, parse_record
from kernelforge.variant import DeviceInfo, KernelVariant, config_key

NEAREST_LIMIT = 3.0
"""Largest distance at which a measured shape still lends its config to another: a factor of 8 in one dimension, or of 2
in each of three."""

_NAMED_LINES = 5
"""How many unreadable lines a warning names."""


class RecordStore:
    """The records of one file, read once and kept in memory.

    Lines that cannot be read are skipped, and named in one KernelForgeWarning. A missing file is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: list[Record] | None = None
        self._index: dict[tuple[str, ...], list[Record]] = {}
        self._problems: dict[str, Problem | None] = {}

    @classmethod
    def default(cls) -> RecordStore:
        """The user's own file, `KERNELFORGE_HOME/autotune.jsonl`."""
        return cls(home.records_path())

    @property
    def records(self) -> Sequence[Record]:
        """All records, in the file's order."""
        return self._load()

    def stamp(self) -> str:
        """Place, size and time of the file."""
        try:
            status = self.path.stat()
        except OSError:
            return str(self.path)
        return f"{self.path} {status.st_size} {status.st_mtime_ns}"

    def append(self, record: Record) -> None:
        """Keep `record`: one whole line, written at once. Raises AssetError when the file cannot be written."""
        self._load()
        try:
            home.append_line(self.path, record.line())
        except OSError as error:
            raise self._not_written(error) from None
        self._remember(record)

    def current(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> dict[str, Record]:
        """By config key: the latest record of the variant as it is now, on exactly this problem and device."""
        key = str(problem)
        return {config_key(r.config): r for r in self._of(variant, device) if r.problem == key}

    def matches(self, problem: Problem, variant: KernelVariant, device: DeviceInfo) -> list[RecordMatch]:
        """Records of the variant as it is now, on this device: those of this problem by median, then others by
        distance.

        The distance of two problems is that of their operand or result that differs the most: the sum over its
        dimensions of |log2 of the ratio of sizes|. Types, attributes and layouts must agree, and NEAREST_LIMIT bounds
        it. A dynamic dimension matches every size; of equally near records the one measured at the larger size comes
        first.
        """
        key = str(problem)
        ranked: list[tuple[tuple[float, float, float], RecordMatch]] = []
        for record in self._of(variant, device):
            if not record.ok:
                continue
            exact = record.problem == key
            measured = self._problem(record.problem)
            away = 0.0 if exact or measured is None else distance(problem, measured)
            if measured is None or away > NEAREST_LIMIT:
                continue
            size = 0.0 if exact else -float(sum(t.size() for t in measured.results))
            rank = (-1.0 if exact else away, size, record.median_s)
            ranked.append((rank, RecordMatch(record.config, record.median_s, exact, record.problem)))
        return [match for _, match in sorted(ranked, key=lambda pair: pair[0])]

    def merge(self, path: Path) -> tuple[int, int]:
        """Append the records of another file that are not here yet: how many were new, and how many were known.

        Raises AssetError when it cannot be read or holds not one record.
        """
        try:
            found, problems = _parse(_lines(path))
        except OSError as error:
            raise AssetError(f"cannot read the records file {path}: {error.strerror or error}") from None
        if not found and problems:
            raise AssetError(f"{path} is not a records file: line {problems[0][0]} is {problems[0][1]}")
        _warn(path, problems)
        known = {record.line() for record in self._load()}
        new = {line: record for record in found if (line := record.line()) not in known}
        for record in new.values():
            self.append(record)
        return len(new), len(found) - len(new)

    def prune(
        self, unwanted: Callable[[Record], bool], *, unreadable: bool = False, dry_run: bool = False
    ) -> tuple[list[Record], int]:
        """Drop records, and with `unreadable` the lines that are none: the dropped records, and how many lines. The file
        is replaced at once. Raises AssetError when it cannot be."""
        kept: list[str] = []
        dropped: list[Record] = []
        lines = 0
        for line in filter(str.strip, _lines(self.path) if self.path.exists() else []):
            try:
                record = parse_record(line)
            except RecordError:
                if unreadable:
                    lines += 1
                else:
                    kept.append(line)
                continue
            if unwanted(record):
                dropped.append(record)
            else:
                kept.append(line)
        if (dropped or lines) and not dry_run:
            try:
                home.write_atomic(self.path, "".join(f"{line}\n" for line in kept))
            except OSError as error:
                raise self._not_written(error) from None
            self._records = None
        return dropped, lines

    def _not_written(self, error: OSError) -> AssetError:
        return AssetError(
            f"cannot write the records file {self.path}: {error.strerror or error}",
            hint="make it writable, or set KERNELFORGE_HOME to a folder that is",
        )

    def _load(self) -> list[Record]:
        if self._records is None:
            self._records, self._index = [], {}
            try:
                found, problems = _parse(_lines(self.path))
            except FileNotFoundError:
                return self._records
            except OSError as error:
                reason = (
                    f"cannot read the records file {self.path}: {error.strerror or error}; going on without records"
                )
                warnings.warn(reason, KernelForgeWarning, stacklevel=2)
                return self._records
            _warn(self.path, problems)
            for record in found:
                self._remember(record)
        return self._records

    def _remember(self, record: Record) -> None:
        assert self._records is not None
        self._records.append(record)
        key = (record.target, record.op, record.variant, record.fingerprint, str(record.threads))
        self._index.setdefault(key, []).append(record)

    def _of(self, variant: KernelVariant, device: DeviceInfo) -> Iterable[Record]:
        """The latest record of each subject that the variant, as it is now, has on this device."""
        self._load()
        key = (variant.target, variant.op, variant.name, device.fingerprint, str(device.threads))
        there = self._index.get(key)
        if there is None:
            return ()
        current = kernel_hash(variant)
        latest: dict[tuple[str, ...], Record] = {}
        for record in there:
            if record.variant_version == variant.version and record.kernel_hash == current:
                known = latest.get(record.subject)
                if known is None or known.unix_time <= record.unix_time:
                    latest[record.subject] = record
        return latest.values()

    def _problem(self, key: str) -> Problem | None:
        """A recorded problem; None when its text is no static problem."""
        if key not in self._problems:
            try:
                problem = parse_problem(key)
                self._problems[key] = None if problem.dims else problem
            except KernelForgeError:
                self._problems[key] = None
        return self._problems[key]


def distance(asked: Problem, measured: Problem) -> float:
    """How far apart two problems' shapes are; infinite when they differ in more than sizes."""
    if asked.op != measured.op or asked.attrs != measured.attrs:
        return math.inf
    pairs = zip_longest(
        (*asked.operands, *asked.results), (*measured.operands, *measured.results), fillvalue=TensorType((), "i8")
    )
    return max((_tensor_distance(a, b) for a, b in pairs), default=0.0)


def _tensor_distance(asked: TensorType | None, measured: TensorType | None) -> float:
    if asked is None or measured is None:
        return 0.0 if asked is measured else math.inf
    if (asked.dtype, asked.rank, asked.constant) != (measured.dtype, measured.rank, measured.constant):
        return math.inf
    if asked.contiguous != measured.contiguous:
        return math.inf
    total = 0.0
    for a, b in zip(asked.shape, measured.shape, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            total += abs(math.log2(max(a, 1) / max(b, 1)))
    return total


def _lines(path: Path) -> list[str]:
    # Bytes that are not text must make their own line unreadable, not the file.
    return home.read_lines(path).decode(errors="replace").split("\n")


def _parse(lines: Sequence[str]) -> tuple[list[Record], list[tuple[int, str]]]:
    """The records, and (line number, what is wrong) of the lines that are none."""
    found: list[Record] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(parse_record(line))
        except RecordError as error:
            problems.append((number, str(error)))
    return found, problems


def _warn(path: Path, problems: Sequence[tuple[int, str]]) -> None:
    if not problems:
        return
    named = "; ".join(f"{path}:{number}: {what}" for number, what in problems[:_NAMED_LINES])
    more = f"; and {len(problems) - _NAMED_LINES} more" if len(problems) > _NAMED_LINES else ""
    lines = "1 line that is" if len(problems) == 1 else f"{len(problems)} lines that are"
    warnings.warn(f"skipped {lines} no tuning record: {named}{more}", KernelForgeWarning, stacklevel=3)
