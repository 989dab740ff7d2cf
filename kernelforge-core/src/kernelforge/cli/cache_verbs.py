"""`kernelforge cache info | clear`. The cache holds what can be made again; records are data, and no part of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kernelforge.cli import output
from kernelforge.errors import KernelForgeError
from kernelforge.home import cache_dir, records_path


def info() -> dict[str, Any]:
    """Show where the cache is and how much it holds."""
    out = output.current()
    folder = cache_dir()
    parts = {entry.name: usage(entry) for entry in sorted(folder.iterdir())} if folder.is_dir() else {}
    files, size = usage(folder)
    out.print(f"cache    {folder}: {files} files, {size_text(size)}")
    for name, (part_files, part_size) in parts.items():
        out.print(f"  {name}: {part_files} files, {size_text(part_size)}")
    out.print(f"records  {records_path()}: {size_text(usage(records_path())[1])} (kept by cache clear)")
    return {
        "path": folder,
        "files": files,
        "bytes": size,
        "parts": {name: {"files": f, "bytes": b} for name, (f, b) in parts.items()},
        "records_path": records_path(),
        "records_bytes": usage(records_path())[1],
    }


def clear() -> dict[str, Any]:
    """Delete the cache. Records of measurements are not part of it and stay."""
    out = output.current()
    folder = cache_dir()
    files, size = usage(folder)
    if folder.is_dir():
        failed: list[str] = []
        for entry in folder.iterdir():
            try:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            except OSError as error:
                failed.append(f"{entry.name}: {error.strerror or error}")
        if failed:
            raise KernelForgeError(f"parts of {folder} cannot be deleted: {'; '.join(failed)}")
    out.print(f"deleted {files} files, {size_text(size)} from {folder}")
    return {"path": folder, "files": files, "bytes": size}


def usage(path: Path) -> tuple[int, int]:
    """Files at or below `path`, and their bytes; what vanishes meanwhile is not counted."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []
    sizes: list[int] = []
    for file in files:
        try:
            sizes.append(file.stat().st_size)
        except OSError:
            continue
    return len(sizes), sum(sizes)


def size_text(size: float) -> str:
    """`1536` as "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
