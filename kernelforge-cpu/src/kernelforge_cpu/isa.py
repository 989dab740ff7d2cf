"""What code is generated for: a triple, an LLVM CPU with its features, and the vector width that kernels are written
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kernelforge.errors import UsageError
from kernelforge.machine import Machine, probe

LINUX = "unknown-linux-gnu"


@dataclass(frozen=True)
class CpuTarget:
    """A CPU to compile for. Objects may be loaded on any machine that has all its features."""

    triple: str
    cpu: str
    """LLVM's name, such as "x86-64-v3" or "icelake-server"."""
    features: str
    """LLVM's list ("+avx2,-sse4a"); empty: those of `cpu`."""
    level: str
    """"x86-64-v2", "x86-64-v3", "x86-64-v4", "neoverse-n1", "apple-m1"."""
    lanes: int
    """f32 lanes of the vectors that kernels use: 4, 8 or 16."""

    @property
    def arch(self) -> str:
        return "aarch64" if self.triple.startswith(("aarch64", "arm64")) else self.triple.split("-")[0]

    @property
    def has_f16(self) -> bool:
        """f16 to and from f32 is an instruction."""
        return self.arch == "aarch64" or self.level in ("x86-64-v3", "x86-64-v4")

    @property
    def key(self) -> str:
        """What an object file depends on."""
        return f"{self.triple}|{self.cpu}|{self.features}"


LEVELS = {
    level: CpuTarget(triple, cpu, "", level, lanes)
    for level, triple, cpu, lanes in (
        ("x86-64-v2", f"x86_64-{LINUX}", "x86-64-v2", 4),
        ("x86-64-v3", f"x86_64-{LINUX}", "x86-64-v3", 8),
        ("x86-64-v4", f"x86_64-{LINUX}", "x86-64-v4", 16),
        ("neoverse-n1", f"aarch64-{LINUX}", "neoverse-n1", 4),
        ("apple-m1", "arm64-apple-macosx11.0.0", "apple-m1", 4),
    )
}
"""Targets by level, also for machines that are not here."""


def target(level: str) -> CpuTarget:
    """The target of a level. Raises UsageError for an unknown one."""
    if level not in LEVELS:
        raise UsageError(f"unknown CPU level {level!r}", hint=f"known levels: {', '.join(LEVELS)}")
    return LEVELS[level]


def level_of(machine: Machine) -> str:
    """The highest level of `LEVELS` that runs on `machine`. Raises UsageError when there is none."""
    if machine.arch == "aarch64":
        return "apple-m1" if machine.os == "darwin" else "neoverse-n1"
    level = machine.level
    if level not in LEVELS:
        raise UsageError(
            f"this CPU ({machine.cpu}, {level}) is below every supported level",
            hint="the cpu target needs x86-64-v2 or aarch64; use --target reference",
        )
    return level


@cache
def host_target() -> CpuTarget:
    """The host: its level from the machine probe, its CPU name and exact features from LLVM (imports llvmlite)."""
    import llvmlite.binding as llvm

    level = level_of(probe())
    features = llvm.get_host_cpu_features().flatten()
    if "asimddp" in probe().features:
        # LLVM tells it by the core's name only: code for a core that it does not know would end the process at `sdot`.
        features += ",+dotprod"
    triple = llvm.get_process_triple()
    if probe().os == "windows":
        triple += "-elf"  # the object format that LLVM's linker loads without help from the C runtime
    return CpuTarget(triple, llvm.get_host_cpu_name(), features, level, LEVELS[level].lanes)


def host_targets() -> tuple[CpuTarget, ...]:
    """Targets whose code runs here: the host, then the lower levels of its architecture with the host's triple."""
    host = host_target()
    names = [n for n, t in LEVELS.items() if t.arch == host.arch == "x86_64"]
    lower = names[: names.index(host.level)] if host.level in names else []
    return (host, *(CpuTarget(host.triple, n, "", n, LEVELS[n].lanes) for n in reversed(lower)))
