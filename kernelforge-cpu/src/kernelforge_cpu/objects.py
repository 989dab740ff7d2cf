"""Compiled objects on disk: the second start of the same kernels compiles nothing and does not import MLIR.

An object's key is the hash of everything it depends on: the text, the toolchain, the target with its features. Files
carry a checksum; they are used only when it holds. A folder that cannot be written costs the reuse, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kernelforge import home
from kernelforge.distributions import version
from kernelforge.errors import KernelForgeWarning, UsageError
from kernelforge.plan_cache import cached_text, keep_text
from kernelforge_cpu import jit
from kernelforge_cpu.isa import CpuTarget, host_target

MAGIC = b"KFOBJ\x00\x01\n"
SUM = 32
FORMAT = "2"
"""Changes when the way from text to object changes other than by `jit.PIPELINE`."""
DEFAULT_MAX_MB = 2048
_KEY = re.compile("[0-9a-f]{64}")
FRESH_S = 86_400.0
"""A hit marks a file as used (for eviction) at most once in this time."""


@dataclass
class Stats:
    """What happened in this process."""

    hits: int = 0
    compiled: int = 0
    compile_s: float = 0.0
    rebuilt: int = 0
    """Of `compiled`: because the cached file was damaged."""
    evicted: int = 0
    _told: set[str] = field(default_factory=set)

    def tell_once(self, subject: str, message: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            warnings.warn(message, KernelForgeWarning, stacklevel=3)


STATS = Stats()


def load_objects(
    texts: Sequence[str] | Callable[[], Sequence[str]],
    target: CpuTarget | None = None,
    *,
    threads: int = 1,
    name: str | None = None,
) -> jit.Library:
    """One library of all kernels in these MLIR modules (default target: the host), from the cache or compiled now, in up
    to `threads` processes.

    `name` is a hash of all that decides the texts: under it is kept which objects they became, and as long as those are
    there, `texts` is not called.

    Raises UsageError with the diagnostics of a text that does not compile.
    """
    target = target or host_target()
    if name is not None:
        name = key(name, target)
        if (known := _known(name)) is not None:
            return jit.load(known)
    texts = list(dict.fromkeys(texts() if callable(texts) else texts))
    files = {text: folder() / f"{key(text, target)}.o" for text in texts}
    codes = {text: code for text, file in files.items() if (code := _cached(file)) is not None}
    start = time.perf_counter()

    def keep(text: str, code: bytes) -> None:
        codes[text] = code
        STATS.compiled += 1
        _write(files[text], code)

    if missing := files.keys() - codes.keys():
        from kernelforge_cpu.helpers import compile_each

        compile_each(missing, target, keep, threads=threads)
        STATS.compile_s += time.perf_counter() - start
    if name is not None:
        keep_text(name, "objects", "\n".join(file.stem for file in files.values()))
    return jit.load([codes[text] for text in texts])


def _known(name: str) -> list[bytes] | None:
    """The objects that are kept under a name, unless one is missing or damaged."""
    listed = cached_text(name, "objects")
    if listed is None or not all(map(_KEY.fullmatch, stems := listed.split("\n"))):
        return None
    codes = [_read(folder() / f"{stem}.o") for stem in stems]
    found = [code for code in codes if code is not None]
    if len(found) < len(codes):
        return None
    STATS.hits += len(found)
    return found


def load_llvm(ir_text: str) -> jit.Library:
    """The same for one module of LLVM IR, for the host."""
    file = folder() / f"{key(ir_text, host_target())}.o"
    code = _cached(file)
    if code is None:
        start = time.perf_counter()
        code = jit.compile_llvm(ir_text, host_target())
        STATS.compiled += 1
        STATS.compile_s += time.perf_counter() - start
        _write(file, code)
    return jit.load([code])


def _cached(file: Path) -> bytes | None:
    code = _read(file)
    STATS.hits += code is not None
    return code


def folder() -> Path:
    return home.cache_dir() / "objects"


def key(text: str, target: CpuTarget) -> str:
    parts = (FORMAT, jit.PIPELINE, *toolchain(), target.key, str(target.lanes), text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def toolchain() -> tuple[str, ...]:
    """Versions of what turns text into code."""
    torch_mlir, llvmlite = (f"{name} {version(name)}".rstrip() for name in ("torch-mlir", "llvmlite"))
    return torch_mlir, llvmlite


def max_bytes() -> int:
    """KERNELFORGE_CACHE_MAX_MB (default 2048). Raises UsageError when it is not a number."""
    told = os.environ.get("KERNELFORGE_CACHE_MAX_MB", "") or str(DEFAULT_MAX_MB)
    if not told.isdecimal():
        raise UsageError(f"KERNELFORGE_CACHE_MAX_MB is {told!r}", hint="give a whole number of MiB, such as 2048")
    return int(told) * 1024**2


def evict(limit: int) -> int:
    """Delete the least recently used objects until at most nine tenths of `limit` bytes are left, if there are more.
    Their number.
    """
    found = []
    for file in folder().glob("*.o"):
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((status.st_mtime, status.st_size, file))
    total, deleted = sum(size for _, size, _ in found), 0
    if total <= limit:
        return 0
    for _, size, file in sorted(found):
        if total <= limit * 0.9:
            break
        try:
            file.unlink()
        except OSError:
            continue
        total, deleted = total - size, deleted + 1
    STATS.evicted += deleted
    return deleted


def _read(file: Path) -> bytes | None:
    """The object in `file`, or None. A damaged file is named once and then written again."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        STATS.tell_once(
            "read", f"the object cache {file.parent} cannot be read ({error.strerror}): kernels are compiled anew"
        )
        return None
    start = len(MAGIC) + SUM
    code = content[start:]
    if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : start] != hashlib.sha256(code).digest():
        STATS.rebuilt += 1
        STATS.tell_once(file.name, f"the cached object {file} is damaged: its kernel is compiled anew")
        return None
    try:
        if time.time() - file.stat().st_mtime > FRESH_S:
            os.utime(file)
    except OSError:
        pass  # someone else's cache: usable, not ours to mark
    return code


def _write(file: Path, code: bytes) -> None:
    limit = max_bytes()
    try:
        home.write_atomic(file, MAGIC + hashlib.sha256(code).digest() + code)
    except OSError as error:
        reason = error.strerror or str(error)
        STATS.tell_once(
            "write", f"the object cache {file.parent} cannot be written ({reason}): compiled kernels are not kept"
        )
        return
    evict(limit)
