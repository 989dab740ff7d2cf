"""The one place that probes the host: cores, caches, memory and CPU features, as data.

Light on purpose (no heavy import), so that selection and thread counts may ask at any time. Where the operating
system says nothing of a cache or a feature it is unknown (0, or absent), never guessed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

X86_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v2": {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}
"""Features that each level of the x86-64 psABI adds to the one below, by the names of /proc/cpuinfo."""

TOLD = frozenset().union(
    *X86_LEVELS.values(),
    ("avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    ("asimd", "asimddp", "asimdhp", "fphp", "i8mm", "bf16", "sve", "sve2"),
)
"""Features that kernels may ask for. The others are left out: which are told differs with the kernel's version."""


@dataclass(frozen=True)
class Machine:
    """What this process may use of the host."""

    os: str
    """"linux", "darwin" or "windows"."""
    arch: str
    """"x86_64", "aarch64", or the system's own name for another."""
    cpu: str
    """Model name."""
    cores: int
    """Physical cores that the process may run on (affinity and container limits respected); at least 1."""
    logical: int
    """Hardware threads that the process may run on."""
    l1d_bytes: int
    """Per core; 0 when unknown."""
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int
    features: frozenset[str]
    """Those of `TOLD` that the CPU has; on Windows only what it tells."""

    @property
    def level(self) -> str:
        """From "x86-64-v2" to "x86-64-v4", "x86-64" below; on other architectures the architecture's name."""
        if self.arch != "x86_64":
            return self.arch
        needed: set[str] = set()
        found = "x86-64"
        for level, added in reversed(X86_LEVELS.items()):
            needed |= added
            if needed <= self.features:
                found = level
        return found

    @property
    def fingerprint(self) -> str:
        """Short and stable: equal for machines whose timings may be compared."""
        shown = (self.os, self.arch, self.cpu, self.cores, self.l2_bytes, self.l3_bytes, sorted(self.features))
        return f"{self.arch}-{self.cores}c-{hashlib.sha256(repr(shown).encode()).hexdigest()[:12]}"


@cache
def probe() -> Machine:
    """The host, probed once per process. Container and affinity limits are those of the first call."""
    system = {"win32": "windows"}.get(sys.platform, sys.platform)
    told = platform.machine().lower()
    arch = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(told, told)
    if system == "linux":
        return _linux(arch)
    if system == "darwin":
        return _darwin(arch)
    return _other(system, arch)


def physical_cores(cpuinfo: str, usable: set[int]) -> int:
    """Distinct (socket, core) pairs among the usable processors of a /proc/cpuinfo text; where it names none, all."""
    found: set[tuple[str, str]] = set()
    for block in cpuinfo.split("\n\n"):
        fields = _fields(block)
        if "processor" in fields and fields["processor"].isdecimal() and int(fields["processor"]) in usable:
            found.add((fields.get("physical id", "0"), fields.get("core id", "cpu" + fields["processor"])))
    return len(found) or len(usable)


def cgroup_cpus(cgroups: str, root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The tightest CPU quota, in CPUs, of the groups in a /proc/self/cgroup text and of their parents; None: no limit.

    Both versions: `cpu.max` under the group (v2), `cpu.cfs_quota_us` and `cpu.cfs_period_us` under the controller (v1).
    """
    groups = {line.split(":", 2)[2].strip("/") for line in cgroups.splitlines() if line.count(":") >= 2} | {""}
    folders = {folder for group in groups for folder in (Path(group), *Path(group).parents)}
    quotas = []
    for folder in folders:
        v1 = root / "cpu" / folder
        words = _read(root / folder / "cpu.max").split() or [
            _read(v1 / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period")
        ]
        if len(words) == 2 and all(w.isdecimal() for w in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _linux(arch: str) -> Machine:
    cpuinfo = _read("/proc/cpuinfo")
    usable = set(os.sched_getaffinity(0)) if sys.platform == "linux" else set()
    quota = cgroup_cpus(_read("/proc/self/cgroup"))
    limit = len(usable) if quota is None else max(1, int(quota))
    first = _fields(cpuinfo.split("\n\n")[0])
    flags = first.get("flags", first.get("Features", ""))
    caches = _linux_caches(min(usable, default=0))
    return Machine(
        os="linux",
        arch=arch,
        cpu=first.get("model name")
        or " ".join((arch, first.get("CPU implementer", ""), first.get("CPU part", ""))).strip(),
        cores=max(1, min(physical_cores(cpuinfo, usable), limit)),
        logical=max(1, min(len(usable), limit)),
        l1d_bytes=caches.get(1, 0),
        l2_bytes=caches.get(2, 0),
        l3_bytes=caches.get(3, 0),
        memory_bytes=_sysconf("SC_PAGE_SIZE") * _sysconf("SC_PHYS_PAGES"),
        features=frozenset(flags.split()) & TOLD,
    )


def _linux_caches(cpu: int) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
        text, level = _read(index / "size").strip(), _read(index / "level").strip()
        if _read(index / "type").strip() != "Instruction" and level.isdecimal():
            unit = {"K": 1024, "M": 1024**2}.get(text[-1:], 1)
            digits = text.rstrip("KM")
            sizes[int(level)] = int(digits) * unit if digits.isdecimal() else 0
    return sizes


def _darwin(arch: str) -> Machine:
    keys = "machdep.cpu.brand_string machdep.cpu.features machdep.cpu.leaf7_features hw.physicalcpu hw.logicalcpu"
    keys += " hw.l1dcachesize hw.l2cachesize hw.l3cachesize hw.perflevel0.physicalcpu hw.perflevel0.l1dcachesize"
    keys += " hw.perflevel0.l2cachesize hw.memsize hw.optional.arm.FEAT_DotProd hw.optional.arm.FEAT_I8MM"
    command = ["/usr/sbin/sysctl", "-i", *keys.split()]  # -i: an unknown key is left out and does not fail the rest
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    return from_sysctl(arch, _fields(text))


def from_sysctl(arch: str, told: Mapping[str, str]) -> Machine:
    """macOS, from `sysctl`. Of Apple silicon the performance cores are counted, and their caches told."""

    def number(*keys: str) -> int:
        return next((int(told[k]) for k in keys if told.get(k, "").isdecimal() and int(told[k])), 0)

    words = (told.get("machdep.cpu.features", "") + " " + told.get("machdep.cpu.leaf7_features", "")).lower().split()
    features = {{"avx1.0": "avx", "sse4.1": "sse4_1", "sse4.2": "sse4_2"}.get(w, w) for w in words}
    if arch == "aarch64":
        features |= {"asimd", "asimdhp", "fphp"}
        features |= {"asimddp"} if number("hw.optional.arm.FEAT_DotProd") else set()
        features |= {"i8mm"} if number("hw.optional.arm.FEAT_I8MM") else set()
    logical = number("hw.logicalcpu") or os.cpu_count() or 1
    return Machine(
        os="darwin",
        arch=arch,
        cpu=told.get("machdep.cpu.brand_string", arch),
        cores=number("hw.perflevel0.physicalcpu", "hw.physicalcpu") or logical,
        logical=logical,
        l1d_bytes=number("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"),
        l2_bytes=number("hw.perflevel0.l2cachesize", "hw.l2cachesize"),
        l3_bytes=number("hw.l3cachesize"),
        memory_bytes=number("hw.memsize"),
        features=frozenset(features) & TOLD,
    )


def _other(system: str, arch: str) -> Machine:
    """Windows and the rest: psutil counts cores and memory. Caches stay unknown."""
    import psutil

    process = psutil.Process()
    usable = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else 0
    logical = usable or os.cpu_count() or 1
    cores = psutil.cpu_count(logical=False) or logical
    return Machine(
        os=system,
        arch=arch,
        cpu=platform.processor() or arch,
        cores=max(1, min(cores, logical)),
        logical=logical,
        l1d_bytes=0,
        l2_bytes=0,
        l3_bytes=0,
        memory_bytes=int(psutil.virtual_memory().total),
        features=_windows_features(arch) if sys.platform == "win32" else frozenset(),
    )


def _windows_features(arch: str) -> frozenset[str]:
    """Windows tells of SSE4.2, AVX2 and AVX-512F only; server and desktop CPUs with one have the rest of its level."""
    if arch != "x86_64":
        return frozenset({"asimd"})
    ask = ctypes.CDLL("kernel32").IsProcessorFeaturePresent
    levels = [name for name, number in (("x86-64-v2", 38), ("x86-64-v3", 40), ("x86-64-v4", 41)) if ask(number)]
    return frozenset().union(*(X86_LEVELS[name] for name in levels))


def _fields(text: str) -> dict[str, str]:
    """`name : value` lines."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysconf(name: str) -> int:
    try:
        return max(0, os.sysconf(name)) if sys.platform != "win32" else 0
    except (ValueError, OSError):
        return 0


def stack_bytes() -> int | None:
    """Size of this thread's stack; None where the system does not tell, or it has no limit."""
    if sys.platform == "win32":
        low, high = ctypes.c_size_t(), ctypes.c_size_t()
        ctypes.WinDLL("kernel32").GetCurrentThreadStackLimits(ctypes.byref(low), ctypes.byref(high))
        return high.value - low.value
    if sys.platform == "linux" and threading.get_native_id() == os.getpid():
        import resource  # glibc finds out the same for the first thread from the process's map of memory, in a millisecond

        limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
        return None if limit == resource.RLIM_INFINITY else limit
    library = ctypes.CDLL(None)
    library.pthread_self.restype = ctypes.c_void_p
    thread = ctypes.c_void_p(library.pthread_self())
    if sys.platform == "darwin":
        library.pthread_get_stacksize_np.restype = ctypes.c_size_t
        return int(library.pthread_get_stacksize_np(thread))
    attributes = ctypes.create_string_buffer(256)  # a pthread_attr_t, of 56 bytes with glibc on x86-64
    if not hasattr(library, "pthread_getattr_np") or library.pthread_getattr_np(thread, attributes):
        return None
    start, size = ctypes.c_void_p(), ctypes.c_size_t()
    told = library.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size))
    library.pthread_attr_destroy(attributes)
    return None if told else size.value
