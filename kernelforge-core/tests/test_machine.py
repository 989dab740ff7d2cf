"""Probing the host: real here, and from the recorded words of other systems."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernelforge import machine
from kernelforge.machine import cgroup_cpus, from_sysctl, physical_cores, probe

# Two sockets of two cores with two threads each.
CPUINFO = "\n\n".join(
    f"processor\t: {i}\nmodel name\t: A CPU @ 2.80GHz\nphysical id\t: {i // 4}\ncore id\t\t: {i % 2}\nflags\t\t: fpu avx2 fma"
    for i in range(8)
)
ARM = "\n\n".join(
    f"processor\t: {i}\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c" for i in range(4)
)


def test_the_host_is_described() -> None:
    host = probe()
    assert host is probe()
    assert host.os == {"win32": "windows"}.get(sys.platform, sys.platform)
    assert host.arch in (platform.machine().lower(), "x86_64", "aarch64")
    assert 1 <= host.cores <= host.logical <= (os.cpu_count() or 1)
    assert host.cpu
    assert host.memory_bytes > 2**28
    assert host.features <= machine.TOLD
    if host.l1d_bytes and host.l2_bytes:
        assert 2**13 <= host.l1d_bytes < host.l2_bytes


def test_it_imports_nothing_heavy() -> None:
    script = "import sys; from kernelforge.machine import probe; probe(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "llvmlite", "torch_mlir", "numba"} & set(loaded)


@pytest.mark.parametrize(
    ("usable", "cores"),
    [(range(8), 4), (range(4), 2), ([0, 2], 1), ([0, 1], 2), ([0, 4], 2), ([5], 1)],
)
def test_physical_cores_count_no_core_twice(usable: list[int], cores: int) -> None:
    assert physical_cores(CPUINFO, set(usable)) == cores


def test_where_no_cores_are_named_each_processor_is_one() -> None:
    assert physical_cores(ARM, {0, 1, 3}) == 3
    assert physical_cores("", {0, 1}) == 2


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2.0),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "300000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("4:cpu:/job\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("nonsense", {"cpu.max": "nonsense"}, None),
        ("", {"cpu.max": "100 0"}, None),
    ],
)
def test_container_limits(tmp_path: Path, groups: str, files: dict[str, str], cpus: float | None) -> None:
    assert cgroup_cpus(groups, write(tmp_path, files)) == cpus


def test_apple_silicon() -> None:
    told = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.physicalcpu": "8",
        "hw.logicalcpu": "8",
        "hw.perflevel0.physicalcpu": "4",
        "hw.l1dcachesize": "65536",
        "hw.perflevel0.l1dcachesize": "131072",
        "hw.perflevel0.l2cachesize": "16777216",
        "hw.memsize": "17179869184",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "0",
    }
    found = from_sysctl("aarch64", told)
    assert (found.cpu, found.cores, found.logical, found.l1d_bytes, found.l2_bytes) == ("Apple M2", 4, 8, 2**17, 2**24)
    assert found.memory_bytes == 2**34
    assert {"asimd", "asimddp"} <= found.features
    assert "i8mm" not in found.features
    assert found.level == "aarch64"


def test_intel_macs() -> None:
    told = {
        "machdep.cpu.features": "SSE3 SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT F16C AVX1.0",
        "machdep.cpu.leaf7_features": "AVX2 BMI1 BMI2",
        "hw.physicalcpu": "4",
        "hw.logicalcpu": "8",
    }
    found = from_sysctl("x86_64", told)
    assert (found.level, found.cores, found.logical) == ("x86-64-v3", 4, 8)
    assert from_sysctl("x86_64", {}).cores >= 1


def test_levels_need_every_feature_of_the_lower_ones() -> None:
    host = replace(probe(), arch="x86_64", features=frozenset())
    levels = {"x86-64": frozenset[str]()}
    for level in reversed(machine.X86_LEVELS):
        levels[level] = frozenset(machine.X86_LEVELS[level]) | list(levels.values())[-1]
    for level, features in levels.items():
        assert replace(host, features=features).level == level
    assert replace(host, features=levels["x86-64-v4"] - {"popcnt"}).level == "x86-64"


def test_the_fingerprint_is_stable_and_tells_machines_apart() -> None:
    host = replace(probe(), os="linux", arch="x86_64", cores=4, memory_bytes=1, features=frozenset({"avx2", "fma"}))
    assert host.fingerprint == replace(host, memory_bytes=2, logical=99).fingerprint
    assert host.fingerprint.startswith("x86_64-4c-")
    others = [
        replace(host, cpu="another"),
        replace(host, cores=5),
        replace(host, l2_bytes=7),
        replace(host, features=frozenset()),
    ]
    assert len({host.fingerprint, *(m.fingerprint for m in others)}) == 5


def test_a_thread_whose_stack_is_too_small_is_told_so_instead_of_crashing() -> None:
    child = """
import threading
from kernelforge.errors import KernelForgeError
from kernelforge.machine import stack_bytes

def parse():
    print(stack_bytes() // 65536)
    try:
        from kernelforge.mlir import parse_module
    except KernelForgeError as error:
        print(error, error.hint)

assert (stack_bytes() or 1 << 30) > 256 * 1024
threading.stack_size(256 * 1024)
thread = threading.Thread(target=parse)
thread.start()
thread.join()
"""
    told = subprocess.run([sys.executable, "-c", child], check=True, capture_output=True, text=True, timeout=60).stdout
    assert told.startswith(("3\nthis thread has 2", "4\nthis thread has 2"))
    assert "KiB of stack, and MLIR needs 768 ulimit -s 8192 gives the process more" in told
