"""`kernelforge doctor`: the machine, its devices, the plugins, the state on disk; what is wrong and what helps."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Annotated, Any

import typer

from kernelforge import __version__
from kernelforge.cli import output
from kernelforge.cli.cache_verbs import size_text, usage
from kernelforge.cli.output import Output
from kernelforge.distributions import version
from kernelforge.errors import DeviceError, KernelForgeError
from kernelforge.home import cache_dir, home, records_path
from kernelforge.registry import Registry
from kernelforge.roofline import Roofline, device_roofline
from kernelforge.variant import DeviceInfo

TOOLCHAIN = ("torch-mlir", "numpy", "llvmlite", "numba", "wgpu", "tokenizers", "safetensors")
"""Distributions whose versions explain most differences between machines."""


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure the limits of the devices again.")] = False,
) -> dict[str, Any]:
    """Show what works here and what does not. Fails only when no target, or not the one asked for, has a device.

    The limits of each device (memory bandwidth, peaks of arithmetic) are measured the first time and kept.
    """
    out = output.current()
    targets = [out.requested_target] if out.requested_target else list(out.registry.backends)
    for target in targets:
        out.registry.backend_spec(target)
    problems: list[dict[str, str]] = []

    def problem(what: str, hint: str) -> None:
        problems.append({"problem": what, "hint": hint})

    out.data = {
        "versions": _versions(out),
        "machine": _machine(out),
        "devices": _devices(out, targets, problem, again=measure),
        "plugins": _plugins(out, out.registry, problem),
        "state": _state(out, problem),
        "problems": problems,
    }
    out.print()
    for entry in problems:
        out.print(f"problem: {entry['problem']}\n   hint: {entry['hint']}")
    if not any(out.data["devices"].values()):
        where = f"target '{targets[0]}' has no device here" if out.requested_target else "no target has a device here"
        raise DeviceError(where, hint="pip install kernelforge-cpu")
    out.print(f"problems found: {len(problems) or 'none'}")
    return out.data


def _versions(out: Output) -> dict[str, str]:
    versions = {"kernelforge": __version__, "python": sys.version.split()[0]}
    versions |= {name: told for name in TOOLCHAIN if (told := version(name))}
    out.print("versions  " + ", ".join(f"{name} {told}" for name, told in versions.items()))
    return versions


def _machine(out: Output) -> dict[str, Any]:
    from kernelforge.machine import probe

    host = probe()
    out.print(f"machine   {host.cpu}, {host.os} {host.arch} ({host.level})")
    out.print(f"          {host.cores} cores, {host.logical} threads, {size_text(host.memory_bytes)} of memory")
    caches = {"l1d": host.l1d_bytes, "l2": host.l2_bytes, "l3": host.l3_bytes}
    out.print("          caches " + ", ".join(f"{n} {size_text(b) if b else 'unknown'}" for n, b in caches.items()))
    out.print(f"          features {' '.join(sorted(host.features)) or 'unknown'}")
    return {
        "cpu": host.cpu,
        "os": host.os,
        "arch": host.arch,
        "level": host.level,
        "cores": host.cores,
        "logical": host.logical,
        "memory_bytes": host.memory_bytes,
        "features": host.features,
        "fingerprint": host.fingerprint,
        **{f"{name}_bytes": size for name, size in caches.items()},
    }


def _devices(out: Output, targets: Sequence[str], problem: Any, *, again: bool) -> dict[str, list[dict[str, Any]]]:
    """The devices of each target with their limits. A backend that fails is a problem, and ends nothing."""
    registry = out.registry
    found: dict[str, list[dict[str, Any]]] = {}
    for target in targets:
        found[target] = []
        try:
            infos = registry.backend(target).devices()
        except KernelForgeError as error:
            problem(str(error), error.hint or _look(registry, target))
            continue
        except Exception as error:
            problem(f"target '{target}' fails: {type(error).__name__}: {error}", _look(registry, target))
            continue
        if not infos:
            problem(f"target '{target}' has no device", "install the device's driver, or use another target")
        for listed in infos:
            info, roofline = _opened(out, target, listed, problem, again=again)
            threads = f"{info.threads} thread{'s' if info.threads != 1 else ''}"
            features = "".join(f" {feature}" for feature in sorted(info.features))
            out.print(f"device    {target}: {info.name}, {threads}" + (f",{features}" if features else ""))
            for ability, reason in info.missing:
                out.print(f"          without {ability}: {reason}")
            if roofline is not None:
                out.print(f"          at most: {roofline}")
            found[target].append(
                {
                    "name": info.name,
                    "fingerprint": info.fingerprint,
                    "threads": info.threads,
                    "features": info.features,
                    "limits": dict(info.limits),
                    "missing": dict(info.missing),
                    "roofline": None if roofline is None else roofline.as_data(),
                }
            )
    return found


def _opened(
    out: Output, target: str, info: DeviceInfo, problem: Any, *, again: bool
) -> tuple[DeviceInfo, Roofline | None]:
    """The device with the threads asked for, and its limits; as it is listed when its target offers no limits."""
    if out.registry.backend_spec(target).roofline is None:
        return info, None
    try:
        with closing(out.registry.backend(target).open(info.name, threads=out.threads)) as device:
            return device.info, device_roofline(device, out.registry, again=again)
    except Exception as error:
        what = f"the limits of {target} ({info.name}) cannot be measured: {type(error).__name__}: {error}"
        problem(what, _look(out.registry, target))
        return info, None


def _look(registry: Registry, target: str) -> str:
    return f"kernelforge plugins info {registry.backends[target].provenance.plugin}"


def _plugins(out: Output, registry: Registry, problem: Any) -> dict[str, dict[str, Any]]:
    for key, status in registry.plugins.items():
        out.print(f"plugin    {key}: {status.distribution} {status.version}, {status.state}")
        if status.broken:
            problem(status.report, status.remedy or f"kernelforge plugins check {status.name}")
    for message in registry.unheeded:
        problem(message, "kernelforge plugins list shows their names")
    return {
        key: {"distribution": s.distribution, "version": s.version, "state": s.state, "error": s.error}
        for key, s in registry.plugins.items()
    }


def _state(out: Output, problem: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"home": home()}
    for name, path in (("cache", cache_dir()), ("records", records_path())):
        files, size = usage(path)
        out.print(f"{name:<8}  {path}: {size_text(size)}" + (f" in {files} files" if name == "cache" else ""))
        state[name] = {"path": path, "files": files, "bytes": size}
    existing = next(folder for folder in (home(), *home().parents) if folder.exists())
    state["writable"] = os.access(existing, os.W_OK)
    if not state["writable"]:
        problem(f"{home()} cannot be written: nothing is kept between runs", "set KERNELFORGE_HOME to another folder")
    return state
