"""`kernelforge records list | show | export | import | prune`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelforge.cli import output
from kernelforge.cli.options import write_file
from kernelforge.errors import UsageError
from kernelforge.registry import Registry
from kernelforge.tune.record import Record, kernel_hash
from kernelforge.tune.records import RecordStore
from kernelforge.variant import config_key

_DAY_S = 86400.0

Op = Annotated[str | None, typer.Option(help="Only of this op, by its short or full name.")]
VariantName = Annotated[str | None, typer.Option("--variant", help="Only of this variant.")]
Device = Annotated[str | None, typer.Option(help="Only of this device, by name or fingerprint.")]


def list_records(op: Op = None, variant: VariantName = None, device: Device = None) -> dict[str, Any]:
    """List the records: number, variant, config, median, error, problem."""
    out = output.current()
    store = RecordStore.default()
    rows = [(i, r) for i, r in enumerate(store.records, 1) if _selected(r, op, variant, device)]
    out.table(
        ["#", "target", "variant", "config", "median us", "rel. error", "status", "problem"],
        [
            [
                i,
                r.target,
                r.variant,
                config_key(r.config),
                r.median_s * 1e6 if r.ok else None,
                r.error,
                r.status,
                r.problem,
            ]
            for i, r in rows
        ],
    )
    return {"path": str(store.path), "records": [{"number": i} | asdict(r) for i, r in rows]}


def show(
    number: Annotated[int, typer.Argument(min=1, help="Number of the record, as `records list` shows it.")],
) -> Any:
    """Show everything that a record holds."""
    out = output.current()
    records = RecordStore.default().records
    if number > len(records):
        raise UsageError(f"there is no record {number}", hint=f"there are {len(records)}; `records list` numbers them")
    record = records[number - 1]
    for name, value in asdict(record).items():
        out.print(f"{name:<16} {json.dumps(value) if isinstance(value, (dict, list, tuple)) else value}")
    return asdict(record)


def export(
    file: Annotated[Path, typer.Argument(help="File to write; - is standard output.")],
    op: Op = None,
    variant: VariantName = None,
    device: Device = None,
) -> dict[str, Any]:
    """Write records to a file that `records import` reads."""
    out = output.current()
    chosen = [r for r in RecordStore.default().records if _selected(r, op, variant, device)]
    text = "".join(f"{record.line()}\n" for record in chosen)
    if str(file) == "-":
        out.stream(text)
    else:
        write_file(file, text)
        out.print(f"{len(chosen)} records written to {file}")
    return {"exported": len(chosen), "file": str(file)}


def import_records(file: Annotated[Path, typer.Argument(help="File written by `records export`.")]) -> dict[str, Any]:
    """Merge the records of a file into yours; those you have are not doubled."""
    new, known = RecordStore.default().merge(file)
    output.current().print(f"{new} records imported, {known} already there")
    return {"imported": new, "known": known}


def prune(
    device: Device = None,
    stale: Annotated[bool, typer.Option("--stale", help="Of kernels that have changed since.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Of failed trials, so that they are tried again.")] = False,
    older_than: Annotated[float | None, typer.Option(min=0, help="Made more than so many days ago.")] = None,
    unreadable: Annotated[bool, typer.Option("--unreadable", help="Also drop lines that are no records.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and keep it.")] = False,
) -> dict[str, Any]:
    """Drop the records that meet all given conditions."""
    out = output.current()
    conditions = device is not None or stale or failed or older_than is not None
    if not (conditions or unreadable):
        raise UsageError("say what to drop", hint="--device, --stale, --failed, --older-than DAYS or --unreadable")
    current = _current_kernels(out.registry) if stale else {}
    before = time.time() - (older_than or 0.0) * _DAY_S

    def unwanted(record: Record) -> bool:
        return (
            conditions
            and (device is None or device in (record.device, record.fingerprint))
            and (not stale or _is_stale(record, current))
            and (not failed or not record.ok)
            and (older_than is None or record.unix_time < before)
        )

    dropped, lines = RecordStore.default().prune(unwanted, unreadable=unreadable, dry_run=dry_run)
    for record in dropped:
        out.print(f"{record.target} {record.variant} {config_key(record.config)} on {record.device}: {record.problem}")
    counted = f"{len(dropped)} records" + (f" and {lines} unreadable lines" if unreadable else "")
    out.print(f"{counted} {'would be dropped' if dry_run else 'dropped'}")
    return {"dropped": len(dropped), "unreadable": lines, "dry_run": dry_run}


def _selected(record: Record, op: str | None, variant: str | None, device: str | None) -> bool:
    return (
        (op is None or op in (record.op, record.op.partition(".")[2]))
        and (variant is None or variant == record.variant)
        and (device is None or device in (record.device, record.fingerprint))
    )


def _current_kernels(registry: Registry) -> dict[str, tuple[str, str]]:
    """Version and hash of every variant there is, by its key."""
    variants = registry.hooks.get("kernelforge_kernels", ())
    return {variant.key: (variant.version, kernel_hash(variant)) for variant in variants}


def _is_stale(record: Record, current: dict[str, tuple[str, str]]) -> bool:
    """Its kernel is here in another version. A kernel that is not here may belong to a plugin of another machine."""
    kernel = current.get(f"{record.target}/{record.op}/{record.variant}")
    return kernel is not None and kernel != (record.variant_version, record.kernel_hash)
